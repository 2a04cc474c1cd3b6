"""Where a number comes from: machine, versions, git."""

from __future__ import annotations

import os
import platform
import subprocess  # noqa: S404 - asks git for its commit, with fixed arguments
from importlib import metadata
from pathlib import Path

import psutil
import torch

from depthprobe.cost.timing import processor_name
from depthprobe.runs.records import Git, Machine

PACKAGES = ("depthprobe", "torch", "transformers", "accelerate", "peft", "numpy", "pandas")


def machine(device: torch.device) -> Machine:
    """Processor, memory and accelerator of this machine."""
    return Machine(
        device=device.type,
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
        cpu=processor_name(),
        cores=available_cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=platform.system(),
    )


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    found = {"python": platform.python_version()}
    return found | {name: metadata.version(name) for name in PACKAGES}


def git_state() -> Git | None:
    """Commit and dirt of the code's checkout; None outside one."""
    here = Path(__file__).resolve().parent
    # installed into a virtual environment, the package may lie in somebody else's checkout
    if not _git(here, "ls-files", "--error-unmatch", Path(__file__).name):
        return None
    commit = _git(here, "rev-parse", "HEAD")
    return Git(commit, bool(_git(here, "status", "--porcelain", "-uno")))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
