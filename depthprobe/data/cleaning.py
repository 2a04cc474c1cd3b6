"""Which interactions stay: minimum rating, repeats, the latest of each user, k-core.

Works on interactions that are sorted by user and, within a user, by time. Every step is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from depthprobe.errors import BadInput
from depthprobe.study import Cleaning

Keep = np.ndarray  # (N,) bool


@dataclass(frozen=True)
class Step:
    """What one step of the cleaning left."""

    step: str
    interactions: int
    users: int
    items: int


def clean(
    users: np.ndarray,
    items: np.ndarray,
    ratings: np.ndarray | None,
    rules: Cleaning,
) -> tuple[Keep, tuple[Step, ...]]:
    """Which interactions stay, and how many are left after each step that was asked for.

    Args:
        users: (N,) user numbers, ascending; within a user the rows are oldest first.
        items: (N,) item numbers.
        ratings: (N,), or None where the log has none.

    Raises:
        BadInput: if a rating is asked for and there are none, or nothing stays.
    """
    keep = np.ones(len(users), dtype=bool)
    done = [_count("as read", keep, users, items)]
    for name, apply in _steps(ratings, rules):
        left = np.flatnonzero(keep)
        keep[left] = apply(users[left], items[left], left)
        done.append(_count(name, keep, users, items))
        if not done[-1].interactions:
            before = done[-2]
            allowed = f"a rule that leaves something of {before.interactions:,} interactions"
            raise BadInput("data.cleaning", name, allowed)
    return keep, tuple(done)


def _steps(
    ratings: np.ndarray | None, rules: Cleaning
) -> list[tuple[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Keep]]]:
    """Names and rules of the steps; a rule gets users, items and rows of what is left."""
    steps: list[tuple[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Keep]]] = []
    least, latest = rules.min_rating, rules.latest
    if least is not None:
        if ratings is None:
            raise BadInput("data.cleaning.min_rating", least, "a log that has ratings")
        rated = ratings
        steps.append((f"rating {least:g} or more", lambda u, i, rows: rated[rows] >= least))
    if rules.repeats != "keep":
        last = rules.repeats == "last"
        steps.append((f"{rules.repeats} of a repeat", lambda u, i, rows: once(u, i, last=last)))
    if latest is not None:
        steps.append((f"latest {latest} of a user", lambda u, i, rows: newest(u, latest)))
    if rules.core > 1:
        steps.append((f"{rules.core}-core", lambda u, i, rows: k_core(u, i, rules.core)))
    return steps


def once(users: np.ndarray, items: np.ndarray, *, last: bool = False) -> Keep:
    """The first, or last, interaction of each (user, item) pair."""
    pairs = users.astype(np.int64) * (int(items.max()) + 1) + items
    if last:
        pairs = pairs[::-1]
    keep = np.zeros(len(pairs), dtype=bool)
    keep[np.unique(pairs, return_index=True)[1]] = True
    return keep[::-1] if last else keep


def newest(users: np.ndarray, count: int) -> Keep:
    """The last ``count`` interactions of each user."""
    stops = np.cumsum(np.bincount(users))
    keep: Keep = stops[users] - np.arange(len(users)) <= count
    return keep


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> Keep:
    """The largest part in which every user and every item has k interactions or more.

    Filtering once is not enough: an item that goes can take a user below k, and so on. The fixed
    point does not depend on the order in which users and items go.
    """
    rows = np.arange(len(users))
    while True:
        u, i = users[rows], items[rows]
        enough = (np.bincount(u)[u] >= k) & (np.bincount(i)[i] >= k) if len(rows) else rows == 0
        if enough.all():
            break
        rows = rows[enough]
    keep = np.zeros(len(users), dtype=bool)
    keep[rows] = True
    return keep


def _count(name: str, keep: Keep, users: np.ndarray, items: np.ndarray) -> Step:
    return Step(name, int(keep.sum()), _distinct(users[keep]), _distinct(items[keep]))


def _distinct(codes: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(codes)))
