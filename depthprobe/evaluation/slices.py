"""Groups of test users that an average hides: by history, by how popular the target is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from depthprobe.data.splits import Split
from depthprobe.data.statistics import length_levels
from depthprobe.evaluation.metrics import training_popularity
from depthprobe.evaluation.statistics import LEVEL, mean_bounds

ALL = "all"
FEWEST = 30  # fewest users of a slice with an interval: with fewer it does not hold
SHORT, LONG = 0.2, 0.2  # shares of the training interactions that the head and the tail hold
GROUPS = ("head", "middle", "tail", "cold")
MOST = 8  # most labels of a user's column that become slices
OTHER, UNKNOWN = "other", "unknown"
RESERVED = frozenset({ALL, "history", "target", "user"})  # names that a user's column must not have


@dataclass(frozen=True, eq=False)
class Family:
    """A way to divide the test users into slices, each user in one."""

    name: str
    labels: tuple[str, ...]
    codes: np.ndarray  # int64 (E,): user ``e`` of the test is in slice ``labels[codes[e]]``

    @property
    def slices(self) -> list[str]:
        """The names of the slices, such as ``target:tail``."""
        return [f"{self.name}:{label}" for label in self.labels]


def families(split: Split, own: Mapping[str, Sequence[str]] | None = None) -> list[Family]:
    """``history`` and ``target`` of the test users, and the user's own by name and labels."""
    users, places = split.test.users, split.test.targets
    groups = popularity_groups(training_popularity(split).popularity)[split.targets("test") - 1]
    return [
        by_length(places - np.asarray(split.sequences.offsets)[users]),
        _used("target", groups, GROUPS),
        *(by_label(name, labels) for name, labels in (own or {}).items()),
    ]


def by_length(lengths: np.ndarray) -> Family:
    """Histories by length: 1, 2, 3 to 4, 5 to 8, 9 to 16 items, and so on.

    ``lengths`` (E,) are of all items before the target, not only of those that a model reads.
    """
    levels, bins = length_levels(lengths)
    names = [str(low) if low == high else f"{low}-{high}" for low, high in bins]
    return _used("history", levels, names)


def by_label(name: str, labels: Sequence[str]) -> Family:
    """The most frequent labels (E,), then ``other``, then ``unknown`` for the empty one."""
    counts = Counter(label for label in labels if label not in {"", OTHER, UNKNOWN})
    common = sorted(counts, key=lambda label: (-counts[label], label))[:MOST]
    place = {label: index for index, label in enumerate([*common, OTHER, UNKNOWN])}
    codes = [place.get(label or UNKNOWN, len(common)) for label in labels]
    return _used(name, np.array(codes, dtype=np.int64), list(place))


def _used(name: str, codes: np.ndarray, labels: Sequence[str]) -> Family:
    """A family without the labels that nobody has."""
    used, codes = np.unique(codes, return_inverse=True)
    return Family(name, tuple(labels[place] for place in used), codes.astype(np.int64))


def popularity_groups(popularity: np.ndarray) -> np.ndarray:
    """Head, middle, tail and cold items: places in :data:`GROUPS`, int64 (I,).

    The head are the most popular items, as many as it takes to hold 20 % of the training
    interactions (I,); the tail the least popular ones that hold 20 %; the middle is the rest
    (Abdollahpouri et al. 2021, arXiv 2103.06364). Cold items have none. Items of equal popularity
    stay together: in the middle if some are needed in both. The most popular ones are the head
    always, and the least popular the tail, unless all are equal.
    """
    counts, level = np.unique(popularity, return_inverse=True)  # ascending
    held = counts * np.bincount(level)  # interactions of each level
    below = np.cumsum(held) - held
    above = held.sum() - below - held
    head, tail = above < SHORT * held.sum(), below < LONG * held.sum()
    least, most = counts == counts[counts > 0].min(initial=counts[-1]), counts == counts[-1]
    groups = np.select(
        [counts == 0, least & most, most, least, head & ~tail, tail & ~head],
        [3, 1, 0, 2, 0, 2],
        default=1,
    )
    return np.asarray(groups[level], dtype=np.int64)


def slice_means(
    values: np.ndarray, cuts: Sequence[Family], *, level: float = LEVEL
) -> dict[str, tuple[int, np.ndarray]]:
    """Means of M per-user quantities (U, M), of all users and of each slice, with bounds.

    Returns:
        By slice, ``all`` first, empty ones left out: how many users, and value, low and high,
        (3, M). Slices of less than 30 users, or whose users have one value all, have no bounds:
        NaN. One user alone has infinite ones.
    """
    everybody = Family(ALL, ("",), np.zeros(len(values), np.int64))
    found = {}
    for family in (everybody, *cuts):
        for code, name in enumerate([ALL] if family is everybody else family.slices):
            own = values[family.codes == code]  # (users, M)
            if not len(own):
                continue
            numbers = mean_bounds(own, level=level)
            if name != ALL:
                numbers[1:, (len(own) < FEWEST) | (np.ptp(own, axis=0) == 0)] = np.nan
            found[name] = (len(own), numbers)
    return found
