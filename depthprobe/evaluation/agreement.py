"""How alike two top-K lists are: how many items they share, and how far up they share them."""

from __future__ import annotations

from typing import Any

import numpy as np


def overlap(a: Any, b: Any) -> np.ndarray:
    """The share of items that two lists have in common, whatever their order: ``|A & B| / K``.

    Where fewer than K items are left for a user, a list ends in 0s. These are never shared, and K
    is the number of items in the longer list. Two empty lists are alike: 1.

    Args:
        a: (..., K) items from 1, no item twice; 0 at the end for no item.
        b: (..., K) likewise; the leading dimensions are broadcast.

    Returns:
        (...,) float64 in [0, 1].

    Raises:
        ValueError: if shapes disagree, an item is repeated, or one follows a 0.
    """
    first, second = _lists(a, b)
    shared = _matches(first, second).sum(axis=(-2, -1))  # (...,)
    longer = np.maximum(_lengths(first), _lengths(second))
    return np.where(longer > 0, shared / np.maximum(longer, 1), 1.0)


def rank_biased_overlap(a: Any, b: Any, p: float = 0.9) -> np.ndarray:
    """RBO_ext of two lists of equal length (Webber, Moffat and Zobel 2010, eq. 30).

    With ``X_d`` the number of items that the first d places share and ``A_d = X_d / d``, it is
    ``A_K p^K + (1 - p) / p * sum_{d=1..K} A_d p^d``: the agreement at all depths, where the d-th
    weighs ``(1 - p) p^(d - 1)`` and the unseen rest is taken to agree as the K-th does. At p = 0.9
    the first ten places carry 86 % of the weight of an endless list.

    Args:
        a: (..., K) items from 1, best first, no item twice; 0 at the end for no item. K is the
            number of items.
        b: (..., K) likewise; the leading dimensions are broadcast.
        p: above 0 and below 1; the smaller, the more the top counts.

    Returns:
        (...,) float64 in [0, 1]; 1 for two empty lists.

    Raises:
        ValueError: as :func:`overlap`, if ``p`` is not in (0, 1), or if a list has more items than
            the other: that is another formula (eq. 32).
    """
    if not 0 < p < 1:
        raise ValueError(f"p is {p}, expected a number between 0 and 1")
    first, second = _lists(a, b)
    length = _lengths(first)[..., None]  # (..., 1)
    if not np.array_equal(length[..., 0], _lengths(second)):
        raise ValueError("rank-biased overlap needs lists of equal length: some have more 0s")
    matches = _matches(first, second)
    depth = np.arange(1, first.shape[-1] + 1)  # (K,)
    # an item is shared from the lower of its two places on
    joined = [matches[..., d, : d + 1].sum(-1) + matches[..., :d, d].sum(-1) for d in depth - 1]
    agreement = np.cumsum(np.stack(joined, axis=-1), axis=-1) / depth  # (..., K)
    # (1 - p) p^(K - 1) + p^K, the last place and the rest, is p^(K - 1)
    weight = np.where(depth < length, (1 - p) * p ** (depth - 1.0), 0.0)
    weight = np.where(depth == length, p ** (depth - 1.0), weight)  # (..., K)
    alike = np.minimum((weight * agreement).sum(axis=-1), 1.0)
    return np.where(length[..., 0] > 0, alike, 1.0)


def _lists(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of one shape, checked."""
    lists = [np.asarray(each) for each in (a, b)]
    shapes = [each.shape for each in lists]
    if any(not shape for shape in shapes) or not shapes[0][-1] or shapes[0][-1] != shapes[1][-1]:
        raise ValueError(f"expected two (..., K) of items with one K, got {shapes[0]}, {shapes[1]}")
    for each in lists:
        if each.dtype.kind not in "iu":
            raise ValueError(f"items are {each.dtype}, expected integers")
        if ((each[..., 1:] != 0) & (each[..., :-1] == 0)).any():
            raise ValueError("an item follows a 0, expected 0s at the end of a list only")
        ordered = np.sort(each, axis=-1)
        if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != 0)).any():
            raise ValueError("a list has an item twice")
    first, second = np.broadcast_arrays(*lists)
    return first, second


def _matches(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether place i of the one holds the item at place j of the other, bool (..., K, K)."""
    places = first[..., :, None]
    same: np.ndarray = (places == second[..., None, :]) & (places != 0)
    return same


def _lengths(lists: np.ndarray) -> np.ndarray:
    return np.asarray(np.count_nonzero(lists, axis=-1))
