"""Batches of like lengths, right padding, and the seeded negatives of the sampled protocol."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from depthprobe.data.storage import Sequences

TABLE_BYTES = 4 * 2**20  # fits a cache: the draws jump about in it


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

    Returns:
        int64 arrays; each index 0..len(lengths)-1 stands in exactly one of them.
    """
    if batch_size < 1 or pool < 1:
        raise ValueError(f"batch_size is {batch_size} and pool is {pool}, expected 1 or more")
    sizes = np.asarray(lengths)
    if seed is None:
        # the longest first: what does not fit into memory fails at once
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


def padding_share(lengths: Sequence[int] | np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """The share of slots that are padding when each batch is as wide as its longest sequence."""
    sizes = np.asarray(lengths)
    slots = sum(len(batch) * int(sizes[batch].max(initial=0)) for batch in batches)
    used = sum(int(sizes[batch].sum()) for batch in batches)
    return 1 - used / slots if slots else 0.0


def negatives(
    sequences: Sequences, users: np.ndarray, *, count: int = 999, seed: int
) -> np.ndarray | None:
    """Uniform negatives for each of E users, without replacement, the same at every call.

    None is an item that the user has ever interacted with, so neither target is among them.

    Returns:
        int32 (E, count), values 1..I; None if some user has fewer than ``count`` items left.
    """
    n_items, offsets = sequences.n_items, sequences.offsets
    rng = np.random.default_rng(seed)
    chunk = max(1, TABLE_BYTES // (8 * (n_items + 1)))
    drawn = np.empty((len(users), count), dtype=np.int32)
    for start in range(0, len(users), chunk):
        part = users[start : start + chunk]
        lengths = offsets[part + 1] - offsets[part]
        rows = np.repeat(np.arange(len(part)), lengths)
        own = np.concatenate([sequences.history(user) for user in part])
        taken = np.zeros((len(part), n_items + 1), dtype=bool)
        taken[:, 0] = True
        taken[rows, own] = True
        left = n_items + 1 - taken.sum(axis=1)
        if left.min() < count:
            return None
        drawn[start : start + chunk] = _draw(rng, taken, count, int(left.min()))
    return drawn


def _draw(rng: np.random.Generator, taken: np.ndarray, count: int, left: int) -> np.ndarray:
    """``count`` distinct free columns of each row, uniformly; int (C, count)."""
    n_rows, n_columns = taken.shape
    # The first draws of a stream of uniform items, repeats and taken ones passed over, are a
    # uniform sample without replacement. The expected number needed is a coupon-collector sum.
    needed = n_columns * np.log((left + 1) / (left - count + 1))
    if needed > n_columns / 2:  # a key for every item is cheaper than so many draws
        return _draw_by_keys(rng, taken, count)
    width = int(needed + 5 * np.sqrt(needed) + 10)
    draws = rng.integers(1, n_columns, size=(n_rows, width), dtype=np.int32)
    rows = np.arange(n_rows)[:, None]
    place = np.arange(width, dtype=np.int32)
    first = np.empty((n_rows, n_columns), dtype=np.int32)
    first[rows, draws[:, ::-1]] = place[::-1]  # of equal draws the last written, the first, stays
    fresh = (first[rows, draws] == place) & ~taken[rows, draws]  # (C, width)
    order = np.cumsum(fresh, axis=1)
    enough = order[:, -1] >= count
    chosen = np.empty((n_rows, count), dtype=np.int32)
    chosen[enough] = draws[enough][(fresh & (order <= count))[enough]].reshape(-1, count)
    if not enough.all():
        chosen[~enough] = _draw_by_keys(rng, taken[~enough], count)
    return chosen


def _draw_by_keys(rng: np.random.Generator, taken: np.ndarray, count: int) -> np.ndarray:
    keys = rng.random(taken.shape)
    keys[taken] = 2.0
    smallest: np.ndarray = np.argpartition(keys, count - 1, axis=1)[:, :count]
    return smallest


def _cut(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
