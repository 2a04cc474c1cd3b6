"""Training in several processes, as ``accelerate launch`` starts them: DDP, or FSDP 2.

Each process computes a share of every batch. The objective is wrapped whole, since it calls its
model more than once a step (the prompt, the items) and reads weights outside the model's forward.

Under FSDP a copy of the objective is sharded and trained, and the objective itself stays whole: it
takes the copy's weights before each validation. So what validates and saves sees an ordinary
module, and each process needs room for the weights beside its share of gradients and moments.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

from depthprobe.errors import BadInput
from depthprobe.models.recommender import Recommender
from depthprobe.study import Recipe

EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
# AdamW in one kernel: 4 times faster than a loop over the weights on a CPU, more on a GPU
FUSED = ("cpu", "cuda")


def join(device: str) -> PartialState:
    """Join the processes of ``accelerate launch``, before a model is loaded; alone without one.

    Sets the GPU that ``cuda`` means in this process. Under FSDP it makes every process load its
    weights: transformers would load them in the first alone, and the others could not validate.

    Returns:
        accelerate's state: ``is_main_process``, ``num_processes``, ``wait_for_everyone()``.
    """
    os.environ[EFFICIENT] = "false"
    return PartialState(cpu=device == "cpu")


def start(recipe: Recipe, device: torch.device) -> Accelerator:
    """An accelerator for one training; the processes and their group are those that there are.

    Raises:
        BadInput: for a kind of FSDP that would train wrongly.
    """
    # the state is a process-wide singleton that would leak from the training before; the group of
    # processes is torch's and stays
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = _fsdp_plugin()
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if recipe.precision == "bfloat16" else "no",
        # said outright, or the launcher's settings would scale the gradients a second time
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # a token table that only a prompt reads gets no gradient without one
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        fsdp_plugin=plugin,
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards on accelerators alone and would fall back to DDP without a word
        accelerator.state.fsdp_plugin = plugin
        for state in (accelerator.state, PartialState()):  # one is copied from the other at times
            state.distributed_type = DistributedType.FSDP
    return accelerator


def _fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """What ``accelerate launch --use_fsdp`` asks for."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    version, policy = (os.environ.get(f"FSDP_{k}") for k in ("VERSION", "AUTO_WRAP_POLICY"))
    if version != "2":
        raise BadInput("accelerate launch --fsdp_version", version, "2")
    if policy not in {None, "NO_WRAP", "TRANSFORMER_BASED_WRAP"}:
        allowed = "NO_WRAP or TRANSFORMER_BASED_WRAP"
        raise BadInput("accelerate launch --fsdp_auto_wrap_policy", policy, allowed)
    if os.environ.get(EFFICIENT, "false").lower() == "true":
        allowed = "false: every process validates, with all weights"
        raise BadInput("accelerate launch --fsdp_cpu_ram_efficient_loading", True, allowed)
    # computing in bfloat16 is autocast's, as without FSDP: gradients are summed in float32
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


class _Called(nn.Module):
    """What accelerate wraps and marks in place of the objective, which stays as it was."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Any) -> Tensor:
        value: Tensor = self.objective(batch)
        return value


@dataclass(frozen=True)
class Trained:
    """An objective under training: what is called, and the weights that its optimiser moves."""

    accelerator: Accelerator
    objective: nn.Module  # whole
    inner: nn.Module  # the objective, or the copy of it that is sharded
    called: nn.Module  # what wraps that
    weights: Mapping[str, Tensor]  # trained ones by name: the objective's own, or shards of a copy
    optimizer: AdamW

    @property
    def processes(self) -> int:
        """How many processes train it."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        return int(self.accelerator.process_index)

    def check_together(self, step: int) -> None:
        """Refuse processes that begin at different steps.

        Raises:
            ValueError: if they do.
        """
        first = self.agree(step)
        if first != step:
            raise ValueError(
                f"process {self.rank} begins at step {step} and the first one at {first:g}:"
                " all must see the same checkpoint"
            )

    def publish(self) -> None:
        """Give the objective the weights as they are now, where a copy of it is trained."""
        own = dict(self.objective.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights.items():
                if weight is not own[name]:
                    own[name].copy_(whole(weight))

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.processes > 1:
            torch.distributed.all_reduce(values)
        return values

    def agree(self, score: float) -> float:
        """The first process's score, in all of them: they must stop at the same epoch."""
        if self.processes == 1:
            return score
        told = torch.tensor([score], dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.broadcast(told, 0)
        return float(told.item())

    @contextmanager
    def apart(self, alone: bool) -> Iterator[None]:
        """A backward pass inside leaves the gradients in this process if ``alone``."""
        if not alone:
            yield
            return
        with self.accelerator.no_sync(self.called):
            yield


def spread(accelerator: Accelerator, objective: nn.Module, recipe: Recipe) -> Trained:
    """Wrap an objective for the processes there are, with an AdamW over its trained weights.

    Raises:
        BadInput: under FSDP, for weights or blocks that can't be sharded.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        _check_dtypes(objective, recipe)
        _check_units(accelerator.state.fsdp_plugin, objective)
    inner = _copied(objective) if sharded else objective
    optimizer = AdamW(
        [p for p in inner.parameters() if p.requires_grad],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=accelerator.device.type in FUSED or None,
    )
    called, _ = accelerator.prepare(_Called(inner), optimizer)
    weights = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    return Trained(accelerator, objective, inner, called, weights, optimizer)


def share(chosen: np.ndarray, rank: int, processes: int) -> np.ndarray:
    """What one process computes of a batch that is sorted by length; may be empty.

    Every n-th window, so that all processes get about as long ones.

    >>> share(np.arange(5), 1, 2).tolist()
    [1, 3]
    """
    return chosen[rank::processes]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over the processes, in full; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor in full as ``like`` is: on its device, sharded if it is."""
    moved = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements)


def _copied(objective: nn.Module) -> nn.Module:
    """A copy with weights of its own; data that a module holds beside them is shared."""
    data = (
        value
        for module in objective.modules()
        for value in vars(module).values()
        if type(value).__module__.startswith("depthprobe.") and not isinstance(value, nn.Module)
    )
    return copy.deepcopy(objective, {id(value): value for value in data})


def _check_dtypes(objective: nn.Module, recipe: Recipe) -> None:
    """FSDP keeps a unit's trained weights in one buffer."""
    weights = list(objective.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in weights if p.requires_grad})
    wanted = "float32" if recipe.precision == "bfloat16" else dtypes[0]
    if dtypes != [wanted]:
        allowed = f"under FSDP all trained weights in {wanted}: backbone.dtype = float32"
        raise BadInput("backbone.dtype", ", ".join(dtypes), allowed)
    if not all(p.is_floating_point() for p in weights):
        raise BadInput("backbone.quantize", "quantised weights", "none under FSDP")


def _check_units(plugin: FullyShardedDataParallelPlugin, objective: nn.Module) -> None:
    """Blocks sharded one by one can't run a prompt that the batch's users share.

    Its keys and values reach the loss around the blocks' outputs, which are where FSDP learns that
    a block's weights are needed again.
    """
    if plugin.auto_wrap_policy is None:
        return
    here = {type(module).__name__ for module in objective.modules()}
    # a study trains models of several kinds, and accelerate refuses a class that one lacks
    units = [name for name in plugin.transformer_cls_names_to_wrap or () if name in here]
    plugin.transformer_cls_names_to_wrap = units
    models = [module for module in objective.modules() if isinstance(module, Recommender)]
    if units and any(len(model.prompt) and not model.lead for model in models):
        option = "accelerate launch --fsdp_transformer_layer_cls_to_wrap"
        raise BadInput(option, units[0], "none, or backbone.prompt = '': the prompt is shared")
