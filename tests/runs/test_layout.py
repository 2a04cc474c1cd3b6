"""What a sweep checks before it writes anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from depthprobe.errors import BadInput
from depthprobe.methods import METHODS
from depthprobe.runs import layout
from depthprobe.runs.layout import read_inputs
from depthprobe.study import Study, override


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone.tuning": "lora", "backbone.lora_rank": 60_000}, "backbone.lora_rank: .* width"),
        (
            {"backbone.tuning": "lora", "backbone.lora_targets": ["query"]},
            "backbone.lora_targets: expected some of all, mlp, attention, q_proj, .*, got 'query'",
        ),
        ({"distillation.top": 10**6}, "distillation.top: .* items of the log, or 0 for all"),
        ({"sasrec.width": 65_536, "sasrec.blocks": 1000}, "sasrec.width: .* fits the memory"),
    ],
)
def test_sizes_beyond_the_log_the_backbone_or_the_memory(
    study: Study, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    methods = tuple(name for name, method in METHODS.items() if not method.titles)
    methods = tuple(
        name for name in methods if name != "int4"
    )  # these blocks are too narrow for it
    plain = replace(study, methods=methods, variants={})
    with pytest.raises(BadInput, match=words):
        read_inputs(override(plain, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("jobs", "memory", "tasks", "expected"),
    [
        (None, 0, 9, 4),  # no backbone: a core each, at most four
        (None, 1e9, 9, 4),
        (None, 5e9, 9, 2),  # 14.4 of 24 GB
        (None, 90e9, 9, 1),
        (None, 1e9, 2, 2),
        (3, 90e9, 9, 3),  # who asks for them gets them
        (0, 1e9, 9, 0),
    ],
)
def test_jobs_follow_from_cores_and_memory(
    jobs: int | None,
    memory: float,
    tasks: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "available_cores", lambda: 8)
    has = SimpleNamespace(total=24e9)
    monkeypatch.setattr(layout.psutil, "virtual_memory", lambda: has)
    cpu = torch.device("cpu")
    assert layout.jobs_at_once(jobs, cpu, tasks, memory=memory) == expected


def test_a_run_keeps_the_precision_that_it_began_with(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = override(study, **{"recipe.precision": "auto", "recipe.epochs": 1})
    monkeypatch.setattr(layout, "precision_on", lambda device, parameters: "bfloat16")
    inputs = read_inputs(asked, tmp_path / "run")
    assert inputs.working.recipe.precision == "bfloat16"
    assert inputs.study.recipe.precision == "auto"
    layout.lay_out(tmp_path / "run", asked, inputs)
    monkeypatch.setattr(layout, "precision_on", lambda device, parameters: "float32")  # elsewhere
    again = read_inputs(asked, tmp_path / "run")
    assert again.manifest.backbone.precision == "bfloat16"
    assert again.working.recipe.precision == "bfloat16"
