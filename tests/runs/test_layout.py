"""What a sweep checks before it writes anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from depthprobe.errors import BadInput
from depthprobe.methods import METHODS
from depthprobe.runs.layout import read_inputs
from depthprobe.study import Study, override


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone.tuning": "lora", "backbone.lora_rank": 60_000}, "backbone.lora_rank: .* width"),
        ({"distillation.top": 10**6}, "distillation.top: .* items of the log, or 0 for all"),
        ({"sasrec.width": 65_536, "sasrec.blocks": 1000}, "sasrec.width: .* fits the memory"),
    ],
)
def test_sizes_beyond_the_log_the_backbone_or_the_memory(
    study: Study, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    plain = replace(study, methods=tuple(METHODS), variants={})
    with pytest.raises(BadInput, match=words):
        read_inputs(override(plain, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
