"""Leave-one-out: a user's last item is the test target, the one before validates, the rest trains.

The leak to avoid: an item that is only a target must not touch training, neither as an input nor
as a target nor in the baseline's item embeddings. So all training reads go through
:meth:`Split.train_history`, which ends before both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from depthprobe.data.storage import Sequences
from depthprobe.study import BadInput

# how far a split's target stands from the end of its user's sequence
FROM_END = {"validation": 2, "test": 1}


@dataclass(frozen=True, eq=False)
class Split:
    """Who trains on what, and who is evaluated.

    ``train_stop`` int64 (U,): user ``u`` trains on ``items[offsets[u]:train_stop[u]]``.
    ``users`` int64 (E,): the evaluated users, ascending; the others have fewer than 3
    interactions, and all of theirs train.
    """

    sequences: Sequences
    train_stop: np.ndarray
    users: np.ndarray

    def train_history(self, user: int, max_history: int | None = None) -> np.ndarray:
        """The latest ``max_history`` training items of a user, oldest first, int32."""
        return self._span(user, int(self.train_stop[user]), max_history)

    def targets(self, split: str) -> np.ndarray:
        """The item to predict for each of ``users``, int32 (E,); ``validation`` or ``test``."""
        stops = self.sequences.offsets[self.users + 1] - _from_end(split)
        return np.asarray(self.sequences.items[stops], dtype=np.int32)

    def history(self, split: str, user: int, max_history: int | None = None) -> np.ndarray:
        """The latest ``max_history`` items before the target, oldest first, int32.

        The history of the test target ends with the validation target.

        Raises:
            ValueError: if the split is unknown or the user (0-based, of all) is not evaluated.
        """
        stop = int(self.sequences.offsets[user + 1]) - _from_end(split)
        if self.train_stop[user] == self.sequences.offsets[user + 1]:
            raise ValueError(f"user {user} has fewer than 3 interactions and is not evaluated")
        return self._span(user, stop, max_history)

    def seen(self, split: str, user: int) -> np.ndarray:
        """All items before the target, for ``filter_seen``; int32, may repeat."""
        return self.history(split, user)

    def _span(self, user: int, stop: int, max_history: int | None) -> np.ndarray:
        start = int(self.sequences.offsets[user])
        if max_history is not None:
            if max_history < 0:
                raise ValueError(f"max_history is {max_history}, expected 0 or more")
            start = max(start, stop - max_history)
        return self.sequences.items[start:stop]


def leave_one_out(sequences: Sequences) -> Split:
    """Split off each user's last two items; users with fewer than 3 only train.

    Raises:
        BadInput: if nobody has 3 interactions.
    """
    stops = np.asarray(sequences.offsets[1:])
    evaluated = np.diff(sequences.offsets) >= 3
    if not evaluated.any():
        raise BadInput("data", sequences.name, "at least one user needs 3 interactions or more")
    return Split(
        sequences=sequences,
        train_stop=np.where(evaluated, stops - 2, stops).astype(np.int64),
        users=np.flatnonzero(evaluated).astype(np.int64),
    )


def _from_end(split: str) -> int:
    if split not in FROM_END:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(FROM_END)}")
    return FROM_END[split]
