"""Item vectors read from titles: a linear read-out in closed form, and how they are spread.

The loop of :mod:`depthprobe.probing.readout` would not do. There all depths share one item matrix,
and one learning rate suits their states because the final norm makes them similar. Here every depth
has its own item matrix, and vectors vary in all directions at some depths and in few at others.
With one learning rate the results would show how fast a depth is fitted; least squares show what
it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depthprobe.data.batches import length_buckets, pad
from depthprobe.evaluation.ranks import BATCH, EvalSet, evaluate, mean_ndcg
from depthprobe.models.recommender import states_at
from depthprobe.probing.passes import exact

# ridges to choose from, times the mean eigenvalue of the least squares
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class TitleReadout:
    """Scores ``x M e``: a user's features, a linear map, an item's vector."""

    table: Tensor  # (I + 1, D), row 0 is zero
    weight: Tensor  # (2 D + 1, D)

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """User vectors after the last item, (B, T) and (B,) -> (B, D)."""
        return states_at(user_features(self.table, histories), lengths - 1) @ self.weight

    def item_matrix(self) -> Tensor:
        """(I + 1, D); row 0 is padding."""
        return self.table


def user_features(table: Tensor, histories: Tensor) -> Tensor:
    """A user's features at each position: the item there, the mean of all up to it, and 1.

    (I + 1, D) and (B, T) -> (B, T, 2 D + 1). The 1 lets the map learn how popular items are.
    """
    vectors = table[histories]  # (B, T, D)
    counts = torch.arange(1, histories.shape[1] + 1, device=table.device)
    means = vectors.cumsum(dim=1) / counts[:, None]
    return torch.cat([vectors, means, torch.ones_like(vectors[..., :1])], dim=-1)


@torch.inference_mode()
def fit_title_readout(
    table: Tensor, windows: Sequence[np.ndarray], validation: EvalSet
) -> TitleReadout:
    """The map of the ridge regression on the next item at every position of the windows.

    It minimises ``sum over positions n and items i of (x_n M e_i - [i is next])² + r |M|²``, whose
    gradient is zero where ``A M C + r M = G`` with ``A = sum x x'``, ``C = sum e e'`` and ``G = sum
    x e'`` of the next items: a division in the eigenvectors of A and C. Validation NDCG@10 by full
    ranking chooses the ridge r.
    """
    table, width = table.float(), table.shape[1]
    inputs, outputs = 2 * width + 1, exact(table[1:])
    gram = outputs.new_zeros(inputs, inputs)  # A
    cross = outputs.new_zeros(inputs, width)  # G
    for chosen in length_buckets([len(window) for window in windows], BATCH):
        padded = torch.from_numpy(pad([windows[i] for i in chosen])).to(table.device)  # (B, T + 1)
        inside = padded[:, 1:] != 0
        users = user_features(table, padded[:, :-1])[inside]  # (N, 2 D + 1)
        gram += exact(users.T @ users)
        cross += exact(users.T @ table[padded[:, 1:][inside]])
    a, u = torch.linalg.eigh(gram)
    c, v = torch.linalg.eigh(outputs.T @ outputs)
    inner, sizes = u.T @ cross @ v, a.clamp(min=0)[:, None] * c.clamp(min=0)  # (2 D + 1, D)
    maps = (u @ (inner / (sizes + ridge * sizes.mean())) @ v.T for ridge in RIDGES)
    readouts = [TitleReadout(table, weight.to(table)) for weight in maps]
    ranks = (evaluate(each, validation, device=table.device)["full"] for each in readouts)
    return readouts[int(np.argmax([mean_ndcg(own) for own in ranks]))]


def anisotropy(table: Tensor) -> float:
    """Mean cosine of two different items of (I + 1, D): near 1 all point the same way.

    From only the sum s of the I directions: ``(s s - I) / (I (I - 1))``.
    """
    directions = torch.nn.functional.normalize(exact(table[1:]), dim=1)
    number = len(directions)
    return float((directions.sum(dim=0).square().sum() - number) / (number * (number - 1)))


def effective_rank(table: Tensor) -> float:
    """In how many directions the items of (I + 1, D) vary: 1 to D.

    The exponential of the entropy of the eigenvalues of their covariance, each as a share of the
    variance (Roy and Vetterli, EUSIPCO 2007, who take the singular values of the table itself).
    """
    items = exact(table[1:])
    centred = items - items.mean(dim=0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    shares = values / values.sum()
    return math.exp(float(torch.special.entr(shares).sum()))
