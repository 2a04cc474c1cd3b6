"""How accuracy and time are measured, and what is probed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthprobe.study.errors import BadInput, at_least, one_of


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How accuracy is measured, and how much of it a shallower model may lose.

    ``split``: ``leave-one-out`` (each user's last item), ``temporal`` (what comes after two points
    in time that all users share, ``split_at``: dates, or quantiles of the interactions), or
    ``given`` (the log came in training, validation and test files).
    ``negatives`` of the sampled protocol are drawn from the items that a user never took:
    ``uniform``, or in proportion to how often the training interactions hold an item
    (``popularity``: harder, and what training never holds is never drawn).
    ``user_slices`` and ``item_slices``, each ``FILE:COLUMN``, cut the test users by a column of a
    users' file, or of an items' file for the item asked for, beside history and popularity.
    """

    split: Literal["leave-one-out", "temporal", "given"] = "leave-one-out"
    split_at: tuple[str, ...] = ("0.8", "0.9")
    filter_seen: bool = True
    sampled: bool = True
    negatives: Literal["uniform", "popularity"] = "uniform"
    user_slices: tuple[str, ...] = ()
    item_slices: tuple[str, ...] = ()
    validation_users: int = 4096
    margin: float = 0.01
    resamples: int = 1000

    def __post_init__(self) -> None:
        one_of("protocol.negatives", self.negatives, ("uniform", "popularity"))
        at_least("protocol", {"validation_users": self.validation_users}, 1)
        at_least("protocol", {"resamples": self.resamples}, 100)
        if len(self.split_at) != 2:
            allowed = "where validation and test begin: two dates, or two quantiles as 0.8,0.9"
            raise BadInput("protocol.split_at", ",".join(self.split_at), allowed)
        if not 0 < self.margin < 1:
            raise BadInput("protocol.margin", self.margin, "a share of the accuracy, in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """How time is measured: one batch of real users, rounds interleaved over the depths."""

    batch_size: int = 128
    warmup: int = 3
    rounds: int = 15

    def __post_init__(self) -> None:
        at_least("cost", {"batch_size": self.batch_size, "rounds": self.rounds}, 1)
        at_least("cost", {"warmup": self.warmup}, 0)


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How much is probed.

    ``spans``: of each length, leave out so many runs of blocks alone, those between whose ends the
    angular distance is smallest; 0 leaves out every run.
    """

    spans: int = 0

    def __post_init__(self) -> None:
        at_least("probing", {"spans": self.spans}, 0)
