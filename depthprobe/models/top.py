"""The best of each row of scores in one defined order, so that ties never shuffle a list."""

from __future__ import annotations

import torch
from torch import Tensor


def best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of each row, best first, the lower column first on ties.

    What a stable sort of the row gives, for the price of a ``topk``: that one finds the values,
    but which of the columns that share the k-th value it returns is left to chance. Only rows
    where such columns are left over are looked at again.

    Args:
        scores: (C, I), floating point; infinities are allowed.
        k: from 1 to I.

    Returns:
        Columns, int64 (C, k), and their scores (C, k).
    """
    width = scores.shape[1]
    values, columns = scores.topk(min(k + 1, width), dim=1)
    if k < width:
        over = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]  # (R,)
        values, columns = values[:, :k], columns[:, :k]
        # a quarter at a time: working on them takes no more memory than the scores themselves
        for rows in over.split(len(scores) // 4 + 1):
            columns[rows] = _lowest(scores[rows], values[rows], columns[rows])
    columns = columns.sort(dim=1).values  # by column ...
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), values  # ... then by score: ties stay in column order


def _lowest(scores: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """(R, k) columns of a ``topk``, those at the last value replaced by the lowest ones at it."""
    width, k = scores.shape[1], values.shape[1]
    limit = values[:, -1:]  # (R, 1)
    places = torch.arange(width, dtype=torch.int32, device=scores.device)
    level = torch.where(scores == limit, places, width)  # (R, I)
    lowest = level.topk(k, dim=1, largest=False).indices  # ascending; first the columns at limit
    apart = values != limit  # the best of a row: all its columns above the limit
    ahead = apart.sum(dim=1, keepdim=True)
    turn = (torch.arange(k, device=scores.device) - ahead).clamp(min=0)
    return torch.where(apart, columns, lowest.gather(1, turn))
