"""The times of a run and the estimate of a sweep: jobs, units and work, worked by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.cost.flops import UncountableError
from depthprobe.methods import Sizes
from depthprobe.runs.context import Context
from depthprobe.runs.estimate import (
    Job,
    Units,
    jobs_of,
    longest_chain,
    schedule,
    units_of,
    without_lost,
)
from depthprobe.runs.plan import plan
from depthprobe.runs.store import Run
from depthprobe.runs.timing import _middle, _typical_step, covers, measure, timing_of
from depthprobe.runs.training import _counted
from depthprobe.study import (
    Elastic,
    Recipe,
    SasRecSettings,
    Study,
)

CHAIN = [
    Job("sasrec", 2),
    Job("full", 5, ("sasrec",)),
    Job("variant", 3, ("sasrec",)),
    Job("student", 1, ("full",)),
]


@pytest.mark.parametrize(
    ("workers", "seconds"),
    [
        (1, 11),  # everything, one after the other
        (2, 8),  # sasrec 0-2, full 2-7 beside variant 2-5, student 7-8
        (9, 8),  # sasrec, full, student: no worker helps
    ],
)
def test_a_chain_is_respected(workers: int, seconds: float) -> None:
    assert schedule(CHAIN, workers) == seconds


def test_a_free_worker_takes_the_first_that_is_ready() -> None:
    # b 0-2 and a 0-3; c takes b's worker 2-6, d takes a's 3-4: a better order would end at 5
    jobs = [Job("a", 3), Job("b", 2), Job("c", 4), Job("d", 1)]
    assert schedule(jobs, 2) == 6
    # the long one last: 3 of 1 second on 2 workers end at 1, 1 and 2, and it begins at 1
    assert schedule([Job("x", 1), Job("y", 1), Job("z", 1), Job("long", 5)], 2) == 6


def test_what_is_there_already_is_not_waited_for() -> None:
    assert schedule([Job("student", 1, ("full", "features"))], 1) == 1
    assert schedule([], 3) == 0


def test_no_workers_and_circles_are_refused() -> None:
    with pytest.raises(ValueError, match="no job can begin: sasrec"):
        schedule(CHAIN, 0)
    with pytest.raises(ValueError, match="no job can begin: a, b"):
        schedule([Job("a", 1, ("b",)), Job("b", 1, ("a",))], 2)


def test_the_longest_chain() -> None:
    assert [job.id for job in longest_chain(CHAIN)] == ["sasrec", "full", "student"]
    assert longest_chain([]) == ()


def test_what_has_failed_takes_along_what_needs_it() -> None:
    tasks = plan(Study(layers="1", methods=("sasrec", "full", "finetune", "skip"), seeds=1), 2)
    kept = without_lost(tasks, {"full-d02-s0"})
    assert [task.id for task in kept] == ["sasrec-s0", "finetune-d01-s0"]


@given(
    st.lists(st.tuples(st.floats(0, 10), st.sets(st.integers(0, 7))), max_size=8),
    st.integers(1, 4),
)
def test_bounds_of_list_scheduling(drawn: list[tuple[float, set[int]]], workers: int) -> None:
    jobs = [
        Job(str(i), seconds, tuple(str(n) for n in needs if n < i))
        for i, (seconds, needs) in enumerate(drawn)
    ]
    found, work = schedule(jobs, workers), sum(job.seconds for job in jobs)
    chain = sum(job.seconds for job in longest_chain(jobs))
    assert found >= max(chain, work / workers) - 1e-9
    assert found <= work / workers + (1 - 1 / workers) * chain + 1e-9  # Graham 1966


FEW = Recipe(epochs=2, batch_size=10)
STUDY = Study(
    layers="2",
    methods=("popularity", "sasrec", "full", "early-exit", "skip", "finetune", "distill"),
    seeds=1,
    recipe=FEW,
    sasrec=SasRecSettings(recipe=replace(FEW, epochs=3)),
)
SIZES = Sizes(windows=25, test=5, validation=4)
SECONDS = {
    **{"train:1": 1.0, "train:3": 3.0, "train:sasrec": 0.5},
    **{"encode:1": 0.1, "encode:3": 0.3, "encode:sasrec": 0.05},
    **{"distill:1": 1.25, "elastic:3": 3.0},
}
UNITS = Units(batch=10, seconds=SECONDS, score=0.0)


def seconds_of(study: Study, units: Units = UNITS, **options: object) -> dict[str, float]:
    jobs = jobs_of(study, plan(study, 3), SIZES, units, **options)  # type: ignore[arg-type]
    return {job.id: job.seconds for job in jobs}


def test_steps_epochs_and_passes() -> None:
    # 25 windows are 3 batches of 10; 4 users validate an epoch, 5 test at the end
    assert seconds_of(STUDY) == pytest.approx(
        {
            "popularity-s0": 0,
            "sasrec-s0": 3 * (3 * 0.5 + 4 * 0.05) + 5 * 0.05,
            "full-d03-s0": 2 * (3 * 3 + 4 * 0.3) + 5 * 0.3,
            "early-exit-s0": (4 + 5) * 0.3,
            "skip-s0": 5 * 0.3 * 5 / 3,  # blocks 0 1, 0 2 and 1 2: five, of three a pass
            "finetune-d02-s0": 2 * (3 * 2 + 4 * 0.2) + 5 * 0.2,
            "features-s0-every": 2 * 25 * 0.3,
            "distill-d02-s0": 2 * (3 * 2 * 1.25 + 4 * 0.2) + 5 * 0.2,
        }
    )


def test_scores_count_where_users_are_ranked() -> None:
    scored = seconds_of(STUDY, replace(UNITS, score=0.01))
    plain = seconds_of(STUDY)
    more = {name: seconds - plain[name] for name, seconds in scored.items()}
    assert more["popularity-s0"] == pytest.approx(5 * 0.03)
    assert more["full-d03-s0"] == pytest.approx((2 * 4 + 5) * 0.03)
    assert more["early-exit-s0"] == pytest.approx((4 + 5) * 4 * 0.03)  # depths 0 to 2, the full one
    assert more["skip-s0"] == pytest.approx(5 * 3 * 0.03)


def test_features_are_made_once_a_seed_or_are_there() -> None:
    study = replace(STUDY, layers="1,2", methods=("distill",), seeds=2)
    jobs = {job.id: job for job in jobs_of(study, plan(study, 3), SIZES, UNITS)}
    assert sum(name.startswith("features") for name in jobs) == 2
    assert jobs["features-s1-every"].needs == ("full-d03-s1",)
    assert jobs["distill-d01-s1"].needs == ("full-d03-s1", "features-s1-every")
    there = seconds_of(study, there={"features-s0-every"})
    assert "features-s0-every" not in there
    assert "features-s1-every" in there


def test_processes_share_an_epoch() -> None:
    alone, three = (seconds_of(STUDY, processes=n)["full-d03-s0"] for n in (1, 3))
    assert alone - three == pytest.approx(2 * (3 - 1) * 3)  # 25 windows in one step of 30


def test_a_budget_of_compute_buys_epochs() -> None:
    study = replace(STUDY, budget="compute", methods=("finetune", "elastic"), elastic=Elastic())
    found = seconds_of(study)
    an_epoch = 3 * 2 + 4 * 0.2
    assert found["finetune-d02-s0"] == pytest.approx(3 * an_epoch + 5 * 0.2)  # 2 epochs x 3 / 2
    # the compute of two depths: the full one and 2
    assert found["elastic-s0"] == pytest.approx(4 * (3 * 3 + 4 * 0.3) + 5 * 0.3)


def test_a_larger_batch_takes_longer() -> None:
    # the rig ran out of memory with ten windows
    units = replace(UNITS, batch=5)
    found, usual = seconds_of(STUDY, units), seconds_of(STUDY)
    assert found["full-d03-s0"] - usual["full-d03-s0"] == pytest.approx(2 * 3 * 3)
    assert found["sasrec-s0"] == usual["sasrec-s0"]


def test_units_of_depths_that_were_not_timed() -> None:
    assert UNITS.of("train", 2) == 2
    assert UNITS.of("distill", 2) == 2 * 1.25  # 1.25 plain steps, as at depth 1
    assert UNITS.of("encode", 2) == pytest.approx(0.2)  # each block adds the same
    # the deepest took too long to be timed: each block goes on as the last ones
    assert UNITS.of("encode", 6) == pytest.approx(0.6)
    assert UNITS.of("distill:other", 2) == 2
    assert np.isnan(replace(UNITS, seconds={}).of("encode", 2))


def test_units_are_medians() -> None:
    measured = {
        "conditions": {"batch": 10, "train_batch": 16},
        "seconds": {"encode:2": [1.0, 9.0, 2.0], "train:2": [3.0], "score": [0.5]},
    }
    units = units_of(measured)
    assert (units.seconds["encode:2"], units.seconds["train:2"]) == (2 / 10, 3)
    assert (units.score, units.batch) == (0.05, 16)


def test_every_method_takes_some_time(study: Study) -> None:
    jobs = jobs_of(study, plan(study, 3), SIZES, replace(UNITS, score=0.01))
    assert all(np.isfinite(job.seconds) and job.seconds > 0 for job in jobs)
    assert {job.method for job in jobs} == set(study.methods)
    assert schedule(jobs, 2) < sum(job.seconds for job in jobs)
    removals = [job.id for job in jobs if job.id.startswith("removal")]
    assert removals == ["removal-s0", "removal-s1"]  # of `greedy` and `heal:greedy`


TOP = "distill:top"  # it keeps one block that its name lists


@pytest.fixture(scope="module")
def context(small_run: Run) -> Context:
    return Context(small_run.path, small_run.study)


def test_a_run_times_what_its_methods_need(small_run: Run, context: Context) -> None:
    measured = json.loads((small_run.path / "shared" / "timing.json").read_text())
    own = {"distill", "distill:logits", TOP}
    assert set(measured["seconds"]) == {
        *(f"{kind}:{d}" for kind in ("encode", "latency", "train") for d in (1, 2, 3)),
        *(f"{name}:{depth}" for name in own for depth in (1, 2) if (name, depth) != (TOP, 2)),
        *("elastic:3", "encode:sasrec", "train:sasrec", "score"),
    }
    assert {len(values) for values in measured["seconds"].values()} == {3}
    assert measured["conditions"]["train_batch"] == 16
    assert measured["peak_bytes"] > 1e7
    assert covers(measured, context, 3)


def test_a_step_is_timed_in_the_parts_that_a_training_computes(context: Context) -> None:
    whole, parts = (
        _typical_step(context, 16, replace(context.study.recipe, tokens=most)) for most in (0, 30)
    )
    assert len(whole) == 1
    assert len(parts) > 1
    assert max(part.inputs.numel() for part in parts) <= 30
    assert sorted(np.concatenate([part.chosen for part in parts])) == sorted(whole[0].chosen)


def test_methods_outside_the_study_are_not_timed(context: Context) -> None:
    few = Context(context.folder, replace(context.study, methods=("full", "finetune"), layers="1"))
    measured = measure(few, 3, seconds=0.01)
    kinds = {name.rpartition(":")[0] for name in measured["seconds"]}
    assert kinds == {"encode", "latency", "train", ""}
    assert covers(measured, few, 3)
    assert not covers(measured, context, 3)
    none = Context(context.folder, replace(context.study, methods=("popularity",)))
    assert set(measure(none, 3, seconds=0.01)["seconds"]) == {"score"}


def test_what_takes_too_long_is_not_measured_again(context: Context) -> None:
    few = Context(context.folder, replace(context.study, methods=("full",), layers="1"))
    there = ("encode:1", "train:1", "train:3", "encode:sasrec")
    measured: dict[str, Any] = {"seconds": dict.fromkeys(there, [1.0])}
    assert not covers(measured, few, 3)
    assert covers(measured | {"left_out": ["encode:3"]}, few, 3)


def test_times_of_a_trial_are_those_of_its_step(study: Study) -> None:
    kinds = ("encode", "latency", "train", "distill", "distill:top")
    seconds = {f"{kind}:{d}": [0.1] for kind in kinds for d in (1, 2, 3)}
    seconds |= {"elastic:3": [0.5], "score": [0.2], "encode:sasrec": [0.3]}
    measured: dict[str, Any] = {"seconds": seconds}
    trials = {trial.id: trial for task in plan(study, 3) for trial in task.trials}
    seconds["train:2"] = [0.8]
    found: dict[str, Any] = {name: timing_of(trials[name], measured, study) for name in trials}
    assert "train_step" in found["distill-top-d01-s0"]
    assert found["finetune-d02-s0"]["train_step"] == {"seconds": [0.8]}
    assert found["elastic-d02-s0"]["train_step"] == {"seconds": [0.5]}
    assert "train_step" not in found["skip-b00-s0"]
    assert set(found["sasrec-s0"]) == {"encode", "score"}
    assert found["popularity-s0"] is None
    top = replace(study.variants["top"], recipe=replace(study.recipe, batch_size=4))
    own = replace(study, variants={**study.variants, "top": top})
    other: Any = timing_of(trials["distill-top-d01-s0"], measured, own)
    assert "train_step" not in other


def test_only_a_kernel_that_can_not_run_leaves_flops_out() -> None:
    def fail(error: Exception) -> int:
        raise error

    assert _counted(lambda: 3) == 3
    assert _counted(lambda: fail(UncountableError("a kernel of its own"))) is None
    with pytest.raises(ValueError, match="a bug"):
        _counted(lambda: fail(ValueError("a bug")))


def test_the_batch_that_is_timed_has_the_mean_length() -> None:
    # batches of 10 10, 4 4, 4 1 and 1: 5.3 places a row
    assert _middle([10, 4, 1, 10, 4, 4, 1], 2).tolist() == [1, 4]
