"""Energy of an action, from the GPU's own counter; None where there is none, never 0.

NVML counts what the whole board has drawn since the driver was loaded, idle power included
(``nvmlDeviceGetTotalEnergyConsumption``, Volta and later). It is read through ``nvidia-ml-py``,
if that is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from depthprobe.cost.timing import seconds

LONG = 2.0  # seconds; the counter moves some ten times a second


def joules(action: Callable[[], object], device: torch.device) -> float | None:
    """Joules of one call, the mean over as many as take two seconds; None where unmeasurable."""
    read = _counter(device)
    if read is None:
        return None
    once = seconds(action, device)
    calls = max(1, round(LONG / max(once, 1e-6)))

    def repeat() -> None:
        for _ in range(calls):
            action()

    before = read()
    seconds(repeat, device)
    drawn = read() - before
    return drawn / calls if drawn > 0 else None


def why_unmeasured(device: torch.device) -> str | None:
    """Why there is no energy to report; None where it is measured."""
    if device.type != "cuda":
        return "no counter of a GPU"
    if _nvml() is None:
        return "needs the package nvidia-ml-py"
    return None if _counter(device) else "this GPU has no counter, or hides it"


def _counter(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the GPU's counter, in joules."""
    nvml = _nvml() if device.type == "cuda" else None
    if nvml is None:
        return None

    def read() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # from millijoules

    try:
        nvml.nvmlInit()
        # NVML counts all boards, CUDA those that CUDA_VISIBLE_DEVICES leaves: the UUID is the same
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        read()
    except nvml.NVMLError:
        return None
    return read


def _nvml() -> Any:
    """The bindings of nvidia-ml-py, None where they are not installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None
