"""How accuracy and time are measured, and what is probed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthprobe.study.errors import BadInput, at_least, one_of


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How accuracy is measured, and how much of it a shallower model may lose.

    Attributes:
        split: ask for each user's last item (``leave-one-out``), for what comes after two points in
            time that all users share (``temporal``), or as the log came in training, validation
            and test files (``given``).
        split_at: the two points of ``temporal``: dates, or quantiles of the interactions.
        filter_seen: items of the history are not ranked.
        sampled: the 999-negative protocol beside full ranking, labelled.
        negatives: of the sampled protocol, drawn from the items that a user never took:
            ``uniform``, or in proportion to how often training holds an item (``popularity``:
            harder, and what training never holds is never drawn).
        user_slices: own groups of test users, each ``FILE:COLUMN`` of a table of users.
        item_slices: groups by the item that is asked for, each ``FILE:COLUMN`` of a table of items.
        validation_users: so many at most choose the best epoch.
        margin: the relative loss of NDCG@10 that is acceptable.
        resamples: draws of the bootstrap.
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
    """How time is measured: one batch of real users, rounds interleaved over the depths.

    Attributes:
        batch_size: users in the batch.
        warmup: rounds before the first that counts.
        rounds: that count.
    """

    batch_size: int = 128
    warmup: int = 3
    rounds: int = 15

    def __post_init__(self) -> None:
        at_least("cost", {"batch_size": self.batch_size, "rounds": self.rounds}, 1)
        at_least("cost", {"warmup": self.warmup}, 0)


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How much is probed.

    Attributes:
        spans: of each length, leave out so many runs of blocks alone, those between whose ends the
            angular distance is smallest; 0 leaves out every run.
    """

    spans: int = 0

    def __post_init__(self) -> None:
        at_least("probing", {"spans": self.spans}, 0)
