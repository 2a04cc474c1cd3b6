"""Time of what is left, worked by hand: jobs dealt out to workers, and what each task takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.data.prepared import read_data
from depthprobe.data.splits import make_split
from depthprobe.runs.effort import jobs_of, timing_seconds
from depthprobe.runs.forecast import Job, longest_chain, schedule, slowed, without_lost
from depthprobe.runs.pieces import Rates, Sizes, between, padded_length, sizes_of
from depthprobe.runs.plan import plan
from depthprobe.study import (
    Distillation,
    Elastic,
    Protocol,
    Recipe,
    SasRecSettings,
    Study,
    demo_study,
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
    assert schedule(CHAIN, workers, start=4) == seconds + 4


def test_a_free_worker_takes_the_first_that_is_ready() -> None:
    # b 0-2 and a 0-3; c takes b's worker 2-6, d takes a's 3-4: a better order would end at 5
    jobs = [Job("a", 3), Job("b", 2), Job("c", 4), Job("d", 1)]
    assert schedule(jobs, 2) == 6
    # the long one last: 3 of 1 second on 2 workers end at 1, 1 and 2, and it begins at 1
    assert schedule([Job("x", 1), Job("y", 1), Job("z", 1), Job("long", 5)], 2) == 6


def test_what_is_there_already_is_not_waited_for() -> None:
    assert schedule([Job("student", 1, ("full", "features"))], 1) == 1
    assert schedule([], 3, start=4) == 0


def test_no_workers_and_circles_are_refused() -> None:
    with pytest.raises(ValueError, match="0 workers"):
        schedule(CHAIN, 0)
    with pytest.raises(ValueError, match="circle: a, b"):
        schedule([Job("a", 1, ("b",)), Job("b", 1, ("a",))], 2)


def test_the_longest_chain() -> None:
    assert [job.id for job in longest_chain(CHAIN)] == ["sasrec", "full", "student"]
    assert longest_chain([]) == ()


def test_what_has_failed_takes_along_what_needs_it() -> None:
    kept = without_lost(CHAIN, {"full"})
    assert [job.id for job in kept] == ["sasrec", "variant"]
    assert [job.seconds for job in slowed(kept, 2)] == [4, 6]


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
SIZES = Sizes(windows=25, train_length=5.0, test=5, test_length=5.0, validation=4)
RATES = Rates(
    batch=10,
    step={"train:1": 1.0, "train:3": 3.0, "train:sasrec": 0.5},
    encode={"1": 0.1, "3": 0.3, "sasrec": 0.05},
    score=0.0,
)


def seconds_of(study: Study, rates: Rates = RATES, **options: object) -> dict[str, float]:
    jobs = jobs_of(study, plan(study, 3), SIZES, rates, **options)  # type: ignore[arg-type]
    return {job.id: job.seconds for job in jobs}


def test_steps_epochs_and_passes() -> None:
    # 25 windows are 3 batches of 10; 4 users validate an epoch, 5 test at the end
    assert seconds_of(STUDY) == pytest.approx(
        {
            "popularity-s0": 0,
            "sasrec-s0": 3 * (3 * 0.5 + 4 * 0.05) + 5 * 0.05,
            "full-d03-s0": 2 * (3 * 3 + 4 * 0.3) + 5 * 0.3,
            "early-exit-s0": 5 * 0.3,
            "skip-s0": 5 * 0.3 * 5 / 3,  # blocks 0 1, 0 2 and 1 2: five, of three a pass
            "finetune-d02-s0": 2 * (3 * 2 + 4 * 0.2) + 5 * 0.2,
            "features-s0-every": 2 * 25 * 0.3,
            "distill-d02-s0": 2 * (3 * 2 * 1.25 + 4 * 0.2) + 5 * 0.2,
        }
    )


def test_scores_count_where_users_are_ranked() -> None:
    scored = seconds_of(STUDY, replace(RATES, score=0.01))
    plain = seconds_of(STUDY)
    more = {name: seconds - plain[name] for name, seconds in scored.items()}
    assert more["popularity-s0"] == pytest.approx(5 * 0.03)
    assert more["full-d03-s0"] == pytest.approx((2 * 4 + 5) * 0.03)
    assert more["early-exit-s0"] == pytest.approx(5 * 4 * 0.03)  # depths 0 to 2, and the whole
    assert more["skip-s0"] == pytest.approx(5 * 3 * 0.03)


def test_features_are_made_once_a_seed_or_are_there() -> None:
    study = replace(STUDY, layers="1,2", methods=("distill",), seeds=2)
    jobs = {job.id: job for job in jobs_of(study, plan(study, 3), SIZES, RATES)}
    assert sum(name.startswith("features") for name in jobs) == 2
    assert jobs["features-s1-every"].needs == ("full-d03-s1",)
    assert jobs["distill-d01-s1"].needs == ("full-d03-s1", "features-s1-every")
    there = seconds_of(study, there=frozenset({"features-s0-every"}))
    assert "features-s0-every" not in there
    assert "features-s1-every" in there


@pytest.mark.parametrize(
    ("settings", "factor", "more"),
    [
        (Distillation(), 1.25, 0.0),
        (Distillation(logits=1.0), 2.0, 0.0),
        (Distillation(features="online"), 1.25, 10 * 0.3),  # the teacher, once a step
    ],
)
def test_a_students_step_that_was_not_timed(
    settings: Distillation, factor: float, more: float
) -> None:
    study = replace(STUDY, distillation=settings)
    assert RATES.step_of(study, "distill", 1, 3) == pytest.approx(factor + more)
    timed = replace(RATES, step={**RATES.step, "distill:1": 7.0})
    assert timed.step_of(study, "distill", 1, 3) == 7


def test_processes_share_an_epoch() -> None:
    alone, three = (seconds_of(STUDY, processes=n)["full-d03-s0"] for n in (1, 3))
    assert alone - three == pytest.approx(2 * (3 - 1) * 3)  # 25 windows in one step of 30


def test_a_budget_of_compute_buys_epochs() -> None:
    study = replace(STUDY, budget="compute", methods=("finetune", "elastic"), elastic=Elastic())
    by_flops = replace(RATES, flops={1: 10.0, 2: 20.0, 3: 40.0})
    found = seconds_of(study, by_flops)
    an_epoch = 3 * 2 + 4 * 0.2
    assert found["finetune-d02-s0"] == pytest.approx(4 * an_epoch + 5 * 0.2)  # 2 epochs x 40 / 20
    # the compute of two depths: the whole and 2
    assert found["elastic-s0"] == pytest.approx(4 * (3 * 3 + 4 * 0.3) + 5 * 0.3)
    # where FLOPs can't be counted, by the seconds of a step: 3 / 2
    assert seconds_of(study)["finetune-d02-s0"] == pytest.approx(3 * an_epoch + 5 * 0.2)


def test_every_method_takes_some_time(study: Study) -> None:
    rates = replace(RATES, score=0.01)
    jobs = jobs_of(study, plan(study, 3), SIZES, rates)
    assert all(np.isfinite(job.seconds) and job.seconds > 0 for job in jobs)
    assert {job.method for job in jobs} == set(study.methods)
    assert schedule(jobs, 2) < sum(job.seconds for job in jobs)
    removals = [job.id for job in jobs if job.id.startswith("removal")]
    assert removals == ["removal-s0", "removal-s1"]  # of `greedy` and `heal:greedy`


def test_the_timing_before_the_trials() -> None:
    study = replace(STUDY, cost=replace(STUDY.cost, batch_size=10, warmup=1, rounds=4))
    rounds = [0.5 + 10 * 0.05]  # SASRec
    assert timing_seconds(study, 3, RATES, whole=False) == pytest.approx(5 * sum(rounds))
    rounds += [2 + 2 * 1.25 + 10 * 0.2, 3 + 3 + 10 * 0.3]  # two blocks with a student, all three
    assert timing_seconds(study, 3, RATES, whole=True) == pytest.approx(5 * sum(rounds))


def test_a_depth_between_others() -> None:
    assert between({"train:1": 1.0, "train:3": 3.0, "train:sasrec": 9.0}, "train:", 2) == 2
    assert between({"2": 1.0, "sasrec": 9.0}, "", 1) == 1


def test_lengths_with_their_padding() -> None:
    assert padded_length(np.array([1, 4, 4, 3]), 2) == (4 + 4 + 3 + 3) / 4
    assert np.isnan(padded_length(np.array([]), 2))


def test_sizes_are_those_of_the_windows() -> None:
    study = demo_study()
    split = make_split(read_data(study.data), Protocol())
    found = sizes_of(split, study)
    assert (found.windows, found.test, found.validation) == (2500, 2500, 1000)
    longest = study.data.max_history + 1
    windows = [split.train_history(user, longest) for user in range(2500)]
    mean = sum(len(window) - 1 for window in windows) / 2500
    assert mean < found.train_length < 1.2 * mean
