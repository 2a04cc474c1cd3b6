"""Interleaving: order, counts, and that the duration of the action is what is measured."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from depthprobe.cost.timing import LEAST, MOST, interleaved, interleaved_for, summarize
from depthprobe.cost.timing import times_faster as faster

CPU = torch.device("cpu")


def test_actions_take_turns_after_the_warm_up() -> None:
    calls: list[str] = []
    actions = {name: (lambda n=name: calls.append(n)) for name in "ab"}
    found = interleaved(actions, warmup=2, rounds=3, device=CPU)
    assert "".join(calls) == "ababababab"
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}


def test_a_longer_action_takes_longer() -> None:
    actions = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.05)}
    found = interleaved(actions, warmup=0, rounds=2, device=CPU)
    assert min(found["long"]) >= 0.05  # sleep never returns early
    assert min(found["short"]) >= 0.001


def test_rounds_fill_the_time_and_are_never_too_few() -> None:
    short = interleaved_for({"a": lambda: None}, 1.0, device=CPU)
    long = interleaved_for({"a": lambda: time.sleep(0.01)}, 0.001, device=CPU)
    assert (len(short["a"]), len(long["a"])) == (MOST, LEAST)


def test_a_summary_by_hand() -> None:
    # P(Bin(10, 1/2) < 2) = 11/1024 <= 2.5 % < P(Bin < 3) = 56/1024: the 2nd value from either end
    found = summarize([10, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    assert (found.p50, found.low, found.high, found.n) == (5.5, 2, 9, 10)
    assert found.p90 == pytest.approx(9.1)
    few = summarize([3.0, 1.0, 2.0])
    assert few.p50 == 2
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    with pytest.raises(ValueError, match="no values"):
        summarize([])


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    drawn = [summarize(rng.exponential(size=15).tolist()) for _ in range(2000)]
    held = np.mean([each.low <= math.log(2) <= each.high for each in drawn])
    assert 0.95 <= held <= 0.975  # 96.5 % by the binomial distribution


def test_faster_is_paired_by_round() -> None:
    noise = [1.0, 5.0, 2.0, 9.0, 1.0, 3.0, 4.0]  # a machine's, the same for both in a round
    found = faster([4 * x for x in noise], noise)
    assert (found.p50, found.low, found.high) == (4, 4, 4)
