"""Time: warmed up, synchronised, interleaved, raw values kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    *,
    warmup: int,
    rounds: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds of every action in every round, actions in turn (A B C A B C ...).

    In turn, so that a machine that slows down slows all of them: round i of one pairs with round i
    of another. On a GPU each action is timed between two events, elsewhere by the clock.
    """
    for _ in range(warmup):
        for action in actions.values():
            action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(seconds(action, device))
    return times


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, all of its work on the device included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        action()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    if device.type == "mps":
        torch.mps.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - began
