"""Rooflines: what a device can do at most, from its datasheet or measured on the spot.

A piece of work takes at least its FLOPs at the device's peak and its bytes at the memory's
bandwidth, whichever is longer (Williams et al., CACM 2009). That is a bound and a *prediction*,
never a measurement: launches, norms, activations and anything that does not overlap come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from depthprobe.cost.gpus import GPUS, Roof
from depthprobe.cost.timing import seconds

MEASURED = "measured on the spot"
REPEATS = 7  # of which the best counts


def roof_of(device: torch.device, dtype: str) -> Roof:
    """The roof of a device here: its datasheet's if it is a GPU of the table, else measured.

    Args:
        dtype: the dtype of the weights; float32, which the items are scored in, is there too.
    """
    if device.type == "cuda":
        called = torch.cuda.get_device_name(device)
        for roof in GPUS.values():
            if called in roof.devices and dtype in roof.peak:
                return roof
    return measure_roof(device, dtype)


def measure_roof(device: torch.device, dtype: str) -> Roof:
    """What a device reaches: its best matrix product, and its best copy, of some.

    Products of square matrices, 8192 wide on a GPU and 1024 elsewhere; a copy of 1 GiB or 64 MiB.
    On a processor with a larger cache than that the copy runs at the cache's pace, as do weights
    that fit in it.
    """
    side, size = (2**13, 2**30) if device.type == "cuda" else (2**10, 2**26)
    peak = {}
    for name in {dtype, "float32"}:
        kind = getattr(torch, name)
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        peak[name] = 2 * side**3 / _best(partial(torch.matmul, a, b), device)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * size / _best(lambda: target.copy_(source), device)
    return Roof(str(device), peak, bandwidth, float("nan"), MEASURED)


def _best(action: Callable[[], object], device: torch.device) -> float:
    action()
    return min(seconds(action, device) for _ in range(REPEATS))
