"""Small trainings, run by ``test_distributed`` in one process and by a launcher in two.

``python launched.py FOLDER all|blocks`` writes what each process found to ``FOLDER/RANK.json``:
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
from depthprobe.study import Recipe
from depthprobe.training import checkpoint
from depthprobe.training.distributed import join, spread, start
from depthprobe.training.loop import DivergedError, Fit, fit
from depthprobe.training.objectives import Batch, NextItem, make_batch

CPU = torch.device("cpu")
ITEMS, USERS = 12, 33  # 33 windows in batches of 16: of the last batch, one process has nothing


def windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, ITEMS, size=USERS)
    return [(start + np.arange(rng.integers(2, 8))) % ITEMS + 1 for start in starts]


def sasrec(drop: float = 0.0) -> SASRec:
    torch.manual_seed(0)
    return SASRec(ITEMS, width=16, blocks=1, heads=2, drop=drop, longest=10)


def llama(prompt: tuple[int, ...] = (3, 1)) -> Recommender:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return Recommender(LlamaForCausalLM(config), torch.randn(ITEMS + 1, 6), prompt)


class Spoiled(nn.Module):
    """An objective something is done to the loss of at one of its calls."""

    def __init__(self, objective: nn.Module, call: int, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.objective, self.call, self.spoil = objective, call, spoil
        self.calls = itertools.count(1)

    def forward(self, batch: Batch) -> Tensor:
        value: Tensor = self.objective(batch)
        return self.spoil(value) if next(self.calls) == self.call else value


def train(
    model: nn.Module,
    batch_size: int,
    *,
    spoilt: tuple[int, Callable[[Tensor], Tensor]] = (0, Tensor.clone),
    path: Path | None = None,
    **recipe: Any,
) -> Fit:
    """Train; the score is how likely the windows are, which any change of weights moves."""
    settings = Recipe(
        **{"epochs": 4, "batch_size": batch_size, "learning_rate": 0.02, "patience": 2, **recipe}
    )
    users = windows()
    everyone = make_batch(users, np.arange(USERS), CPU, "every")
    asked = NextItem(model, Recipe())

    def validate() -> float:
        with torch.no_grad():
            return -float(asked(everyone))

    return fit(
        Spoiled(NextItem(model, settings), *spoilt),
        users,
        recipe=settings,
        validate=validate,
        seed=0,
        device=CPU,
        checkpoint=path,
        every=0,
    )


def told(model: nn.Module, found: Fit) -> dict[str, Any]:
    return {
        "scores": found.scores,
        "losses": found.losses,
        "steps": found.steps,
        "processes": found.processes,
        "plain": all(type(p) in {nn.Parameter, Tensor} for p in model.parameters()),
        "weights": [float(p.detach().double().norm()) for p in model.parameters()],
    }


# trainings whose results must not depend on the number of processes
CURVES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "sasrec": (sasrec, {}),
    "last": (sasrec, {"objective": "last", "accumulation": 3}),
    "llama": (llama, {"accumulation": 2}),
    "no prompt": (lambda: llama(()), {}),  # its token table gets no gradient
    "bfloat16": (sasrec, {"precision": "bfloat16"}),
}
BLOCKS = ("sasrec", "no prompt")


def curve(name: str, batch_size: int) -> dict[str, Any]:
    make, recipe = CURVES[name]
    model = make()
    return told(model, train(model, batch_size, **recipe))


class KilledError(Exception):
    """Someone killed the training."""


def kill(loss: Tensor) -> Tensor:
    raise KilledError


def resumed(folder: Path) -> bool:
    """Whether a training that was killed, dropout and all, goes on to the same bits."""
    straight, again, path = sasrec(0.3), sasrec(0.3), folder / "training.safetensors"
    expected = train(straight, 8)
    try:
        train(sasrec(0.3), 8, spoilt=(5, kill), path=path)
    except KilledError:
        PartialState().wait_for_everyone()  # the first one has written its file
        found = train(again, 8, path=path)
    pairs = zip(straight.parameters(), again.parameters(), strict=True)
    return (
        found == expected and found.resumed_at == [4] and all(torch.equal(a, b) for a, b in pairs)
    )


def diverged(rank: int) -> str:
    """What is told of a loss that is no number in the second process alone."""
    factor = float("nan") if rank == 1 else 1.0
    try:
        train(sasrec(), 8, spoilt=(4, lambda loss: loss * factor))
    except DivergedError as error:
        return str(error)
    return ""


def refused() -> str:
    """What is told where a shared prompt meets blocks that are sharded one by one."""
    try:
        train(llama(), 8)
    except BadInput as error:
        return str(error)
    return ""


def sharing() -> dict[str, Any]:
    """How the weights of a recommender lie in the processes."""
    recipe = Recipe()
    accelerator = start(recipe, CPU)
    trained = spread(accelerator, NextItem(llama(()), recipe), recipe)
    return {
        "kind": accelerator.distributed_type.value,
        "sharded": all(isinstance(weight, DTensor) for weight in trained.weights.values()),
        "units": sum(isinstance(module, FSDPModule) for module in trained.called.modules()),
    }


def main(folder: Path, wanted: str) -> None:
    checkpoint.SHARE = 0  # a checkpoint after each step
    state = join("cpu")
    rank = state.process_index
    found: dict[str, Any] = {"sharing": sharing()}
    if wanted == "all":
        found["curves"] = {name: curve(name, 8) for name in CURVES}
        found |= {"resumed": resumed(folder), "diverged": diverged(rank)}
    else:
        found["curves"] = {name: curve(name, 8) for name in BLOCKS}
        found["refused"] = refused()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    os._exit(0)  # as the command does: threads of gloo's may not outlive the interpreter
