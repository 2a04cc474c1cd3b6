"""The shape of a log: how long histories are, and how much of it its most popular items take."""

from __future__ import annotations

import numpy as np

from depthprobe.data.storage import Sequences

TOP = (1, 5, 10, 25, 50)  # per cent of the items


def popularity(sequences: Sequences) -> np.ndarray:
    """How many interactions each item has, int64 (I,)."""
    return np.bincount(sequences.items, minlength=sequences.n_items + 1)[1:]


def length_bins(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Histories by length, as (shortest, longest, users): 1, 2, 3 to 4, 5 to 8, 9 to 16, ...

    From the first bin that holds a user to the last; those between them may be empty.
    """
    levels = np.searchsorted(2 ** np.arange(40), lengths)  # (U,), places of the upper bounds
    users = np.bincount(levels).tolist()
    return [
        (2 ** (level - 1) + 1 if level else 1, 2**level, users[level])
        for level in range(int(levels.min()), len(users))
    ]


def top_shares(popularity: np.ndarray) -> list[tuple[int, int, float]]:
    """Which share of the interactions the most popular items take, as (per cent, items, share).

    Per cent of the items are rounded up to whole ones.
    """
    taken = np.cumsum(np.sort(popularity)[::-1])
    counts = [-(-percent * len(popularity) // 100) for percent in TOP]
    return [(p, n, float(taken[n - 1] / taken[-1])) for p, n in zip(TOP, counts, strict=True)]
