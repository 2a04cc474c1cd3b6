"""Points: the same numbers as a direct computation from the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from depthprobe.evaluation.statistics import mean_interval, ratio_interval
from depthprobe.report.numbers import FULL, SAMPLED, Point, Ranks, Summary, _timing, summarise
from depthprobe.runs.records import Costs, Record, Rounds

Make = Callable[..., Any]


def ndcg(run: Any, trials: tuple[str, ...], protocol: str = FULL) -> float:
    users = run.users
    ranks = users[users["trial"].isin(trials) & (users["protocol"] == protocol)]["rank"]
    return float(np.mean([(rank <= 10) / np.log2(rank + 1) for rank in ranks]))


def point_of(summary: Summary, method: str, depth: int) -> Point:
    return next(point for point in summary.of(method) if point.depth == depth)


def test_accuracy_is_the_mean_over_users_and_seeds(run: Any, summary: Summary) -> None:
    for point in summary.points:
        for protocol in (FULL, SAMPLED):
            interval = point.accuracy[protocol, "NDCG@10"]
            assert interval.value == pytest.approx(ndcg(run, point.trials, protocol))
            assert interval.low <= interval.value <= interval.high


def test_every_planned_point_is_there_once(run: Any, summary: Summary) -> None:
    done = run.trials[run.trials["status"] == "done"]
    assert len(summary.points) == len(done.groupby(["method", "depth", "kept", "removed"]))
    assert sum(len(point.trials) for point in summary.points) == len(done)
    assert len(summary.failed) == 1


def test_ratios_use_the_seeds_of_both(run: Any, summary: Summary) -> None:
    assert summary.teacher is not None
    point = point_of(summary, "random-init", 1)  # its seed 1 failed
    assert point.seeds == (0,)
    expected = ndcg(run, point.trials) / ndcg(run, summary.teacher.of_seeds([0]))
    assert point.ratio[FULL, "NDCG@10"].value == pytest.approx(expected)
    (popularity,) = summary.of("popularity")  # it knows no seed
    expected = ndcg(run, popularity.trials) / ndcg(run, summary.teacher.trials)
    assert popularity.ratio[FULL, "NDCG@10"].value == pytest.approx(expected)


def test_intervals_are_those_of_the_statistics(summary: Summary) -> None:
    point, teacher = point_of(summary, "distill", 2), summary.teacher
    assert teacher is not None
    own, theirs = summary.ranks.values(SAMPLED, "HR@5", [point.trials, teacher.trials])
    arms = summary.ranks.values(FULL, "NDCG@10", [point.trials, teacher.trials])
    for found, expected in (
        (point.accuracy[SAMPLED, "HR@5"], mean_interval(own)),
        (point.ratio[SAMPLED, "HR@5"], ratio_interval(own, theirs)),
        (summary.against(point, teacher), ratio_interval(*arms)),
    ):
        assert found is not None
        assert astuple(found) == pytest.approx(astuple(expected), abs=1e-12)


def test_only_users_that_both_ranked_are_compared() -> None:
    frame = pd.DataFrame(
        {"trial": ["a"] * 3 + ["b"] * 3, "user": [3, 1, 2, 2, 4, 3], "protocol": FULL,
         "rank": [1.0, 20.0, 5.0, 2.0, 7.0, 30.0]}
    )  # fmt: skip
    first, second = Ranks(frame).values(FULL, "HR@1", [["a"], ["b"]])
    assert first.tolist() == [[0.0, 1.0]]  # users 2 and 3
    assert second.tolist() == [[0.0, 0.0]]


def test_a_target_that_is_never_served_is_a_miss_and_not_left_out() -> None:
    frame = pd.DataFrame(
        {"trial": "a", "user": [1, 2, 3], "protocol": FULL, "rank": [1.0, np.inf, 1.0]}
    )
    ranks = Ranks(frame)
    assert ranks.users(["a"]) == 3
    (values,) = ranks.values(FULL, "NDCG@10", [["a"]])
    assert values.tolist() == [[1.0, 0.0, 1.0]]


def test_times_are_medians_of_rounds(run: Any, summary: Summary) -> None:
    point = point_of(summary, "finetune", 4)
    timing = next(record for record in run.records if record.id == point.trials[0]).costs.timing
    both = np.add(timing["encode"].seconds, timing["score"].seconds)
    assert point.time["inference"].value == pytest.approx(1e3 * np.median(both))
    assert point.speed["training"].value > 2


def test_no_time_is_made_up(summary: Summary) -> None:
    assert "inference" not in point_of(summary, "early-exit", 5).time  # that depth is not timed
    assert "training" not in point_of(summary, "early-exit", 4).time  # it is not trained
    assert summary.of("popularity")[0].cost("inference") is None


def test_failed_seed_leaves_a_comparison_over_the_other(make: Make, tmp_path: Path) -> None:
    summary = summarise(make(tmp_path, users=150, failing=[("distill", 4, 1)]))
    assert summary.seeds_compared == (0,)
    assert not summary.left_out
    assert point_of(summary, "finetune", 4).seeds == (0, 1)


def test_the_deciding_interval_is_the_one_shown(summary: Summary) -> None:
    assert summary.sufficiency is not None
    for row in summary.sufficiency.rows:
        assert point_of(summary, row.method, row.depth).ratio[FULL, "NDCG@10"] == row.kept


def test_a_method_that_is_not_registered_is_shown_and_no_answer(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full", "finetune", "distill"})
    run.trials["method"] = run.trials["method"].replace("distill", "plugin")
    summary = summarise(run)
    assert summary.of("plugin")
    assert {method for method, _ in summary.candidates} == {"finetune"}


def test_metric_margin_and_level_of_the_answer_can_be_changed(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=120)
    usual, other = summarise(run), summarise(run, margin=0.5, level=0.8, headline="HR@20")
    assert (other.headline, other.margin, other.level) == ("HR@20", 0.5, 0.8)
    wide, narrow = (one.of("full")[0].accuracy[FULL, "NDCG@10"] for one in (usual, other))
    assert wide.value == narrow.value
    assert wide.low < narrow.low
    teacher = other.of("full")[0]
    values = other.ranks.values(FULL, "HR@20", [teacher.trials])[0]
    assert teacher.accuracy[FULL, "HR@20"].value == values.mean()
    with pytest.raises(ValueError, match="expected HR@K"):
        summarise(run, headline="recall")


def test_a_measurement_that_several_seeds_share_counts_once() -> None:
    trials = {seed: f"finetune-d01-s{seed}" for seed in range(3)}
    records = {
        trial: Record(
            id=trial,
            method="finetune",
            seed=seed,
            status="done",
            costs=Costs(timing={"train_step": Rounds(seconds=[9.0 if seed == 2 else 1.0] * 4)}),
        )
        for seed, trial in trials.items()
    }
    time, _ = _timing(trials, {}, records)
    assert time["training"].value == pytest.approx(5000)
