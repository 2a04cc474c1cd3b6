"""Time: warmed up, synchronised, interleaved, raw values kept; medians with their intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# rounds of a measurement: fewer give no interval, more are of no use
LEAST, MOST = 7, 100
WARMUP = 10  # rounds, where there is time for them; 2 elsewhere


@dataclass(frozen=True)
class Summary:
    """Of n values: the median and its 95 % interval (NaN below 6 values), and the 90th percentile.

    In the unit of the values.
    """

    p50: float
    p90: float
    low: float
    high: float
    n: int


def summarize(values: Sequence[float]) -> Summary:
    """Median, its interval and p90 of repeated measurements.

    The interval is the distribution-free one between two order statistics: the k-th value from
    below and from above, where k is the largest with ``P(Bin(n, 1/2) < k) <= 2.5 %``. It assumes
    independent rounds and no shape of their distribution, which for times is far from normal.

    Raises:
        ValueError: without a value.
    """
    if not values:
        raise ValueError("no values to summarize")
    ordered, n = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    below, k = 0.5**n, 0  # P(Bin < k + 1)
    while below <= 0.025:
        k += 1
        below += math.comb(n, k) * 0.5**n
    low, high = (ordered[k - 1], ordered[n - k]) if k else (math.nan, math.nan)
    p50, p90 = np.quantile(ordered, [0.5, 0.9])
    return Summary(float(p50), float(p90), float(low), float(high), n)


def times_faster(slow: Sequence[float], fast: Sequence[float]) -> Summary:
    """How many times faster one action is, from the rounds that both were measured in.

    The median over rounds of the ratio within a round, so that a slow round counts in both.
    """
    return summarize([a / b for a, b in zip(slow, fast, strict=True)])


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


def interleaved_for(
    actions: Mapping[str, Callable[[], object]], budget: float, *, device: torch.device
) -> dict[str, list[float]]:
    """:func:`interleaved` for about so many seconds: 7 to 100 rounds, after 2 to 12 of warm-up.

    Never fewer than 7, however long they take: an interval needs them.
    """
    # the first call of an action compiles and allocates; the second says how long a round takes
    trial = interleaved(actions, warmup=1, rounds=1, device=device)
    a_round = sum(values[0] for values in trial.values())
    rounds = min(MOST, max(LEAST, int(budget / a_round)))
    warmup = WARMUP if 2 * WARMUP * a_round < budget else 0
    return interleaved(actions, warmup=warmup, rounds=rounds, device=device)


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
