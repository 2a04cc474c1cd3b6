"""Pieces of a sweep's work: how many windows and users there are, and seconds of each kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from depthprobe.data.batches import length_buckets
from depthprobe.data.splits import Split
from depthprobe.methods import base_of
from depthprobe.study import Study, settings_of

# a step's seconds in those of a plain one, where it was not timed. Of 26 kinds of students that
# runs had timed on two cores the middle one took 1.15 times as long, those that follow scores 1.5
# to 2.1; elastic models took no longer than plain ones
DISTILLED, SCORED = 1.25, 2.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained on and asked; lengths are means over batches, padding included."""

    windows: int
    train_length: float
    test: int
    test_length: float
    validation: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of each piece of work.

    Attributes:
        step: of a training step of ``batch`` windows, by ``train:K``, ``train:sasrec``,
            ``distill:K`` and the like.
        encode: of one user, by ``K`` and ``sasrec``.
        score: of the best items of the catalogue for one user.
        flops: of one window and its scores, by depth; for a budget of compute.
    """

    batch: int
    step: Mapping[str, float]
    encode: Mapping[str, float]
    score: float
    flops: Mapping[int, float] = field(default_factory=dict)

    def step_of(self, study: Study, method: str, depth: int, blocks: int) -> float:
        """Seconds of a step of a method; of a depth that was not timed between its neighbours."""
        base, losses = base_of(method), settings_of(study, method).distillation
        if base == "sasrec":
            return self.step["train:sasrec"]
        if (timed := self.step.get(f"{method}:{depth}")) is not None:
            return timed
        plain = between(self.step, "train:", depth)
        if base != "distill":
            return plain
        asks = self.encode_of(blocks) * self.batch if losses.features == "online" else 0.0
        return plain * (SCORED if losses.logits else DISTILLED) + asks

    def encode_of(self, depth: int) -> float:
        """Seconds of a user at a depth."""
        return between(self.encode, "", depth)


def between(times: Mapping[str, float], prefix: str, depth: int) -> float:
    """The time of ``prefix`` and a depth, from those of others: each block adds the same."""
    found = sorted(
        (int(name.removeprefix(prefix)), value)
        for name, value in times.items()
        if name.startswith(prefix) and name.removeprefix(prefix).isdigit()
    )
    depths, values = zip(*found, strict=True)
    return float(np.interp(depth, depths, values))


def sizes_of(split: Split, study: Study) -> Sizes:
    """How many windows and questions a split has, and how long they are."""
    longest, offsets = study.data.max_history, split.sequences.offsets
    windows = np.minimum(split.train_stop - offsets[:-1], longest + 1)
    inputs = windows[windows > 1] - 1
    asked = split.test
    histories = np.minimum(asked.targets - offsets[asked.users], longest)
    return Sizes(
        windows=len(inputs),
        train_length=padded_length(inputs, study.recipe.batch_size, seed=0),
        test=len(histories),
        test_length=padded_length(histories, study.cost.batch_size),
        validation=min(len(split.validation.users), study.protocol.validation_users),
    )


def padded_length(lengths: np.ndarray, batch: int, *, seed: int | None = None) -> float:
    """The mean number of places in a row when each batch is as wide as its longest; NaN of none."""
    if not len(lengths):
        return math.nan
    widths = [lengths[each].max() * len(each) for each in length_buckets(lengths, batch, seed=seed)]
    return float(sum(widths) / len(lengths))
