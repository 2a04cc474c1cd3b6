"""Recommenders with random weights, and what is timed of them: answers and training steps."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from depthprobe.cost.workload import TOP, Workload
from depthprobe.errors import BadInput
from depthprobe.models.build import make_trainable
from depthprobe.models.recommender import Recommender
from depthprobe.study import Backbone

ModelT = TypeVar("ModelT", bound=nn.Module)
Action = Callable[[], object]
CHUNK = 2**28  # bytes of scores at a time


def dtype_of(config: PreTrainedConfig, workload: Workload) -> str:
    """The name of the dtype that the backbone computes in."""
    if workload.dtype != "auto":
        return workload.dtype
    written = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    return str(written).removeprefix("torch.")


def check_positions(config: PreTrainedConfig, workload: Workload) -> None:
    """Refuse histories that the backbone has no positions for."""
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    wanted = workload.prompt + workload.length
    if most is not None and wanted > most:
        allowed = f"with {workload.prompt} slots of prompt at most {most} positions of the backbone"
        raise BadInput("length", workload.length, allowed)


def random_backbone(
    config: PreTrainedConfig, workload: Workload, device: torch.device
) -> PreTrainedModel:
    """A backbone of this shape with random weights, made on the device; on ``meta`` with none."""
    auto: Any = AutoModelForCausalLM  # untyped in transformers
    touched = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=touched), torch.device(device):
        torch.default_generator.manual_seed(0)
        made: PreTrainedModel = auto.from_config(
            copy.deepcopy(config), dtype=getattr(torch, dtype_of(config, workload))
        )
    made.eval()
    return made


def plain_recommender(backbone: PreTrainedModel, workload: Workload) -> Recommender:
    """A recommender around the backbone, on its device, before anything is made trainable."""
    with torch.device(backbone.device):
        table = torch.randn(workload.items + 1, workload.width)
        return Recommender(backbone, table, [0] * workload.prompt)


def recommender(backbone: PreTrainedModel, workload: Workload) -> Recommender:
    """A recommender whose trained weights are those that the workload says."""
    model = plain_recommender(backbone, workload)
    with torch.device(backbone.device):
        make_trainable(model, Backbone(tuning=workload.tuning))
    return model


def shared_copy(model: ModelT) -> ModelT:
    """The same modules around the same weights: cut, it leaves the model as it is."""
    kept = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})


def encoding(model: Recommender, workload: Workload, batch: int) -> Action:
    """Users to vectors, (B, d). The prompt has run before, as it does where users are served."""
    histories, lengths = _users(model, workload, batch)
    with torch.inference_mode():
        prompt = model.prepare_prompt()

    @torch.inference_mode()
    def action() -> Tensor:
        return model.encode(histories, lengths, prompt)

    return action


def scoring(model: Recommender, batch: int) -> Action:
    """The best items of the whole catalogue for user vectors, (B, 10)."""
    items = model.item_matrix()
    vectors = torch.randn(batch, items.shape[1], device=items.device)
    return lambda: _best(vectors, items)


def answering(model: Recommender, workload: Workload, batch: int) -> Action:
    """End to end: histories to the best items, (B, 10)."""
    histories, lengths = _users(model, workload, batch)
    with torch.inference_mode():
        prompt = model.prepare_prompt()

    @torch.inference_mode()
    def action() -> Tensor:
        return _best(model.encode(histories, lengths, prompt), model.item_matrix())

    return action


def stepping(
    model: Recommender,
    workload: Workload,
    batch: int,
    *,
    state: defaultdict[Tensor, Any] | None = None,
) -> Action:
    """A training step: forward, cross-entropy of the next item at every position, backward, AdamW.

    Args:
        state: of an optimizer of other depths with the same weights, to be shared.
    """
    histories, _ = _users(model, workload, batch)
    targets = _items(model, workload, batch).flatten()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    fused = histories.device.type in {"cpu", "cuda"}
    # what a step costs does not depend on where it leads; at this rate it stays finite
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=fused or None)
    if state is not None:
        optimizer.state = state

    def action() -> None:
        vectors = model(histories).flatten(0, 1)  # (B T, d)
        vectors.backward(_gradient(vectors, model.item_matrix(), targets))
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return action


def _gradient(vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy over the catalogue, some positions at a time."""
    rows, parts = max(1, CHUNK // (4 * len(items))), []
    for part, wanted in zip(vectors.detach().split(rows), targets.split(rows), strict=True):
        part.requires_grad_()
        loss = cross_entropy(part @ items.T, wanted, reduction="sum") / len(targets)
        parts += torch.autograd.grad(loss, part)
    return torch.cat(parts)


@torch.inference_mode()
def _best(vectors: Tensor, items: Tensor) -> Tensor:
    rows = max(1, CHUNK // (4 * len(items)))
    return torch.cat([(part @ items.T).topk(TOP).indices for part in vectors.split(rows)])


def _users(model: Recommender, workload: Workload, batch: int) -> tuple[Tensor, Tensor]:
    histories = _items(model, workload, batch)
    return histories, torch.full((batch,), workload.length, device=histories.device)


def _items(model: Recommender, workload: Workload, batch: int) -> Tensor:
    place = model.item_matrix().device
    return torch.randint(1, workload.items + 1, (batch, workload.length), device=place)
