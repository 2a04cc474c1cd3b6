"""Several learning rates: each is tried at seed 0, the best is used for all seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from depthprobe.errors import BadInput
from depthprobe.methods import Sizes
from depthprobe.runs import training
from depthprobe.runs.estimate import Units, jobs_of
from depthprobe.runs.plan import plan
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Recipe, Study
from depthprobe.training.checkpoint import Checkpoint
from depthprobe.training.loop import DivergedError

RATES = (1e-4, 0.02, 0.005)


@pytest.fixture
def tuned(study: Study) -> Study:
    return replace(
        study,
        methods=("sasrec", "finetune", "random-init"),
        layers="1",
        variants={},
        recipe=replace(study.recipe, learning_rate=RATES, epochs=2),
    )


def training_of(run: Run, trial: str) -> Any:
    return run.record(trial).training


def test_the_best_rate_of_seed_0_is_used_for_all_seeds(tuned: Study, tmp_path: Path) -> None:
    run = run_sweep(tuned, tmp_path / "run", jobs=0)
    for trial in ("finetune-d01", "random-init-d01", "random-init-d03"):
        found = training_of(run, f"{trial}-s0")
        assert list(found.tried) == ["0.0001", "0.02", "0.005"]
        best = max(found.tried, key=found.tried.get)
        assert found.learning_rate == float(best)
        assert max(found.validation) == found.tried[best]
        assert found.tuning_seconds > 0
        other = training_of(run, f"{trial}-s1")
        assert (other.learning_rate, other.tried) == (float(best), {})
    assert training_of(run, "sasrec-s0").tried == {}  # it has a recipe of its own
    # the same as if that rate had been the only one
    rate = training_of(run, "finetune-d01-s0").learning_rate
    alone = replace(tuned, methods=("finetune",), recipe=replace(tuned.recipe, learning_rate=rate))
    single = run_sweep(alone, tmp_path / "single", jobs=0)
    chosen = run.users[run.users["trial"].str.startswith(("finetune", "sasrec"))]
    pd.testing.assert_frame_equal(single.users, chosen.reset_index(drop=True))
    assert not [*(run.path / "checkpoints").glob("*")]


def test_other_seeds_wait_for_the_first(tuned: Study) -> None:
    recipe = replace(tuned.sasrec.recipe, learning_rate=RATES)
    own = replace(tuned, methods=("full", "elastic"), sasrec=replace(tuned.sasrec, recipe=recipe))
    needs = {task.id: task.needs for task in plan(own, 3)}
    assert needs["full-d03-s0"] == ("sasrec-s0",)
    assert needs["full-d03-s1"] == ("sasrec-s1", "full-d03-s0")
    assert needs["sasrec-s1"] == ("sasrec-s0",)
    assert needs["elastic-s1"] == ("sasrec-s1", "elastic-d03-s0")


def test_a_rate_that_diverges_is_told_and_is_not_the_best(
    tuned: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.fit

    def fit(*arguments: Any, recipe: Recipe, **options: Any) -> Any:
        if recipe.learning_rate == RATES[1]:
            for weight in filter(lambda w: w.requires_grad, arguments[0].parameters()):
                weight.data.fill_(math.nan)
            raise DivergedError("the loss is nan at step 1")
        return real(*arguments, recipe=recipe, **options)

    monkeypatch.setattr(training, "fit", fit)
    few = replace(tuned, methods=("finetune",), seeds=1)
    run = run_sweep(few, tmp_path / "run", jobs=0)
    found = training_of(run, "finetune-d01-s0")
    assert found.tried["0.02"] is None
    assert found.learning_rate != 0.02
    one = replace(few, recipe=replace(few.recipe, learning_rate=(RATES[1],)))
    run = run_sweep(one, tmp_path / "one", jobs=0)
    assert run.failed[0][0] == "finetune-d01-s0"


def test_a_search_that_was_cut_short_goes_on(
    tuned: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        pass

    few = replace(tuned, methods=("finetune",), seeds=1)
    expected = training_of(run_sweep(few, tmp_path / "whole", jobs=0), "finetune-d01-s0")
    monkeypatch.setattr(Checkpoint, "is_due", lambda self: self.path is not None)
    real, begun = training.fit, list[float]()

    def fit(*arguments: Any, recipe: Recipe, **options: Any) -> Any:
        if recipe.rates == RATES[2:] and not begun:
            begun.append(recipe.rates[0])
            raise Stopped
        return real(*arguments, recipe=recipe, **options)

    monkeypatch.setattr(training, "fit", fit)
    with pytest.raises(Stopped):
        run_sweep(few, tmp_path / "run", jobs=0)
    files = {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()}
    assert files == {f"finetune-d01-s0.{rate:g}.safetensors" for rate in RATES[:2]}
    found = training_of(run_sweep(few, tmp_path / "run", jobs=0), "finetune-d01-s0")
    assert (found.tried, found.learning_rate) == (expected.tried, expected.learning_rate)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_estimate_counts_each_rate_at_seed_0(tuned: Study) -> None:
    seconds = {f"{kind}:{depth}": 1.0 for kind in ("train", "encode") for depth in (1, 3, "sasrec")}
    units = Units(batch=16, seconds=seconds, score=0.0)
    sizes = Sizes(windows=32, validation=0, test=0)
    one = replace(tuned, recipe=replace(tuned.recipe, learning_rate=0.1))
    found, usual = (
        {job.id: job.seconds for job in jobs_of(each, plan(each, 3), sizes, units)}
        for each in (tuned, one)
    )
    assert found["finetune-d01-s0"] == 3 * usual["finetune-d01-s0"]
    assert found["finetune-d01-s1"] == usual["finetune-d01-s1"]


def test_rates_that_are_none() -> None:
    for wrong in ([], [0.1, 0.1], [0.1, 0], ["high"]):
        with pytest.raises(BadInput, match="learning_rate"):
            Recipe(learning_rate=wrong)  # type: ignore[arg-type]
