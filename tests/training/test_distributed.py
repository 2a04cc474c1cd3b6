"""Two processes train as one with twice the batch: the same validation curve, by DDP and FSDP."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from depthprobe.errors import BadInput
from depthprobe.study import Recipe
from depthprobe.training import distributed

SCRIPT = Path(__file__).with_name("launched.py")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
BLOCKS = {
    **FSDP,
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
}


@pytest.fixture(scope="module")
def alone(launched: ModuleType) -> dict[str, Any]:
    """The curves of one process with the batch of two."""
    return {name: launched.curve(name, 16) for name in launched.CURVES}


def run_script(environment: dict[str, str], *arguments: str) -> None:
    os.environ.update(environment)
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def start_two(folder: Path, which: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The results of two processes with the environment that the launcher gives them."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all
    context.set_forkserver_preload(["depthprobe.training.loop", "transformers.models.llama"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    processes = [
        context.Process(
            target=run_script,
            args=({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(folder), which),
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    return read_results(folder)


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def assert_same_curves(results: dict[str, Any], alone: dict[str, Any]) -> None:
    for name, curve in results["curves"].items():
        expected, near = alone[name], 2e-2 if "bfloat16" in name else 1e-5
        assert (curve["processes"], expected["processes"]) == (2, 1)
        assert curve["steps"] == expected["steps"], name
        assert curve["scores"] == pytest.approx(expected["scores"], abs=near), name
        assert curve["losses"] == pytest.approx(expected["losses"], abs=near), name
        assert curve["plain"], name  # what validates and is saved is an ordinary module


@pytest.mark.parametrize("kind", ["MULTI_CPU", "FSDP"])
def test_two_processes_equal_one(kind: str, alone: dict[str, Any], tmp_path: Path) -> None:
    both = start_two(tmp_path, "all", FSDP if kind == "FSDP" else {})
    sharded = kind == "FSDP"
    for results in both:
        assert results["sharding"] == {"kind": kind, "sharded": sharded, "units": int(sharded)}
        assert_same_curves(results, alone)
        assert results["resumed"] == [True, True]
        assert (
            results["diverged"] == "the loss is no finite number at step 4"
        )  # in the second one alone
    assert both[0]["curves"] == both[1]["curves"]  # to the bit: they stay together


def check_blocks(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for results in both:
        assert results["sharding"] == {"kind": "FSDP", "sharded": True, "units": 3}
        assert_same_curves(results, alone)
        assert "the prompt is shared" in results["refused"]


def test_blocks_sharded_one_by_one(alone: dict[str, Any], tmp_path: Path) -> None:
    check_blocks(start_two(tmp_path, "blocks", BLOCKS), alone)


@pytest.mark.slow
def test_two_processes_of_the_real_launcher(alone: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp"]
    command += ["--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    command += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(tmp_path), "blocks"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    check_blocks(read_results(tmp_path), alone)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "--fsdp_version: expected 2, got '1'"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "--fsdp_auto_wrap_policy"),
    ],
)
def test_settings_that_would_train_wrongly_are_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known, usable in (*FSDP.items(), (name, value)):
        monkeypatch.setenv(known, usable)
    with pytest.raises(BadInput, match=message):
        distributed._fsdp_plugin()


def test_weights_that_fsdp_cannot_hold_together(launched: ModuleType) -> None:
    objective = launched.NextItem(launched.llama(), Recipe())
    distributed._check_dtypes(objective, Recipe(precision="bfloat16"))
    objective.model.backbone.to(torch.bfloat16)
    with pytest.raises(BadInput, match="bfloat16, float32"):
        distributed._check_dtypes(objective, Recipe())
    objective.model.backbone.requires_grad_(False)
    distributed._check_dtypes(objective, Recipe())


def test_a_copy_shares_data_and_no_weights(launched: ModuleType) -> None:
    objective = launched.NextItem(launched.llama(), Recipe())
    copied = distributed._copy(objective)
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
