"""Training objectives: the loss of the next item, at one depth or at several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.data.batches import pad
from depthprobe.models.own import OwnRecommender
from depthprobe.models.parts import check_readable
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.skipping import after_blocks, skip_blocks
from depthprobe.models.taps import tap_blocks
from depthprobe.study import Elastic, Recipe
from depthprobe.training.losses import catalogue_loss

Objective = Literal["every", "last"]  # the target positions of a window


@dataclass(frozen=True)
class Batch:
    """B training windows with N target positions, each of which predicts the next item."""

    chosen: np.ndarray  # (B,) indices of the windows
    inputs: Tensor  # (B, T) item ids, right-padded with 0
    lengths: Tensor  # (B,) items in each row of the inputs
    rows: Tensor  # (N,) the target positions, as indices into the flattened inputs (B T)
    targets: Tensor  # (N,) the item that follows each of them
    last: Tensor  # (B,) each window's last item
    objective: Objective
    draw: int = 0  # a random number that all parts and processes of a step share

    @property
    def count(self) -> int:
        """N, the number of target positions."""
        return len(self.rows)

    @property
    def ends(self) -> Tensor | None:
        """``lengths`` if only the last position is read out; None for all positions."""
        return self.lengths if self.objective == "last" else None


def make_batch(
    windows: list[np.ndarray],
    chosen: np.ndarray,
    device: torch.device,
    objective: Objective,
    *,
    draw: int = 0,
) -> Batch:
    """Inputs and targets of the chosen windows: all items but the last, all but the first."""
    padded = pad([windows[i] for i in chosen])  # (B, T + 1)
    sizes = np.array([len(windows[i]) - 1 for i in chosen])  # (B,)
    width = padded.shape[1] - 1
    last = padded[np.arange(len(padded)), sizes]
    # computed on the host, which knows the lengths, without waiting for a GPU
    if objective == "every":
        inside = np.arange(width) < sizes[:, None]  # (B, T)
        rows, targets = np.flatnonzero(inside), padded[:, 1:][inside]
    else:
        rows, targets = np.arange(len(sizes)) * width + sizes - 1, last

    padded[np.arange(len(padded)), sizes] = 0  # no input, even where longer windows leave room

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return Batch(
        chosen=chosen,
        inputs=put(padded[:, :-1]),
        lengths=put(sizes),
        rows=put(rows),
        targets=put(targets),
        last=put(last),
        objective=objective,
        draw=draw,
    )


def last_only(batch: Batch) -> Batch:
    """The same windows with their last positions as the only targets."""
    starts = torch.arange(len(batch.lengths), device=batch.lengths.device) * batch.inputs.shape[1]
    rows = starts + batch.lengths - 1
    return replace(batch, rows=rows, targets=batch.last, objective="last")


def count_targets(windows: Sequence[np.ndarray], objective: Objective) -> np.ndarray:
    """The number of target positions of each window, (windows,)."""
    return np.array([1 if objective == "last" else len(window) - 1 for window in windows])


def at_rows(states: Tensor, rows: Tensor) -> Tensor:
    """States (B, T, D) at some indices of the flattened (B T), (N, D)."""
    return states.flatten(0, 1).index_select(0, rows)


def target_states(model: Recommender, states: Tensor, batch: Batch) -> Tensor:
    """A block's output (B, P, D), prompt included, at the batch's target positions, (N, D)."""
    if batch.objective == "last":
        return states_at(states, model.last_place(batch.inputs, batch.lengths))
    return at_rows(model.after_items(states, batch.inputs), batch.rows)


def at_targets(vectors: Tensor, batch: Batch) -> Tensor:
    """A model's user vectors, (B, T, d) or (B, d), at the batch's target positions, (N, d)."""
    return vectors if batch.objective == "last" else at_rows(vectors, batch.rows)


class NextItem(nn.Module):
    """A recommender with its loss: takes a batch, returns the mean over its targets.

    A wrapper for several processes must see both the model's call and its items, so both happen
    inside ``forward``.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of the batch's targets, a scalar."""
        if isinstance(self.model, OwnRecommender) and self.model.own_loss is not None:
            targets = torch.zeros_like(batch.inputs)  # (B, T)
            targets.view(-1)[batch.rows] = batch.targets.to(targets.dtype)
            return self.model.loss(batch.inputs, batch.lengths, targets)
        vectors = at_targets(self.model(batch.inputs, batch.ends), batch)  # (N, d)
        items: Tensor = self.model.item_matrix()  # type: ignore[operator]
        return catalogue_loss(vectors, items, batch.targets, recipe=self.recipe)


def dropout_rates(depth: int, most: float) -> np.ndarray:
    """``most (2^(l / (L - 1)) - 1)`` of each block: never the first, the last with ``most``, (L,).

    >>> dropout_rates(3, 0.1).round(4).tolist()
    [0.0, 0.0414, 0.1]
    """
    return np.asarray(most * (2 ** (np.arange(depth) / max(1, depth - 1)) - 1))


class ElasticObjective(nn.Module):
    """One recommender that is good at every depth: early-exit losses and layer dropout.

    LayerSkip (Elhoushi et al., arXiv 2404.16710). All depths share the final norm and the output
    adapter, so each prefix is an ordinary recommender: cut to k blocks, it is the model at exit k.
    LayerSkip drops blocks for some sequences of a batch, but computes them anyway. Here a step
    drops them for the whole batch and saves their time, as LayerDrop does (arXiv 1909.11556).
    """

    def __init__(self, model: Recommender, settings: Elastic, recipe: Recipe) -> None:
        """Refuse, with ``ValueError``, a backbone that can't be read out at each depth."""
        super().__init__()
        check_readable(model.backbone, streams=False)
        self.model, self.settings, self.recipe = model, settings, recipe

    def forward(self, batch: Batch) -> Tensor:
        """The full depth's loss plus the weighted mean of some exits' losses, a scalar.

        The dropped blocks and the exits are drawn from the batch's ``draw``: the same in all parts
        and processes of a step.
        """
        model, settings, depth = self.model, self.settings, self.model.depth
        draws = np.random.default_rng(batch.draw)
        dropped = draws.random(depth) < dropout_rates(depth, settings.dropout)
        exits = draws.permutation(np.arange(1, depth))[: settings.exits]
        skipped = np.flatnonzero(dropped).tolist() if self.training else []
        with skip_blocks(model.backbone, skipped), tap_blocks(model.backbone) as tap:
            vectors = at_targets(model(batch.inputs, batch.ends), batch)  # (N, d)
        loss = self._loss(vectors, batch)
        for exit_depth in exits.tolist():
            state = target_states(model, tap.states[exit_depth], batch)  # (N, D)
            normed = after_blocks(model.backbone, state[:, None])[:, 0]
            exit_vectors = model.read_out(normed.to(vectors.dtype))  # (N, d)
            loss = loss + settings.weight / len(exits) * self._loss(exit_vectors, batch)
        return loss

    def _loss(self, vectors: Tensor, batch: Batch) -> Tensor:
        items = self.model.item_matrix()
        return catalogue_loss(vectors, items, batch.targets, recipe=self.recipe)
