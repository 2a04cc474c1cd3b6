"""What an exported model serves is what its trial was measured at, on a log with repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import depthprobe as dp
from depthprobe.runs.export import export_trial
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import METHODS, Protocol, Recipe, Study

USERS, REPEATS = 50, 6  # 12 % of the test targets are items of their history
# a lever's trials bear the names of two methods: test_quantize.py serves them
EXPORTABLE = tuple(name for name, each in METHODS.items() if each.exportable and not each.lever)


def lines() -> list[list[str]]:
    """A user, and items that count up: easily learnt. Of some users the last is the first again."""
    starts = np.random.default_rng(5).integers(40, size=USERS)
    rows = [[f"i{(start + k) % 40}" for k in range(9)] for start in starts]
    repeated = [[*row[:8], row[0] if user < REPEATS else row[8]] for user, row in enumerate(rows)]
    return [[f"u{user:02d}", *row] for user, row in enumerate(repeated)]


@pytest.fixture(scope="module")
def run_of(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``run_of(filter_seen, methods)``: a run on the log, made once."""

    @cache
    def run(
        filter_seen: bool | Literal["auto"],
        methods: tuple[str, ...],
        precision: Literal["auto", "bfloat16"] = "auto",
    ) -> Run:
        folder = tmp_path_factory.mktemp("served")
        log = folder / "log.txt"
        log.write_text("".join(" ".join(line) + "\n" for line in lines()), encoding="utf-8")
        repeated = replace(
            study,
            methods=methods,
            variants={},
            seeds=1,
            layers="2",
            recipe=Recipe(epochs=2, batch_size=16, learning_rate=0.01, precision=precision),
            data=replace(study.data, source=str(log)),
            protocol=Protocol(filter_seen=filter_seen, resamples=100),
        )
        made = run_sweep(repeated, folder / "run", jobs=0)
        assert not made.failed
        assert made.manifest.data.split["repeated_test_targets"] == REPEATS
        return made

    return run


def served(folder: Path) -> np.ndarray:
    """NDCG@10 of each user's last item among what is recommended for those before it."""
    model = dp.load_recommender(folder)
    listed = model.recommend([items[:-1] for _, *items in lines()], top=10)
    places = [[one.item for one in own] for own in listed]
    values = [
        1 / np.log2(own.index(line[-1]) + 2) if line[-1] in own else 0.0
        for own, line in zip(places, lines(), strict=True)
    ]
    return np.array(values)


def compare(run: Run, method: str, folder: Path) -> np.ndarray:
    """What the method's first trial serves, after a look at what was measured and said."""
    record = next(one for one in run.records if one.method == method and one.kept)
    export_trial(run.path, record.id, folder)
    table = run.metrics.query("split == 'test' and protocol == 'full' and slice == 'all'")
    measured = table[table["trial"] == record.id].set_index("metric")["value"]
    values = served(folder)
    assert values.mean() == pytest.approx(measured["NDCG@10"], abs=1e-9)
    assert f"a user's seen items are {run.seen_items}" in (folder / "README.md").read_text()
    return values


@pytest.mark.parametrize("method", EXPORTABLE)
def test_served_is_measured(run_of: Callable[..., Run], method: str, tmp_path: Path) -> None:
    run = run_of(True, EXPORTABLE)
    assert run.seen_items == "left out"
    assert "6 of 50 test targets (12 %)" in " ".join(run.manifest.data.warnings)
    assert not compare(run, method, tmp_path / "model")[:REPEATS].any()


def test_where_targets_repeat_seen_items_stay_in(
    run_of: Callable[..., Run], tmp_path: Path
) -> None:
    run = run_of("auto", ("full",))
    assert run.seen_items == "ranked too"
    compare(run, "full", tmp_path / "model")


def test_served_equals_measured_in_bfloat16(run_of: Callable[..., Run], tmp_path: Path) -> None:
    methods = ("full", "early-exit", "skip", "finetune")
    run = run_of("auto", methods, "bfloat16")
    for method in methods:
        compare(run, method, tmp_path / method)
    model = dp.load_recommender(tmp_path / "full").model
    seen = []
    model.backbone.layers[0].mlp.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    model(torch.tensor([[1, 2]]))
    assert seen == [torch.bfloat16] * len(seen)
    assert seen
