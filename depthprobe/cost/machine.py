"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers


def machine(device: torch.device) -> dict[str, Any]:
    """The device, its name, the threads and the versions that a time holds for.

    ``busy``: processes that wanted a core in the last minute, by core; NaN where no system tells.
    """
    cores = os.cpu_count() or 1
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "busy": os.getloadavg()[0] / cores if hasattr(os, "getloadavg") else float("nan"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def device_name(device: torch.device) -> str:
    """What the GPU or the processor is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def processor_name() -> str:
    """What the processor is called."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
