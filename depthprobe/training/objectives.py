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
    rows: Tensor  # (N,) where the next item is asked, in the flattened inputs (B T)
    targets: Tensor  # (N,) the item that is asked there
    last: Tensor  # (B,) each window's last item
    objective: Objective
    draw: int = 0  # a number that all parts of a step share, to draw from

    @property
    def count(self) -> int:
        """N, how many items are asked."""
        return len(self.rows)


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
    whole = pad([windows[i] for i in chosen])  # (B, T + 1)
    sizes = np.array([len(windows[i]) - 1 for i in chosen])
    # on the host, where the lengths are known: a GPU would be asked, and wait
    asked_at = np.arange(whole.shape[1] - 1) < sizes[:, None]  # (B, T)
    last = whole[np.arange(len(whole)), sizes]
    every = objective == "every"

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return Batch(
        chosen=chosen,
        inputs=put(whole[:, :-1]),
        lengths=put(sizes),
        rows=put(np.flatnonzero(asked_at) if every else _ends(sizes, asked_at.shape[1])),
        targets=put(whole[:, 1:][asked_at] if every else last),
        last=put(last),
        objective=objective,
        draw=draw,
    )


def last_only(batch: Batch) -> Batch:
    """The same windows, asked at their last positions alone."""
    ends = torch.arange(len(batch.lengths), device=batch.lengths.device) * batch.inputs.shape[1]
    rows = ends + batch.lengths - 1
    return replace(batch, rows=rows, targets=batch.last, objective="last")


def _ends(sizes: np.ndarray, width: int) -> np.ndarray:
    """The last places of rows of so many items, in the flattened rows, (B,)."""
    ends: np.ndarray = np.arange(len(sizes)) * width + sizes - 1
    return ends


def at_rows(states: Tensor, rows: Tensor) -> Tensor:
    """Those of states (B, T, D) that stand at so many places of (B T), (N, D)."""
    return states.flatten(0, 1).index_select(0, rows)


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
        vectors = target_vectors(self.model, batch, self.recipe)  # (N, d)
        items: Tensor = self.model.item_matrix()  # type: ignore[operator]
        return catalogue_loss(vectors, items, batch.targets, recipe=self.recipe)


def target_vectors(model: nn.Module, batch: Batch, recipe: Recipe) -> Tensor:
    """User vectors where the batch asks for the next item, (N, d)."""
    if recipe.objective == "last":
        last: Tensor = model(batch.inputs, batch.lengths)
        return last
    every: Tensor = model(batch.inputs)
    return at_rows(every, batch.rows)
