"""Which runs of blocks are worth a look, by how little they turn the state (arXiv 2403.17887)."""

from __future__ import annotations

import numpy as np

Span = tuple[int, int]  # [start, end)


def nearest_spans(angular: np.ndarray, length: int, *, first: int = 0) -> list[Span]:
    """All runs of so many blocks, that with the smallest angular distance between its ends first.

    Args:
        angular: distances between the states around L blocks, (L + 1, L + 1).
        length: of a run, 1..L.
        first: the earliest block that may be in one.

    Raises:
        ValueError: if no run is so long.
    """
    starts = np.arange(first, len(angular) - length)
    if length < 1 or not len(starts):
        raise ValueError(f"no run of {length} blocks from block {first} of {len(angular) - 1}")
    order = np.argsort(angular[starts, starts + length], kind="stable")
    return [(int(start), int(start) + length) for start in starts[order]]
