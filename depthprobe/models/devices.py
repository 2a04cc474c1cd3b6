"""Where to compute."""

from __future__ import annotations

import torch

from depthprobe.study import BadInput


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``mps`` names here.

    Raises:
        BadInput: if this machine doesn't have it.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has.get(name):
        here = ", ".join(kind for kind in has if has[kind])
        raise BadInput("device", name, f"auto or one of those on this machine: {here}")
    return torch.device(name)
