"""Read-outs: a fresh linear output adapter at every depth of a frozen teacher.

Early exit reads every depth with the one head that was trained behind the last block. Where it
fails, either the depth does not know the answer yet, or that head cannot read it there. A head
fitted at the depth itself tells these apart (a linear probe: Alain and Bengio, arXiv 1610.01644).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from depthprobe.evaluation.evaluate import Questions, Ranks
from depthprobe.probing.fitting import (
    CachedStates,
    Fitting,
    Readouts,
    fit_side_by_side,
    working_dtype,
)
from depthprobe.probing.passes import Probed, normed, passes


def fit_readouts(
    model: Probed,
    train: CachedStates,
    validation: CachedStates,
    *,
    device: torch.device,
    seed: int,
    settings: Fitting | None = None,
) -> Readouts:
    """Fit a linear map from normed states to user vectors at each depth 0..L.

    By the cross-entropy of the target against the catalogue, scored with the model's own item
    matrix. That is convex in the map, so all start at zero. The model stays as it is.

    Args:
        model: in evaluation mode, the one that the states are of.
        train: one question a user; what it was trained on itself will do, but then the deepest
            states may know the targets better than those of new users do.
        validation: what chooses each depth's epoch.
        seed: of the order of the users.
    """
    items = model.item_matrix()
    sample = train.at(np.arange(1), device, working_dtype(items))
    width = _normed(model, sample).shape[-1]
    start = torch.zeros(len(sample), width, items.shape[1]).to(sample)
    return fit_side_by_side(
        model,
        train,
        validation,
        read=read_linear,
        weight=start,
        wanted=lambda _, targets: targets,
        device=device,
        seed=seed,
        settings=settings or Fitting(),
    )


def read_linear(model: Probed, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``norm(h) W + b`` at each depth: (K, B, D), (K, D, d), (K, 1, d) -> (K, B, d)."""
    return torch.baddbmm(bias, _normed(model, states), weight)


@torch.no_grad()
def _normed(model: Probed, states: Tensor) -> Tensor:
    return normed(model, states.to(model.backbone.dtype)).to(states.dtype)


@torch.inference_mode()
def rank_readouts(
    model: Probed, fitted: Readouts, asked: Questions, *, device: torch.device
) -> list[dict[str, np.ndarray]]:
    """Ranks of every user's target at each depth 0..L, by protocol, each (E,).

    From one pass over the users; nothing is kept but the states of the current batch.

    Args:
        model: in evaluation mode, the one that the read-outs were fitted to.
    """
    items = model.item_matrix()
    found = [Ranks(len(asked.users)) for _ in fitted.weight]
    for batch in passes(model, asked, device=device):
        vectors = fitted.vectors(model, batch.states)
        for ranks, each in zip(found, vectors, strict=True):
            ranks.put(batch.chosen, asked.rank(batch.chosen, each, items))
    return [ranks.values for ranks in found]
