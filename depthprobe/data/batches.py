"""Batches of similar lengths, right padding, and the seeded negatives of the sampled protocol."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from depthprobe.data.storage import Sequences

TABLE_BYTES = 4 * 2**20  # fits a cache, since the draws access it at random


def length_buckets(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    pool: int = 50,
) -> list[np.ndarray]:
    """Cut indices into batches whose sequences have about the same length.

    With a seed: shuffle all, cut into pools of ``pool * batch_size``, sort each pool by length,
    cut it into batches, shuffle the batches. So a batch is random but hardly padded. Without
    one: everything sorted by length, longest first, ties by index.

    Each index 0..len(lengths)-1 is in exactly one of the arrays, int64.
    """
    sizes = np.asarray(lengths)
    if seed is None:
        # the longest first, so that a batch too large for memory fails at once
        return _cut(np.argsort(-sizes, kind="stable"), batch_size)
    rng = np.random.default_rng((seed, epoch))
    shuffled = rng.permutation(len(sizes))
    batches = [
        batch
        for part in _cut(shuffled, pool * batch_size)
        for batch in _cut(part[np.argsort(sizes[part], kind="stable")], batch_size)
    ]
    return [batches[index] for index in rng.permutation(len(batches))]


def pad(sequences: Sequence[np.ndarray], *, value: int = 0) -> np.ndarray:
    """Right-pad B sequences to the longest, int64 (B, T)."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    padded = np.full((len(lengths), int(lengths.max(initial=0))), value, dtype=np.int64)  # (B, T)
    if lengths.sum():
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(sequences)
    return padded


def negatives(
    sequences: Sequences,
    users: np.ndarray,
    *,
    count: int = 999,
    seed: int,
    pool: np.ndarray | None = None,
) -> np.ndarray | None:
    """Negatives for each of E users, without replacement, the same at every call.

    No negative is an item the user has interacted with, so targets are never drawn.

    Args:
        pool: items with repeats, such as those of all training interactions. Each next negative is
            drawn from the items left with a chance proportional to their number in the pool
            (successive sampling); items not in the pool are never drawn. None draws uniformly from
            all items.

    Returns:
        int32 (E, count), values 1..I; None if some user has fewer than ``count`` items to draw
        from.
    """
    n_items, offsets = sequences.n_items, sequences.offsets
    rng = np.random.default_rng(seed)
    if pool is not None:
        weights = np.bincount(pool, minlength=n_items + 1)
        widths, distinct = _distinct_by_width(weights, count)
    chunk = max(1, TABLE_BYTES // (8 * (n_items + 1)))
    drawn = np.empty((len(users), count), dtype=np.int32)
    for start in range(0, len(users), chunk):
        part = users[start : start + chunk]
        lengths = offsets[part + 1] - offsets[part]
        # what a row must not draw: padding, items not in the pool, the user's own; (C, I + 1)
        taken = np.zeros((len(part), n_items + 1), dtype=bool)
        taken[:, 0] = True
        if pool is not None:
            taken[:, weights == 0] = True
        own = np.concatenate([sequences.history(user) for user in part])
        taken[np.repeat(np.arange(len(part)), lengths), own] = True
        left = n_items + 1 - taken.sum(axis=1)
        if left.min() < count:
            return None
        # The first draws of a stream of items, skipping repeats and taken ones, are a sample
        # without replacement: uniform, or successive if the stream comes from the pool. A width
        # of 0 means that a random key for every item is cheaper than that many draws.
        if pool is None:
            width = _uniform_width(n_items + 1, count, int(left.min()))
            draws = rng.integers(1, n_items + 1, size=(len(part), width), dtype=np.int32)
        else:
            # a row that still finds too few is drawn again with a key for each item
            aim = count + 2 * np.sqrt(count) + np.quantile(lengths, 0.9)
            place = int(np.searchsorted(distinct, aim))
            width = 0 if place == len(widths) else int(widths[place])
            draws = np.asarray(pool)[rng.integers(len(pool), size=(len(part), width))]
        chosen, enough = _first_distinct(draws.astype(np.int32, copy=False), taken, count)
        if not enough.all():
            few = ~enough
            chosen[few] = _draw_by_keys(rng, taken[few], count, None if pool is None else weights)
        drawn[start : start + chunk] = chosen
    return drawn


def _uniform_width(n_columns: int, count: int, left: int) -> int:
    """How many uniform draws find ``count`` of ``left`` free items: a coupon-collector sum."""
    needed = n_columns * np.log((left + 1) / (left - count + 1))
    return 0 if needed > n_columns / 2 else int(needed + 5 * np.sqrt(needed) + 10)


def _distinct_by_width(weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of draws from a pool, and how many different items each finds on average."""
    ratio = 1 - weights / weights.sum()
    most = max(count, (len(weights) - 1) / 2)  # more draws never pay
    widths = np.unique(np.geomspace(count, most, 24).astype(int))
    return widths, np.array([(1 - ratio**width).sum() for width in widths])


def _first_distinct(
    draws: np.ndarray, taken: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` different free items of each row of draws, int32, and who has as many."""
    n_rows, width = draws.shape
    chosen = np.empty((n_rows, count), dtype=np.int32)
    if width == 0:
        return chosen, np.zeros(n_rows, dtype=bool)
    rows = np.arange(n_rows)[:, None]
    place = np.arange(width, dtype=np.int32)
    first = np.empty(taken.shape, dtype=np.int32)  # where each item is drawn first
    # writing in reverse keeps the first of equal draws; numpy would undo a reversed view
    first[rows, np.ascontiguousarray(draws[:, ::-1])] = place[::-1].copy()
    fresh = (first[rows, draws] == place) & ~taken[rows, draws]  # (C, width)
    order = np.cumsum(fresh, axis=1)
    enough = order[:, -1] >= count
    chosen[enough] = draws[enough][(fresh & (order <= count))[enough]].reshape(-1, count)
    return chosen, enough


def _draw_by_keys(
    rng: np.random.Generator, taken: np.ndarray, count: int, weights: np.ndarray | None
) -> np.ndarray:
    """The free columns with the smallest random keys.

    Exponential keys divided by the weights give a sample without replacement in proportion to the
    weights (Efraimidis and Spirakis 2006).
    """
    if weights is None:
        keys = rng.random(taken.shape)
    else:
        keys = rng.standard_exponential(taken.shape) / np.maximum(weights, 1)  # 0 is always taken
    keys[taken] = np.inf
    smallest: np.ndarray = np.argpartition(keys, count - 1, axis=1)[:, :count]
    return smallest


def _cut(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
