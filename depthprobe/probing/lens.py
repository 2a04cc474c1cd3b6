"""Tuned lens: how far each depth is from the final answer, through the teacher's own head.

A translator at each depth turns its state into what the head expects behind the last block,
``U(norm(h + A h + b))`` (Belrose et al., arXiv 2303.08112). It learns the teacher's distribution
over the items and never sees a target, so it shows when the teacher has made up its mind; a
read-out shows when the target can be known.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from depthprobe.probing.fitting import (
    CachedStates,
    Fitting,
    Readouts,
    fit_side_by_side,
    working_dtype,
)
from depthprobe.probing.passes import Probed, vectors_of

SAMPLE = 1024  # users that the size of a depth's states is taken from


def fit_lenses(
    model: Probed,
    train: CachedStates,
    validation: CachedStates,
    *,
    device: torch.device,
    seed: int,
    settings: Fitting | None = None,
) -> Readouts:
    """Fit a translator at each depth 0..L - 1; depth L needs none, and keeps the zero one.

    By the KL divergence from the model's own distribution over the items to the translated one.
    All start at zero, which is early exit, and a depth where nothing does better on the validation
    targets stays there. The model stays as it is.

    Args:
        model: in evaluation mode, the one that the states are of.
        train: its targets are not used.
        validation: what chooses each depth's epoch, by NDCG@10 as for read-outs.
        seed: of the order of the users.
    """
    sample = train.at(
        np.arange(min(SAMPLE, len(train.states))), device, working_dtype(model.item_matrix())
    )
    # steps of one length would move a bias far at depth 0, whose states are small, and hardly
    # behind the other blocks
    size = sample.square().mean(dim=(1, 2), keepdim=True).sqrt()  # (L + 1, 1, 1)
    moves = torch.ones_like(size)
    size[-1] = moves[-1] = 0

    def read(model: Probed, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return read_translated(model, states, moves * weight, size * bias)

    fitted = fit_side_by_side(
        model,
        train,
        validation,
        read=read,
        weight=sample.new_zeros(len(sample), sample.shape[-1], sample.shape[-1]),
        wanted=lambda states, _: _unembed(model, states[-1:])[0],
        device=device,
        seed=seed,
        settings=settings or Fitting(),
    )
    return replace(
        fitted, read=read_translated, weight=moves * fitted.weight, bias=size * fitted.bias
    )


def read_translated(model: Probed, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``U(norm(h + h A' + b))``: (K, B, D), (K, D, D), (K, 1, D) -> (K, B, d)."""
    return _unembed(model, states + torch.baddbmm(bias, states, weight))


def _unembed(model: Probed, states: Tensor) -> Tensor:
    return vectors_of(model, states.to(model.backbone.dtype)).to(states.dtype)
