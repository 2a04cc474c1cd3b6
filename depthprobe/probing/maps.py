"""A fitted linear map on disk: with the teacher's weights it makes the shallower model again."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

from depthprobe.probing.replace import Replacement

FILE, MAP = "replacement.safetensors", "map"


def save_replacement(replacement: Replacement, folder: Path) -> None:
    """Write the map in float64, as it was fitted, and what it stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in vars(replacement).items() if name != MAP}
    save_file({MAP: replacement.map}, folder / FILE, metadata={"of": json.dumps(rest)})


def load_replacement(folder: Path) -> Replacement:
    """Read what :func:`save_replacement` wrote."""
    with safe_open(folder / FILE, framework="numpy") as file:
        return Replacement(map=file.get_tensor(MAP), **json.loads(file.metadata()["of"]))
