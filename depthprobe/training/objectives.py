"""What a training minimises: the loss of the next item, at every position or at the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.data.batches import pad
from depthprobe.study import Recipe
from depthprobe.training.losses import catalogue_loss

Objective = Literal["every", "last"]


@dataclass(frozen=True)
class Batch:
    """Training windows: what is read of them, and which items are asked where."""

    chosen: np.ndarray  # (B,) indices of the windows
    inputs: Tensor  # (B, T) item ids, right-padded with 0
    lengths: Tensor  # (B,) items in each row of the inputs
    targets: Tensor  # (B, T) the item after each position, 0 on padding
    mask: Tensor  # (B, T) where the next item is asked
    count: int  # N, how many are asked
    objective: Objective
    draw: int = 0  # a number that all parts of a step share, to draw from


def make_batch(
    windows: list[np.ndarray],
    chosen: np.ndarray,
    device: torch.device,
    objective: Objective,
    *,
    draw: int = 0,
) -> Batch:
    """Inputs and targets of the chosen windows: all items but the last, all but the first.

    Args:
        objective: whether the next item is asked at every position, or at the last alone.
        draw: what an objective's own random choices are drawn from.
    """
    parts = [windows[i] for i in chosen]
    whole = torch.from_numpy(pad(parts)).to(device)
    sizes = np.array([len(part) - 1 for part in parts])
    lengths = torch.from_numpy(sizes).to(device)
    targets = whole[:, 1:]
    places = torch.arange(targets.shape[1], device=device)
    ends = lengths[:, None]
    mask = places == ends - 1 if objective == "last" else places < ends
    count = int(asked(parts, objective).sum())
    return Batch(chosen, whole[:, :-1], lengths, targets, mask, count, objective, draw)


def ask_last(batch: Batch) -> Batch:
    """The same windows, asked at their last positions alone."""
    places = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    mask = places == batch.lengths[:, None] - 1
    return replace(batch, mask=mask, count=len(batch.chosen), objective="last")


def asked(windows: Sequence[np.ndarray], objective: Objective) -> np.ndarray:
    """How many positions of each window are asked for the next item, (windows,)."""
    return np.array([1 if objective == "last" else len(window) - 1 for window in windows])


class NextItem(nn.Module):
    """A recommender with the loss that trains it: batches in, a mean over the asked items out.

    The model is called and its items are read inside one ``forward``, so that what wraps a module
    for several processes sees both.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of the batch's next items, a scalar."""
        vectors = asked_vectors(self.model, batch, self.recipe)  # (N, d)
        items: Tensor = self.model.item_matrix()  # type: ignore[operator]
        return catalogue_loss(vectors, items, batch.targets[batch.mask], recipe=self.recipe)


def asked_vectors(model: nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """User vectors where the batch asks for the next item, (N, d), in the order of its mask."""
    if recipe.objective == "last":
        last: Tensor = model(batch.inputs, batch.lengths)
        return last
    every: Tensor = model(batch.inputs)
    return every[batch.mask]
