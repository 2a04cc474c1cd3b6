"""Groups of test users that an average hides: by history, by how popular the target is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from depthprobe.data.splits import Split
from depthprobe.evaluation.metrics import training_popularity
from depthprobe.evaluation.statistics import LEVEL, percentile_bounds, weight_chunks

ALL = "all"
FEWEST = 30  # users of a slice with an interval: of fewer, percentiles come out too near together
SHORT, LONG = 0.2, 0.2  # shares of the training interactions that the head and the tail hold
GROUPS = ("head", "middle", "tail", "cold")
MOST = 8  # labels of an own column that are slices of their own
OTHER, UNKNOWN = "other", "unknown"
RESERVED = frozenset({ALL, "history", "target", "user"})  # names that no own column may have


@dataclass(frozen=True, eq=False)
class Family:
    """A way to cut the test users into slices, each user in one."""

    name: str
    labels: tuple[str, ...]
    codes: np.ndarray  # int64 (E,): user ``e`` of the test is in slice ``labels[codes[e]]``

    @property
    def slices(self) -> list[str]:
        """The names of the slices, such as ``target:tail``."""
        return [f"{self.name}:{label}" for label in self.labels]


def families(split: Split, own: Mapping[str, Sequence[str]] | None = None) -> list[Family]:
    """``history`` and ``target`` of the split's test users, and own ones by name and labels."""
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
    levels = np.searchsorted(2 ** np.arange(40), lengths)  # places of the upper bounds
    bounds = [(1, 1), *((2 ** (n - 1) + 1, 2**n) for n in range(1, int(levels.max(initial=0)) + 1))]
    names = [str(low) if low == high else f"{low}-{high}" for low, high in bounds]
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
    values: np.ndarray, cuts: Sequence[Family], *, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[int, np.ndarray]]:
    """Means of M per-user quantities (U, M), of all users and of each slice, with bounds.

    The draws are of all users, the same for every slice and quantity. So the size of a slice varies
    with them, as it would with other users. Each user's value is added up once, in the cell that
    all of its slices share.

    Returns:
        By slice, ``all`` first, empty ones left out: how many users, and value, low and high,
        (3, M). Slices of less than 30 users, or whose users have one value all, have no bounds:
        NaN. One user alone has infinite ones.
    """
    n_users, width = values.shape
    # a cell: the users that are in the same slice of every family
    keys = np.stack([np.zeros(n_users, np.int64), *(family.codes for family in cuts)])
    cells, owner = np.unique(keys, axis=1, return_inverse=True)  # (1 + F, cells), (U,)
    order = np.argsort(owner, kind="stable")  # users of a cell stand together
    ordered, held = values[order], np.bincount(owner)
    spans = [slice(stop - n, stop) for stop, n in zip(np.cumsum(held), held, strict=True)]
    names = [ALL, *(name for family in cuts for name in family.slices)]
    first = np.cumsum([0, 1, *(len(family.labels) for family in cuts)])[:-1]
    member = cells + first[:, None]  # which slices a cell is part of, places in `names`

    def add_up(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums and sizes of every slice, of weights (C, U): (S, C, M), (S, C)."""
        sums = np.zeros((len(names), len(weights), width))
        sizes = np.zeros((len(names), len(weights)))
        for cell, span in enumerate(spans):
            part = weights[:, span] @ ordered[span]
            size = weights[:, span].sum(axis=1)
            for place in member[:, cell]:
                sums[place] += part
                sizes[place] += size
        return sums, sizes

    totals, counts = add_up(np.ones((1, n_users)))
    users = counts[:, 0].astype(int)
    bounds = np.full((len(names), 2, width), np.nan)
    bounds[0] = [[-np.inf], [np.inf]]  # of one user
    if n_users > 1:
        large = np.flatnonzero((users >= FEWEST) | (np.arange(len(names)) == 0))
        draws, done = np.empty((len(large), resamples, width)), 0
        for weights in weight_chunks(n_users, resamples=resamples, seed=seed):
            sums, sizes = add_up(weights[:, order])
            draws[:, done : done + len(weights)] = sums[large] / sizes[large][:, :, None]
            done += len(weights)
        for place, own in zip(large, draws, strict=True):
            low, high = percentile_bounds(own, level=LEVEL)
            bounds[place] = np.where((low == high) & (place > 0), np.nan, [low, high])
    return {
        name: (int(users[place]), np.stack([totals[place, 0] / users[place], *bounds[place]]))
        for place, name in enumerate(names)
        if users[place]
    }
