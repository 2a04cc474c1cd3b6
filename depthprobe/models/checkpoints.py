"""What a checkpoint must hold: safetensors weights, each of them the model's."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from depthprobe.models.sources import ALLOWED
from depthprobe.study import BadInput

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Recomputed by the model: old checkpoints stored them.
HARMLESS = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|attn\.bias|attention\.bias)$"
)


def check_weights(folder: Path) -> None:
    """Refuse a folder without safetensors weights.

    Raises:
        BadInput: if there are none, or pickled ones alone.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickled = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLED]
    if pickled:
        raise BadInput(
            "backbone",
            str(folder),
            f"only pickled weights in it ({pickled[0]}), which can run code when loaded:"
            " convert them with save_pretrained to safetensors",
        )
    raise BadInput("backbone", str(folder), f"no weights (*.safetensors) in it: {ALLOWED}")


def check_keys(path_or_id: str | os.PathLike[str], loaded: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not exactly the model's.

    Args:
        loaded: what ``from_pretrained(output_loading_info=True)`` told.

    Raises:
        BadInput: for missing, unexpected or mismatched keys.
    """
    unexpected = [key for key in loaded["unexpected_keys"] if not HARMLESS.search(key)]
    mismatched = [key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]]
    for what, keys in (
        ("missing", list(loaded["missing_keys"])),
        ("unexpected", unexpected),
        ("of another shape than the configuration says", mismatched),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise BadInput(
                "backbone",
                str(path_or_id),
                f"{len(keys)} of its weights are {what} ({shown}):"
                " the checkpoint must fit its configuration",
            )
