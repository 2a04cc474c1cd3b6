"""Split into training, validation and test: one target per user, and no leak into training.

A held-out interaction must not touch training, neither as an input nor as a target nor in the
baseline's item embeddings. So all training reads go through :meth:`Split.train_history`, which ends
before the user's first held-out interaction.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from depthprobe.data.statistics import as_date
from depthprobe.data.storage import Sequences
from depthprobe.errors import BadInput
from depthprobe.formatting import part_percent
from depthprobe.study import Protocol

MANY_REPEATS = 0.01  # share of repeated test targets above which seen items stay in the ranking

Part = Literal["validation", "test"]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The users of one part, and the indices of their targets in ``items``.

    ``users`` int64 (E,), ascending. ``targets`` int64 (E,): a user's history is everything before
    the target.
    """

    users: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, eq=False)
class Split:
    """The training part of each user, and the held-out targets.

    ``train_stop`` int64 (U,): user ``u`` trains on ``items[offsets[u]:train_stop[u]]``.
    ``filter_seen`` tells whether the items of a history are left out of the ranking.
    ``statistics`` count the held-out users, the users and targets unknown to training, the targets
    that are repeats, and those at the same time as a neighbour, whose order is arbitrary.
    """

    sequences: Sequences
    train_stop: np.ndarray
    validation: HeldOut
    test: HeldOut
    filter_seen: bool
    statistics: dict[str, float | int | str]
    warnings: tuple[str, ...]

    @property
    def trained(self) -> np.ndarray:
        """Which interactions train, bool (N,)."""
        stops = np.repeat(self.train_stop, np.diff(self.sequences.offsets))
        return np.asarray(np.arange(self.sequences.n_interactions) < stops)

    def train_history(self, user: int, max_history: int | None = None) -> np.ndarray:
        """The latest ``max_history`` training items of a user, oldest first, int32."""
        return self._span(user, int(self.train_stop[user]), max_history)

    def part(self, part: Part) -> HeldOut:
        """The held-out part ``validation`` or ``test``."""
        return {"validation": self.validation, "test": self.test}[part]

    def targets(self, part: Part) -> np.ndarray:
        """The item to predict for each user of a part, int32 (E,)."""
        return np.asarray(self.sequences.items[self.part(part).targets], dtype=np.int32)

    def history(self, part: Part, place: int, max_history: int | None = None) -> np.ndarray:
        """The latest ``max_history`` items before the target at ``place`` (0..E-1), int32."""
        held_out = self.part(part)
        return self._span(int(held_out.users[place]), int(held_out.targets[place]), max_history)

    def _span(self, user: int, stop: int, max_history: int | None) -> np.ndarray:
        start = int(self.sequences.offsets[user])
        if max_history is not None:
            start = max(start, stop - max_history)
        return self.sequences.items[start:stop]


def make_split(sequences: Sequences, protocol: Protocol) -> Split:
    """Split by the protocol; ``BadInput`` if no user is left, or the log lacks what it needs."""
    split = SPLITS[protocol.split](sequences, protocol)
    auto, warnings = protocol.filter_seen == "auto", list(split.warnings)
    filter_seen = split.filter_seen if auto else bool(protocol.filter_seen)
    repeats, users = int(split.statistics["repeated_test_targets"]), len(split.test.users)
    if repeats:
        ranked = (
            "each is a miss, as seen items are left out" if filter_seen else "seen items stay in"
        )
        warnings.append(
            f"{repeats:,} of {users:,} test targets ({part_percent(repeats / users)}) are items "
            f"that their user had before: {ranked}"
        )
    return replace(
        split,
        filter_seen=filter_seen,
        statistics=split.statistics | {"seen_items": "left out" if filter_seen else "ranked too"},
        warnings=tuple(warnings),
    )


def leave_one_out(sequences: Sequences, _: Protocol | None = None) -> Split:
    """Each user's last item tests, the one before validates; with fewer than 3, all train."""
    stops = np.asarray(sequences.offsets[1:])
    lengths = np.diff(sequences.offsets)  # (U,)
    evaluated = lengths >= 3
    if not evaluated.any():
        fault = "no user has 3 interactions, the fewest to hold out two"
        fault += f": the most are {lengths.max()}"
        raise BadInput("data", sequences.name, fault, fault=True)
    warnings = []
    if short := int((~evaluated).sum()):
        warnings = [f"{short:,} of {len(stops):,} users train only: fewer than 3 interactions"]
    users = np.flatnonzero(evaluated)
    held_out = [HeldOut(users, stops[users] - back) for back in (2, 1)]
    return _split(sequences, np.where(evaluated, stops - 2, stops), held_out, warnings)


def temporal(sequences: Sequences, protocol: Protocol) -> Split:
    """Split at two points in time for all users: what a live system would have known at each.

    Training ends where validation begins. A user's target is the first item at or after a point,
    given everything before it; users without a history before it are cold and are not evaluated.
    """
    if sequences.times is None:
        raise BadInput("protocol.split", "temporal", "a log with times")
    points = ",".join(protocol.split_at)
    begins = [_moment(sequences.times, text) for text in protocol.split_at]
    if begins[0] >= begins[1]:
        dates = ", ".join(as_date(begin) for begin in begins)
        allowed = f"validation before test, and these begin at {dates}"
        raise BadInput("protocol.split_at", points, allowed)
    train_stop, test_begin = (_first_from(sequences, begin) for begin in begins)
    held_out, cold = _parts(sequences, train_stop, test_begin)
    if not (len(held_out[0].users) and len(held_out[1].users)):
        first, last = as_date(sequences.times.min()), as_date(sequences.times.max())
        allowed = "two points, with known users between them and after them"
        raise BadInput("protocol.split_at", points, f"{allowed} (the log: {first} to {last})")
    warnings = []
    if cold[1]:
        warnings = [f"{cold[1]:,} users begin after the test does: cold, not evaluated"]
    return _split(
        sequences,
        train_stop,
        held_out,
        warnings,
        validation_begins=as_date(begins[0]),
        test_begins=as_date(begins[1]),
        cold_validation_users=cold[0],
        cold_test_users=cold[1],
    )


def given(sequences: Sequences, _: Protocol | None = None) -> Split:
    """Keep the log's own split: a user's targets are the first validation and test interactions."""
    if sequences.given is None:
        allowed = "a log of training, validation and test files"
        raise BadInput("protocol.split", "given", allowed)
    starts, stops = np.asarray(sequences.offsets[:-1]), np.asarray(sequences.offsets[1:])
    train_stop, test_begin = (np.asarray(sequences.given[:, part]) for part in (0, 1))
    held_out, cold = _parts(sequences, train_stop, test_begin)
    for part, what, new in zip(held_out, ("validation", "test"), cold, strict=True):
        if not len(part.users):
            allowed = f"a user with a history and a {what} item"
            if new:
                allowed += f" (its {new:,} users are in no file before: are ids spelled alike?)"
            raise BadInput("data.source", sequences.name, allowed)
    warnings = []
    if further := int(np.maximum(stops - test_begin - 1, 0).sum()):
        warnings.append(
            f"{further:,} test interactions are not evaluated: only the first of each user is"
        )
    if cold[1]:
        warnings.append(f"{cold[1]:,} users are in the test file alone: cold, not evaluated")
    if sequences.times is not None:
        test = held_out[1]
        trains = train_stop[test.users] > starts[test.users]
        last, targets = train_stop[test.users][trains] - 1, test.targets[trains]
        if late := int((sequences.times[last] > sequences.times[targets]).sum()):
            warnings.append(f"{late:,} users train on interactions later than their test")
    return _split(sequences, train_stop, held_out, warnings, cold_test_users=cold[1])


SPLITS: dict[str, Callable[[Sequences, Protocol], Split]] = {
    "leave-one-out": leave_one_out,
    "temporal": temporal,
    "given": given,
}


def _parts(
    sequences: Sequences, train_stop: np.ndarray, test_begin: np.ndarray
) -> tuple[list[HeldOut], list[int]]:
    """Validation and test, each with a user's first item; and how many users have no history."""
    starts, stops = np.asarray(sequences.offsets[:-1]), np.asarray(sequences.offsets[1:])
    held_out, cold = [], []
    for begin, end in ((train_stop, test_begin), (test_begin, stops)):
        active = begin < end
        users = np.flatnonzero(active & (begin > starts))
        held_out.append(HeldOut(users, begin[users]))
        cold.append(int((active & (begin == starts)).sum()))
    return held_out, cold


def _split(
    sequences: Sequences,
    train_stop: np.ndarray,
    held_out: list[HeldOut],
    warnings: list[str],
    **more: int | str,
) -> Split:
    """Make a split with the counts that all kinds have: users, and targets unknown to training."""
    validation, test = held_out
    lengths = train_stop - np.asarray(sequences.offsets[:-1])
    if not (lengths > 1).any():
        raise BadInput("data", sequences.name, "a split that leaves some user two training items")
    statistics: dict[str, float | int | str] = {}
    train_stop = np.asarray(train_stop, dtype=np.int64)
    repeats = _repeats(sequences, test)
    filter_seen = repeats <= MANY_REPEATS * len(test.users)
    split = Split(sequences, train_stop, validation, test, filter_seen, statistics, ())
    known = np.zeros(sequences.n_items + 1, dtype=bool)
    known[sequences.items[split.trained]] = True
    cold_targets = int((~known[split.targets("test")]).sum())
    statistics |= {
        "training_interactions": int(lengths.sum()),
        "training_items": int(known.sum()),
        "validation_users": len(validation.users),
        "test_users": len(test.users),
        "cold_test_targets": cold_targets,
        "repeated_test_targets": repeats,
        **more,
    }
    if sequences.statistics.get("shared_times"):
        statistics["tied_test_targets"] = _tied(sequences, test)
    if cold_targets:
        share = cold_targets / len(test.users)
        warnings.append(
            f"{cold_targets:,} of {len(test.users):,} test targets ({part_percent(share)}) are "
            "items that no training interaction holds: they stay in every score"
        )
    return replace(split, warnings=tuple(warnings))


def _repeats(sequences: Sequences, test: HeldOut) -> int:
    """How many targets are also in their user's history."""
    target = np.zeros(sequences.n_users, dtype=np.int64)  # places; (U,)
    target[test.users] = test.targets
    users = np.repeat(np.arange(sequences.n_users), np.diff(sequences.offsets))  # (N,)
    items, places = np.asarray(sequences.items), target[users]
    same = (items == items[places]) & (np.arange(len(items)) < places)
    return len(np.unique(users[same]))


def _tied(sequences: Sequences, test: HeldOut) -> int:
    """How many targets have the same time as the user's previous or next interaction."""
    times, at = np.asarray(sequences.times), test.targets
    after = np.minimum(at + 1, np.asarray(sequences.offsets)[test.users + 1] - 1)
    tied = (times[at - 1] == times[at]) | ((after > at) & (times[after] == times[at]))
    return int(tied.sum())


def _moment(times: np.ndarray, text: str) -> float:
    """Seconds since 1970 of a date (UTC), or of a quantile of the interactions."""
    try:
        share = float(text if text.isascii() and "_" not in text else "none")
    except ValueError:
        try:
            moment = datetime.datetime.fromisoformat(text.encode("ascii").decode())
        except ValueError:
            allowed = "a date as 2014-03-01, or a quantile as 0.9"
            raise BadInput("protocol.split_at", text, allowed) from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    if not 0 < share < 1:
        raise BadInput("protocol.split_at", text, "a quantile between 0 and 1, or a date")
    return float(np.quantile(times, share))


def _first_from(sequences: Sequences, moment: float) -> np.ndarray:
    """The index of each user's first interaction at or after a moment, int64 (U,)."""
    late = np.concatenate([[0], np.cumsum(np.asarray(sequences.times) >= moment)])
    offsets = np.asarray(sequences.offsets)
    return np.asarray(offsets[1:] - (late[offsets[1:]] - late[offsets[:-1]]))
