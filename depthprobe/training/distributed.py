"""An objective with its optimiser, in one process or in those of ``accelerate launch``.

Each process computes a share of every batch, by DDP or FSDP 2. The objective is wrapped in full: it
calls its model more than once a step (the prompt, the items) and reads weights outside the model's
forward.

Under FSDP a copy of the objective is sharded and trained. The objective itself stays whole, and
takes the copy's weights before each validation. So an ordinary module is validated and saved, but
each process needs memory for all weights besides its share of gradients and moments.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW

from depthprobe.errors import BadInput
from depthprobe.models.recommender import Recommender
from depthprobe.study import Recipe

# AdamW in one kernel: 4 times faster than a loop over the weights on a CPU, more on a GPU
FUSED = ("cpu", "cuda")
MOMENTS = ("exp_avg", "exp_avg_sq")


def join(device: str) -> PartialState:
    """Join the processes of ``accelerate launch``, before a model is loaded; alone without one.

    Sets the GPU that ``cuda`` means in this process. Under FSDP it makes every process load the
    weights: transformers would load them only in the first, and the others could not validate.
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return PartialState(cpu=device == "cpu")


class Engine:
    """An objective with its optimiser, wrapped for the processes that train it.

    Attributes:
        objective: whole; it is validated and saved.
        inner: the objective, or the copy of it that is sharded.
        called: ``inner`` or what wraps it: a batch in, its loss out.
        weights: the trained ones by name: the objective's own, or shards of a copy's.
        masters: what AdamW updates, by the same names. A weight of 16 bits has a float32 copy here:
            small steps would be rounded away in bfloat16. Other weights are their own.
    """

    def __init__(self, objective: nn.Module, recipe: Recipe, device: torch.device) -> None:
        """Wrap the objective; ``BadInput`` if sharding would train wrongly or is impossible."""
        state = PartialState(cpu=device.type == "cpu")
        self.rank, self.processes = int(state.process_index), int(state.num_processes)
        self.objective, self.recipe, self.device = objective, recipe, device
        self.inner = self.called = objective
        self.accelerator: Accelerator | None = None
        if self.processes > 1:
            self._wrap()
        self.weights = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        self.masters = {
            name: weight if weight.dtype.itemsize >= 4 else weight.detach().float().requires_grad_()
            for name, weight in self.weights.items()
        }
        self.optimizer = AdamW(
            list(self.masters.values()),
            lr=recipe.rates[0],
            weight_decay=recipe.weight_decay,
            fused=device.type in FUSED or None,
        )

    def _wrap(self) -> None:
        plugin = _fsdp_plugin()
        self.accelerator = Accelerator(
            mixed_precision="no",  # we call autocast; and FSDP sums gradients in float32
            # without a prompt, a token table that only the prompt reads gets no gradient
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            fsdp_plugin=plugin,
        )
        self.device = self.accelerator.device
        if plugin is None:
            self.called = self.accelerator.prepare_model(self.objective)
            return
        _check_dtypes(self.objective, self.recipe)
        _check_units(plugin, self.objective)
        # The state is a singleton that would keep the plugin of the training before. On CPUs
        # accelerate would silently fall back to DDP.
        self.accelerator.state.fsdp_plugin = plugin
        for state in (self.accelerator.state, PartialState()):  # the sharded copy
            state.distributed_type = DistributedType.FSDP
        self.inner = _copy(self.objective)
        # accelerate requires an optimiser with a model that it shards; any one will do
        optimizer = SGD([p for p in self.inner.parameters() if p.requires_grad])
        self.called, _ = self.accelerator.prepare(self.inner, optimizer)

    def autocast(self, *, enabled: bool = True) -> AbstractContextManager[None]:
        """Within it a forward pass computes in the recipe's precision, if enabled."""
        half = enabled and self.recipe.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.processes > 1:
            torch.distributed.all_reduce(values)
        return values

    def agree(self, score: float) -> float:
        """Give all processes the first one's score, so that they stop at the same epoch."""
        if self.processes == 1:
            return score
        shared = torch.tensor([score], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return float(shared.item())

    def no_sync(self) -> Any:
        """Within it a backward pass does not exchange gradients between processes."""
        return self.accelerator.no_sync(self.called) if self.accelerator else nullcontext()

    def clip(self, largest: float) -> Tensor:
        """Move the gradients to the masters and clip them; returns their norm before, a scalar."""
        for name, weight in self.weights.items():
            master = self.masters[name]
            if master is not weight and weight.grad is not None:
                master.grad, weight.grad = weight.grad.to(master.dtype), None
        return _full(clip_grad_norm_(list(self.masters.values()), largest))

    def step(self) -> None:
        """Update the weights by their gradients, and delete these."""
        self.optimizer.step()
        self._copy_back()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Delete all gradients."""
        for tensor in (*self.weights.values(), *self.masters.values()):
            tensor.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Give the objective the present weights, if a copy of it is trained."""
        own = dict(self.objective.named_parameters())
        for name, weight in self.weights.items():
            if weight is not own[name]:
                own[name].copy_(_full(weight))

    def state(self) -> dict[str, Tensor]:
        """Whole masters and moments, as ``weights NAME``, ``exp_avg NAME``; all must call it."""
        tensors = {f"weights {name}": _full(master) for name, master in self.masters.items()}
        for name, master in self.masters.items():
            moments = self.optimizer.state.get(master, {})  # empty before its first gradient
            tensors |= {f"{kind} {name}": _full(value) for kind, value in moments.items()}
        return tensors

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned."""
        fused = bool(self.optimizer.defaults["fused"])
        for name, master in self.masters.items():
            master.copy_(_shard_like(state[f"weights {name}"], master))
            if (step := state.get(f"step {name}")) is not None:
                self.optimizer.state[master] = {
                    "step": step.to(master.device if fused else "cpu"),
                    **{k: _shard_like(state[f"{k} {name}"], master) for k in MOMENTS},
                }
        self._copy_back()

    @torch.no_grad()
    def _copy_back(self) -> None:
        for name, weight in self.weights.items():
            if self.masters[name] is not weight:
                weight.copy_(self.masters[name])


def _fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """The settings of ``accelerate launch --use_fsdp``; None without it."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    version, policy = (os.environ.get(f"FSDP_{k}") for k in ("VERSION", "AUTO_WRAP_POLICY"))
    if version != "2":
        raise BadInput("accelerate launch --fsdp_version", version, "2")
    if policy not in {None, "NO_WRAP", "TRANSFORMER_BASED_WRAP"}:
        allowed = "NO_WRAP or TRANSFORMER_BASED_WRAP"
        raise BadInput("accelerate launch --fsdp_auto_wrap_policy", policy, allowed)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def _check_dtypes(objective: nn.Module, recipe: Recipe) -> None:
    """FSDP keeps a unit's trained weights in one buffer."""
    weights = list(objective.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in weights if p.requires_grad})
    needed = "float32" if recipe.precision == "bfloat16" else dtypes[0]
    if dtypes != [needed]:
        allowed = f"under FSDP all trained weights in {needed}: backbone.dtype = float32"
        raise BadInput("backbone.dtype", ", ".join(dtypes), allowed)
    if not all(p.is_floating_point() for p in weights):
        raise BadInput("backbone.quantize", "quantised weights", "none under FSDP")


def _check_units(plugin: FullyShardedDataParallelPlugin, objective: nn.Module) -> None:
    """Refuse blocks sharded one by one together with a prompt that the batch's users share.

    The prompt's keys and values reach the loss without passing the blocks' outputs, and FSDP
    gathers weights for the backward pass only at these outputs.
    """
    if plugin.auto_wrap_policy is None:
        return
    here = {type(module).__name__ for module in objective.modules()}
    # accelerate refuses a class that a model lacks, and a study trains several kinds of models
    units = [name for name in plugin.transformer_cls_names_to_wrap or () if name in here]
    plugin.transformer_cls_names_to_wrap = units
    models = [module for module in objective.modules() if isinstance(module, Recommender)]
    if units and any(len(model.prompt) and not model.lead for model in models):
        option = "accelerate launch --fsdp_transformer_layer_cls_to_wrap"
        raise BadInput(option, units[0], "none, or backbone.prompt = '' (the prompt is shared)")


def _copy(objective: nn.Module) -> nn.Module:
    """A copy with its own weights; other data of a module is shared."""
    values = (value for module in objective.modules() for value in vars(module).values())
    ours = (v for v in values if type(v).__module__.startswith("depthprobe."))
    return copy.deepcopy(objective, {id(v): v for v in ours if not isinstance(v, nn.Module)})


def _full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor placed like ``like``: on its device, sharded if it is."""
    moved = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(moved, like.device_mesh, like.placements)
    return moved
