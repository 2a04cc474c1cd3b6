"""Clean a log: minimum rating, repeats, each user's latest interactions, k-core, some users.

Works on interactions that are sorted by user and, within a user, by time. Every step is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from depthprobe.errors import BadInput
from depthprobe.formatting import rounded
from depthprobe.study import Cleaning

Keep = np.ndarray  # (N,) bool


@dataclass(frozen=True)
class Step:
    """What one step of the cleaning kept."""

    step: str
    interactions: int
    users: int
    items: int


def clean(
    users: np.ndarray, items: np.ndarray, ratings: np.ndarray | None, rules: Cleaning
) -> tuple[Keep, tuple[Step, ...]]:
    """Which interactions stay, and how many are left after each step of the rules.

    Args:
        users: (N,) user numbers, ascending; within a user the rows are oldest first.
        items: (N,) item numbers.
        ratings: (N,), or None where the log has none.

    Raises:
        BadInput: if a rating is required and there are none, or nothing stays.
    """
    keep = np.ones(len(users), dtype=bool)
    steps = [_count("as read", keep, users, items)]

    def step(name: str, stays: Keep) -> None:
        """Apply a rule's answer to the remaining rows."""
        keep[keep] = stays
        steps.append(_count(name, keep, users, items))
        if not keep.any():
            allowed = f"a rule that leaves something of {steps[-2].interactions:,} interactions"
            raise BadInput("data.cleaning", name, allowed)

    if (least := rules.min_rating) is not None:
        if ratings is None:
            raise BadInput("data.cleaning.min_rating", least, "a log that has ratings")
        step(f"rating {rounded(least, 6)} or more", ratings >= least)
    if rules.repeats != "keep":
        last = rules.repeats == "last"
        step(f"{rules.repeats} of a repeat", once(users[keep], items[keep], last=last))
    if rules.latest is not None:
        step(f"latest {rules.latest} of a user", newest(users[keep], rules.latest))
    if rules.core > 1:
        step(f"{rules.core}-core", k_core(users[keep], items[keep], rules.core))
    if rules.users is not None:
        step(f"{rules.users:,} users at most", some(users[keep], rules.users))
    return keep, tuple(steps)


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

    Filtering once is not enough: removing an item can take a user below k, and so on. The fixed
    point does not depend on the order of removals.
    """
    rows = np.arange(len(users))
    while len(rows):
        u, i = users[rows], items[rows]
        enough = (np.bincount(u)[u] >= k) & (np.bincount(i)[i] >= k)
        if enough.all():
            break
        rows = rows[enough]
    keep = np.zeros(len(users), dtype=bool)
    keep[rows] = True
    return keep


def some(users: np.ndarray, count: int) -> Keep:
    """The interactions of ``count`` random users; a smaller count draws a subset of a larger."""
    drawn = np.random.default_rng(0).permutation(np.unique(users))[:count]
    return np.isin(users, drawn)


def _count(name: str, keep: Keep, users: np.ndarray, items: np.ndarray) -> Step:
    distinct = [int(np.count_nonzero(np.bincount(codes[keep]))) for codes in (users, items)]
    return Step(name, int(keep.sum()), *distinct)
