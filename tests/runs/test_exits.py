"""Calibration of early exit: the loosest rule of a row of passed tests, and what it promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

import depthprobe as dp
from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.models.exits import LIST
from depthprobe.models.export import CARD, load_recommender
from depthprobe.probing import exits
from depthprobe.probing.exits import calibrate, exit_places, read_out_users
from depthprobe.runs.context import Context
from depthprobe.runs.export import export_trial
from depthprobe.runs.store import Run

MARGIN, LEVEL = 0.05, 0.9
TEACHER = "full-d03-s0"


@pytest.fixture(scope="module")
def folder(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exits") / "model"
    return export_trial(small_run.path, TEACHER, path, exit_margin=0.9)


def world(rng: np.random.Generator, users: int, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """Ranks at three read-outs and items kept; who leaves at the second loses some hits."""
    full = rng.integers(1, 30, users).astype(float)
    early = np.where(rng.random(users) < loss, 99.0, full)
    kept = np.zeros((users, 3), np.int8)
    kept[:, 1] = rng.integers(0, LIST + 1, users)
    return np.stack([np.full(users, 99.0), early, full], axis=1), kept


@pytest.fixture
def calibrated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """``calibrated(found)``: the rule where users are read out as ``found`` says."""
    loaded: Any = load_recommender(folder)

    def run(found: Any) -> Any:
        monkeypatch.setattr(exits, "read_out_users", lambda *_, **__: found)
        return calibrate(loaded, Any, metric="HR@10", margin=MARGIN, level=LEVEL)  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize("loss", [0.0, 0.05, 0.1, 0.3])
def test_the_loosest_rule_before_the_first_that_fails(
    calibrated: Callable[[Any], Any], loss: float
) -> None:
    ranks, kept = world(np.random.default_rng(1), 3000, loss)
    values, expected = per_user_metric(ranks, "HR@10"), None
    for same in range(10, -1, -1):
        own = np.where(kept[:, 1] >= same, values[:, 1], values[:, 2])
        gain = own - (1 - MARGIN) * values[:, 2]
        if ttest_1samp(gain, 0, alternative="greater").pvalue > 1 - LEVEL:
            break
        expected = same, own.mean() / values[:, 2].mean(), np.where(kept[:, 1] >= same, 2, 3).mean()
    rule = calibrated((ranks, kept))
    assert (rule.same, rule.kept, rule.depth) == pytest.approx(expected)
    assert (rule.metric, rule.margin, rule.level, rule.users) == ("HR@10", MARGIN, LEVEL, 3000)


def test_no_rule_where_the_strictest_fails(calibrated: Callable[[Any], Any]) -> None:
    """Although a looser one would pass: it is not tested any more."""
    ranks, kept = world(np.random.default_rng(2), 3000, 0.0)
    kept[:, 1] = np.where(np.arange(3000) < 600, 10, 5)
    ranks[:600, 1] = 99
    ranks[600:, 1] = 1
    assert (
        per_user_metric(ranks[:, 1], "HR@10").mean() > per_user_metric(ranks[:, 2], "HR@10").mean()
    )
    assert calibrated((ranks, kept)) is None
    ranks[:] = 99  # nobody has a hit
    assert calibrated((ranks, kept)) is None


def test_a_rule_that_loses_more_is_chosen_seldom(calibrated: Callable[[Any], Any]) -> None:
    """In the world where the loosest rule loses just the margin, and stricter ones less."""
    loose = sum(
        (rule := calibrated(world(np.random.default_rng(seed), 800, MARGIN))) is not None
        and rule.same == 0
        for seed in range(60)
    )
    assert loose <= 12  # 6 are expected; more than 12 once in two hundred


def test_kept_items_are_those_of_neighbouring_read_outs(small_run: Run, folder: Path) -> None:
    """Against lists of the whole catalogue, sorted; served by cut exports of the same teacher."""
    context = Context(small_run.path, small_run.study)
    users = context.validation
    model: Any = load_recommender(folder).model
    ranks, kept = read_out_users(model, users, device=context.device)
    lists = []
    for depth in (1, 2, 3):
        name = TEACHER if depth == 3 else f"early-exit-d{depth:02}-s0"
        path = folder.parent / f"cut-{depth}"
        loaded = dp.load_recommender(export_trial(small_run.path, name, path))
        seen = users.seen or users.histories
        raw = [[loaded.item_ids[item - 1] for item in history] for history in seen]
        lists.append([{one.item for one in each} for each in loaded.recommend(raw, top=LIST)])
    for place in (1, 2):
        pairs = zip(lists[place - 1], lists[place], strict=True)
        assert kept[:, place].tolist() == [len(a & b) for a, b in pairs]
    assert (ranks[:, 0] != ranks[:, 2]).any()
    # what is calibrated is what is served
    for same in (6, 9):
        loaded = dataclasses.replace(load_recommender(folder), exit=_rule(same))
        answers = loaded.recommend(raw, top=LIST, exit=True)
        places = exit_places(kept, same)
        assert sorted(loaded.depths.elements()) == sorted((places + 1).tolist())
        served = [{one.item for one in each} for each in answers]
        assert served == [lists[place][user] for user, place in enumerate(places)]


def _rule(same: int) -> exits.Exit:
    return exits.Exit(
        same=same, metric="HR@10", margin=0.1, level=0.9, users=1, depth=2.0, kept=1.0
    )


def test_an_export_holds_its_rule(folder: Path, small_run: Run, tmp_path: Path) -> None:
    rule = load_recommender(folder).exit
    assert rule is not None
    protocol = small_run.study.protocol
    assert (rule.metric, rule.margin, rule.level) == (protocol.metric, 0.9, protocol.level)
    without = export_trial(small_run.path, TEACHER, tmp_path / "without")
    assert load_recommender(without).exit is None
    with pytest.raises(ValueError, match="exit: expected a rule in the export"):
        load_recommender(without).recommend([["i1"]], exit=True)
    assert '"exit":null' in (without / CARD).read_text()


@pytest.mark.parametrize("trial", ["sasrec-s0", "finetune-d02-s0"])
def test_a_model_with_nothing_to_leave_early(small_run: Run, tmp_path: Path, trial: str) -> None:
    with pytest.raises(ValueError, match="exit: expected a model of ours, of three blocks or more"):
        export_trial(small_run.path, trial, tmp_path / "out", exit_margin=0.1)
    assert not (tmp_path / "out").exists()
