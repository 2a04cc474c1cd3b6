"""The two layouts that are compared, around blocks with the same weights, and their batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.data.batches import length_buckets
from depthprobe.models.build import cut_copy, make_trainable
from depthprobe.models.recommender import Recommender
from depthprobe.study import Backbone, Recipe
from depthprobe.training.losses import catalogue_loss
from depthprobe.training.objectives import Batch, NextItem, make_batch

SIDES = ("padded", "shared")
D_ITEM, RANK = 128, 16  # SLMRec's item embeddings and low-rank updates
RECIPE = Recipe(objective="last")  # one target a user, SLMRec's


def _engine_speed() -> ModuleType:
    """The sibling study's script, which has the papers' layout; its name is this study's too."""
    path = Path(__file__).parents[1] / "engine_speed" / "measure.py"
    spec = importlib.util.spec_from_file_location("engine_speed_measure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


engine_speed = _engine_speed()
PROMPT, ITEMS, SUFFIX = engine_speed.PROMPT, engine_speed.ITEMS, engine_speed.SUFFIX
CATALOGUE = engine_speed.CATALOGUE


class Padded(engine_speed.Padded):
    """The papers' layout, also where the blocks compute in half precision."""

    def states(self, left: Tensor) -> Tensor:
        """(B, 30) to (B, 99, D), in the adapters' dtype."""
        return super().states(left).to(self.model.input_adapter.weight.dtype)


@dataclass(frozen=True)
class Side:
    """One layout at one depth: how it encodes users, and its training step."""

    encode: Callable[[Batch], Tensor]
    loss: Callable[[Batch], Tensor]
    model: Recommender


def recommender(
    backbone: nn.Module, depth: int, *, suffix: Sequence[int] = range(5, 5 + SUFFIX)
) -> Recommender:
    """The first blocks, with low-rank updates of their MLPs, between prompt and response slots."""
    own = cut_copy(backbone, range(depth))
    with torch.device(backbone.device):
        table = torch.randn(CATALOGUE + 1, D_ITEM)
        model = Recommender(own, table, range(3, 3 + PROMPT), suffix=suffix)
        make_trainable(model, Backbone(tuning="lora", lora_rank=RANK))
    return model


def side(name: str, model: Recommender) -> Side:
    """A layout around a recommender. The prompt of ``shared`` has run before users are encoded."""
    if name == "padded":
        padded = Padded(model)

        def loss(batch: Batch) -> Tensor:
            vectors = padded.encode(batch.inputs, batch.lengths)
            return catalogue_loss(vectors, model.item_matrix(), batch.targets, recipe=RECIPE)

        return Side(lambda batch: padded.encode(batch.inputs, batch.lengths), loss, model)
    prompts = []

    def encode(batch: Batch) -> Tensor:
        if not prompts:
            prompts.append(model.prepare_prompt())
        return model.encode(batch.inputs, batch.lengths, prompts[0])

    return Side(encode, NextItem(model, RECIPE), model)


def answers(chosen: Side, batches: Sequence[Batch]) -> Callable[[], None]:
    """An action: all batches from histories to the best ten items."""
    chosen.model.eval()

    @torch.inference_mode()
    def action() -> None:
        for batch in batches:
            (chosen.encode(batch) @ chosen.model.item_matrix().T).topk(10)

    return action


def steps(chosen: Side, batches: Sequence[Sequence[Batch]]) -> Callable[[], None]:
    """An action: a step of training for each batch, which comes in parts."""
    weights = [weight for weight in chosen.model.parameters() if weight.requires_grad]
    # the weights are random and what a step costs does not depend on where it leads
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)

    def action() -> None:
        chosen.model.train()
        for parts in batches:
            total = sum(part.count for part in parts)
            for part in parts:
                (chosen.loss(part) * (part.count / total)).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return action


def batches_of(
    users: list[np.ndarray], name: str, size: int, device: torch.device, *, part: int | None = None
) -> Iterator[list[Batch]]:
    """Batches of so many users, each in parts: as they come, or of like lengths for ``shared``."""
    make = partial(make_batch, users, device=device, objective="last")
    order = np.arange(len(users))
    chosen = [order[start : start + size] for start in range(0, len(users), size)]
    if name == "shared":
        chosen = length_buckets(np.array([len(user) for user in users]), size)
    for each in chosen:
        step = part or len(each)
        yield [make(each[start : start + step]) for start in range(0, len(each), step)]


def draw_users(count: int, lengths: str) -> list[np.ndarray]:
    """So many users' item ids: with Beauty's lengths, or the full 30 items and a target each."""
    if lengths == "full":
        rng = np.random.default_rng(0)
        return [rng.integers(1, CATALOGUE + 1, size=ITEMS + 1) for _ in range(count)]
    return engine_speed._users(None, count)
