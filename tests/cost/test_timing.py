"""Interleaving: order, counts, and that the duration of the action is what is measured."""

from __future__ import annotations

import time

import torch

from depthprobe.cost.timing import interleaved

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
