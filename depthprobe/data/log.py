"""A raw log as a reader leaves it: nothing dropped, nothing sorted, ids as they were written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

PARTS = ("training", "validation", "test")


@dataclass(frozen=True, eq=False)
class Ids:
    """A column of ids: row ``n`` has ``names[codes[n]]``; every name is used.

    ``codes`` int32 (N,). ``names`` are distinct, as written: blanks around them are still there.
    """

    codes: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True, eq=False)
class Log:
    """N interactions as read.

    ``times`` (N,), seconds since 1970, int64 or float64, or None. ``ratings`` float64 (N,) or None.
    ``parts`` int8 (N,), places in :data:`PARTS`, for a log that came split, or None. A user's
    interactions may lie anywhere; where times tie or are None, earlier rows are older.
    ``notes`` are what the reader had to decide; every report repeats them.
    """

    users: Ids
    items: Ids
    times: np.ndarray | None = None
    ratings: np.ndarray | None = None
    parts: np.ndarray | None = None
    titles: dict[str, str] = field(default_factory=dict)
    name: str = "log"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.users)


def encode_ids(values: Iterable[object]) -> Ids:
    """Number ids by first appearance."""
    place: dict[str, int] = {}
    codes = [place.setdefault(str(value), len(place)) for value in values]
    return Ids(np.array(codes, dtype=np.int32), list(place))
