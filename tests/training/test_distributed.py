"""Two processes train as one with twice the batch: the same validation curve, by DDP and FSDP."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from depthprobe.errors import BadInput
from depthprobe.study import Recipe
from depthprobe.training import distributed

SCRIPT = Path(__file__).with_name("launched.py")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def launched() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launched", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(launched: ModuleType) -> dict[str, Any]:
    """The curves of one process with the batch of two."""
    return {name: launched.curve(name, 16) for name in launched.CURVES}


def launch(folder: Path, wanted: str, *options: str) -> list[dict[str, Any]]:
    """What two processes found; on CPUs these options start two, where ``--cpu`` starts one."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder), wanted],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def assert_same_curves(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for name, curve in found["curves"].items():
        expected, near = alone[name], 1e-2 if name == "bfloat16" else 1e-5
        assert (curve["processes"], expected["processes"]) == (2, 1)
        assert curve["steps"] == expected["steps"], name
        assert curve["scores"] == pytest.approx(expected["scores"], abs=near), name
        assert curve["losses"] == pytest.approx(expected["losses"], abs=near), name
        assert curve["plain"], name  # what validates and is saved is an ordinary module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sharing"),
    [
        (["--multi_gpu"], {"kind": "MULTI_CPU", "sharded": False, "units": 0}),
        (
            ["--use_fsdp", "--fsdp_version", "2"],
            {"kind": "FSDP", "sharded": True, "units": 1},
        ),
    ],
    ids=["ddp", "fsdp"],
)
def test_two_processes_equal_one(
    options: list[str], sharing: dict[str, Any], alone: dict[str, Any], tmp_path: Path
) -> None:
    both = launch(tmp_path, "all", *options)
    for found in both:
        assert found["sharing"] == sharing
        assert_same_curves(found, alone)
        assert found["resumed"]
        assert found["diverged"] == "the loss is nan at step 4"  # in the second one alone
    assert both[0]["curves"] == both[1]["curves"]  # to the bit: they stay together


@pytest.mark.slow
def test_blocks_sharded_one_by_one(alone: dict[str, Any], tmp_path: Path) -> None:
    options = ["--use_fsdp", "--fsdp_version", "2"]
    options += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    options += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    for found in launch(tmp_path, "blocks", *options):
        assert found["sharing"] == {"kind": "FSDP", "sharded": True, "units": 3}
        assert_same_curves(found, alone)
        assert "the prompt is shared" in found["refused"]


def test_shares_are_the_batch() -> None:
    chosen = np.arange(10, 17)
    shares = [distributed.share(chosen, rank, 3) for rank in range(3)]
    assert sorted(np.concatenate(shares).tolist()) == chosen.tolist()
    assert {len(part) for part in shares} == {2, 3}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FSDP_VERSION", "1", "--fsdp_version: '1' is not usable; 2"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "--fsdp_auto_wrap_policy"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "--fsdp_cpu_ram_efficient_loading"),
    ],
)
def test_what_would_train_wrongly_is_refused(
    name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known, usable in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), (name, value)):
        monkeypatch.setenv(known, usable)
    with pytest.raises(BadInput, match=told):
        distributed.start(Recipe(), CPU)


def test_weights_that_fsdp_cannot_hold_together(launched: ModuleType) -> None:
    objective = launched.NextItem(launched.llama(), Recipe())
    half = Recipe(precision="bfloat16")
    distributed._check_dtypes(objective, half)
    objective.model.backbone.to(torch.bfloat16)
    with pytest.raises(BadInput, match="bfloat16, float32"):
        distributed._check_dtypes(objective, Recipe())
    for weight in objective.model.backbone.parameters():
        weight.requires_grad_(False)
    distributed._check_dtypes(objective, Recipe())


def test_a_copy_shares_data_and_no_weights(launched: ModuleType) -> None:
    class Holds(launched.NextItem):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(launched.llama(), Recipe())
            self.table = np.zeros(3)

    objective = Holds()
    copied = distributed._copied(objective)
    assert copied.recipe is objective.recipe
    mine = {p.data_ptr() for p in objective.parameters()}
    assert not mine & {p.data_ptr() for p in copied.parameters()}


def test_a_launchers_settings_change_nothing_in_one_process(
    launched: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = launched.curve("sasrec", 16)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launched.curve("sasrec", 16) == expected
