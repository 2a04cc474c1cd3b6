"""Small trainings, run by ``test_distributed`` in one process and in two.

``python launched.py FOLDER all|blocks`` writes the results of each process to ``FOLDER/RANK.json``:
of all trainings, or of those whose blocks FSDP shards one by one.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.errors import BadInput
from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.models.tiny import tiny_config
from depthprobe.study import Recipe
from depthprobe.training import checkpoint
from depthprobe.training.distributed import Engine, join
from depthprobe.training.loop import DivergedError, Fit, fit
from depthprobe.training.objectives import Batch, NextItem, make_batch

CPU = torch.device("cpu")
ITEMS, USERS = 12, 33  # 33 windows in batches of 16: of the last batch, one process has nothing


def windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, ITEMS, size=USERS)
    return [(start + np.arange(rng.integers(2, 8))) % ITEMS + 1 for start in starts]


def sasrec(drop: float = 0.0, dtype: torch.dtype = torch.float32) -> SASRec:
    torch.manual_seed(0)
    return SASRec(ITEMS, width=16, blocks=1, heads=2, drop=drop, longest=10).to(dtype)


def llama(prompt: tuple[int, ...] = (3, 1)) -> Recommender:
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(tiny_config(LlamaConfig(), depth=2))
    return Recommender(backbone, torch.randn(ITEMS + 1, 6), prompt)


class Spoiled(nn.Module):
    """An objective that something happens to at one of its calls, counted from 1."""

    def __init__(self, objective: nn.Module, call: int, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.objective, self.call, self.spoil = objective, call, spoil
        self.calls = itertools.count(1)

    def forward(self, batch: Batch) -> Tensor:
        value: Tensor = self.objective(batch)
        return self.spoil(value) if next(self.calls) == self.call else value


def kill(loss: Tensor) -> Tensor:
    raise SystemExit


def train(
    model: nn.Module,
    batch_size: int,
    *,
    spoilt: tuple[int, Callable[[Tensor], Tensor]] = (0, Tensor.clone),
    path: Path | None = None,
    **changes: Any,
) -> Fit:
    """Train; the score is how likely the windows are, which any change of weights moves."""
    settings = {"epochs": 3, "batch_size": batch_size, "learning_rate": 0.02, "patience": 2}
    recipe = Recipe(**{**settings, **changes})
    users = windows()
    everyone, plain = make_batch(users, np.arange(USERS), CPU, "every"), NextItem(model, Recipe())

    def validate() -> float:
        with torch.no_grad():
            return -float(plain(everyone))

    return fit(
        Spoiled(NextItem(model, recipe), *spoilt),
        users,
        recipe=recipe,
        validate=validate,
        seed=0,
        device=CPU,
        checkpoint=path,
        every=0,
    )


# trainings whose results must not depend on the number of processes
CURVES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "last": (sasrec, {"objective": "last", "tokens": 20}),
    "llama": (llama, {"tokens": 30}),
    "bfloat16": (sasrec, {"precision": "bfloat16"}),
    "bfloat16 weights": (lambda: sasrec(dtype=torch.bfloat16), {}),
    "sasrec": (sasrec, {}),
    "no prompt": (lambda: llama(()), {}),  # its token table gets no gradient
}
BLOCKS = ("sasrec", "no prompt")


def curve(name: str, batch_size: int) -> dict[str, Any]:
    make, recipe = CURVES[name]
    model = make()
    done = train(model, batch_size, **recipe)
    return {
        "scores": done.scores,
        "losses": done.losses,
        "steps": done.steps,
        "processes": done.processes,
        "plain": all(type(p) in {nn.Parameter, Tensor} for p in model.parameters()),
        "weights": [float(p.detach().double().norm()) for p in model.parameters()],
    }


def resumed(folder: Path, dtype: torch.dtype) -> bool:
    """Whether a training that was killed, dropout and all, goes on to the same bits."""
    straight, again = sasrec(0.3, dtype), sasrec(0.3, dtype)
    path = folder / f"{dtype}.safetensors"
    expected = train(straight, 8)
    try:
        train(sasrec(0.3, dtype), 8, spoilt=(5, kill), path=path)
    except SystemExit:
        PartialState().wait_for_everyone()  # the first one has written its file
        done = train(again, 8, path=path)
    pairs = zip(straight.parameters(), again.parameters(), strict=True)
    return done == expected and done.resumed_at == [4] and all(torch.equal(a, b) for a, b in pairs)


def diverged(rank: int) -> str:
    """The error for a loss that is no number in the second process alone."""
    factor = float("nan") if rank == 1 else 1.0
    try:
        train(sasrec(), 8, spoilt=(4, lambda loss: loss * factor))
    except DivergedError as error:
        return str(error)
    return ""


def refused() -> str:
    """The error where a shared prompt meets blocks that are sharded one by one."""
    try:
        train(llama(), 8)
    except BadInput as error:
        return str(error)
    return ""


def sharding() -> dict[str, Any]:
    """How the weights of a recommender lie in the processes."""
    engine = Engine(NextItem(llama(()), Recipe()), Recipe(), CPU)
    assert engine.accelerator is not None
    return {
        "kind": engine.accelerator.distributed_type.value,
        "sharded": all(isinstance(weight, DTensor) for weight in engine.weights.values()),
        "units": sum(isinstance(module, FSDPModule) for module in engine.called.modules()),
    }


def main(folder: Path, which: str) -> None:
    checkpoint.SHARE = 0  # a checkpoint after each step
    state = join("cpu")
    rank = state.process_index
    results: dict[str, Any] = {"sharding": sharding()}
    if which == "all":
        results["curves"] = {name: curve(name, 8) for name in CURVES if name not in BLOCKS}
        results["resumed"] = [resumed(folder, dtype) for dtype in (torch.float32, torch.bfloat16)]
        results["diverged"] = diverged(rank)
    else:
        results["curves"] = {name: curve(name, 8) for name in BLOCKS}
        results["refused"] = refused()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    os._exit(0)  # as the command does: threads of gloo's may not outlive the interpreter
