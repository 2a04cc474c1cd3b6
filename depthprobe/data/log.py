"""A raw log as a reader leaves it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Log:
    """Interactions as read: ``users`` and ``items`` str (N,), ``times`` int64 (N,) s or None.

    A user's interactions may lie anywhere; where times tie or are None, earlier rows are older.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None = None
    titles: dict[str, str] = field(default_factory=dict)
    name: str = "log"
