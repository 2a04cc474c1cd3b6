"""The plan: trials, the tasks that produce them, and what each task needs done before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from depthprobe.study import (
    METHODS,
    SELECTIONS,
    TRAINED,
    Study,
    base_of,
    parse_blocks,
    parse_layers,
    settings_of,
)

# what must be trained, at the same seed, before a method can run; SASRec is no need of a study
# whose item table comes from elsewhere
NEEDS: dict[str, tuple[str, ...]] = {
    "popularity": (),
    "sasrec": (),
    "full": ("sasrec",),
    "early-exit": ("full",),
    "early-exit-raw": ("full",),
    "readout": ("full",),
    "tuned-lens": ("full",),
    "skip": ("full",),
    "span": ("full",),
    "interval": ("full",),
    "greedy": ("full",),
    "drop-attention": ("full",),
    "drop-mlp": ("full",),
    "replace": ("full",),
    "similarity": ("full",),
    "taylor": ("full",),
    "settling": ("full",),
    "finetune": ("sasrec",),
    "heal": ("full",),
    "distill": ("full",),
    "elastic": ("sasrec",),
    "random-init": ("sasrec",),
    "random-selection": ("sasrec",),
}
BASELINES = ("popularity", "sasrec")
# methods that leave a table of scores or of users in place of trials
TABLED = ("similarity", "taylor", "settling")


@dataclass(frozen=True)
class Trial:
    """One (method, kept blocks, seed): one record.

    Attributes:
        kept: the first blocks, for a trial whose blocks are searched for, until it has run.
        dropped: the block of which a part alone is left out; it counts as kept.
        place: of a screened span, how many of its length have a smaller angular distance.
    """

    method: str
    kept: tuple[int, ...]  # empty for what has no backbone, and at depth 0
    seed: int
    blocks: int  # of the whole backbone
    dropped: int | None = None
    place: int | None = None

    @property
    def depth(self) -> int:
        """How many blocks are kept."""
        return len(self.kept)

    @property
    def removed(self) -> tuple[int, ...]:
        """Blocks that are not kept, or lack a part; empty for what has no backbone."""
        if self.dropped is not None:
            return (self.dropped,)
        every = () if self.method in BASELINES else range(self.blocks)
        return tuple(b for b in every if b not in self.kept)

    @property
    def id(self) -> str:
        """Name of the trial and of its folder."""
        if self.method in BASELINES:
            return f"{self.method}-s{self.seed}"
        if self.place is not None:
            return f"{self.method}-d{self.depth:02d}-n{self.place + 1}-s{self.seed}"
        if self.method in ("span", "skip", "drop-attention", "drop-mlp"):
            first, last = self.removed[0], self.removed[-1]
            blocks = f"b{first:02d}" if first == last else f"b{first:02d}-{last:02d}"
            return f"{self.method}-{blocks}-s{self.seed}"
        if self.method == "interval":
            return f"interval-e{self.removed[0] + 1:02d}-s{self.seed}"
        return f"{self.method.replace(':', '-')}-d{self.depth:02d}-s{self.seed}"


@dataclass(frozen=True)
class Task:
    """What one process does in one go: all trials that share one pass or one training."""

    method: str
    seed: int
    trials: tuple[Trial, ...]  # none where a table is made
    needs: tuple[str, ...] = ()  # trials that must be done before
    blocks: int = 0  # of the whole backbone

    @property
    def names(self) -> set[str]:
        """What other tasks may need it by: its own name, and its trials'."""
        return {self.id, *(trial.id for trial in self.trials)}

    @property
    def id(self) -> str:
        """The only trial's name, or the method's for a shared pass."""
        if len(self.trials) == 1:
            return self.trials[0].id
        return f"{self.method.replace(':', '-')}-s{self.seed}"


def _first(depths: Iterable[int]) -> list[tuple[int, ...]]:
    return [tuple(range(depth)) for depth in depths]


def _spans(blocks: int, lengths: Iterable[int]) -> list[tuple[int, ...]]:
    """What is left without each contiguous run of so many blocks."""
    every = range(blocks)
    runs = [range(i, i + n) for n in lengths for i in range(blocks - n + 1)]
    return [tuple(b for b in every if b not in run) for run in runs]


def _intervals(blocks: int) -> list[tuple[int, ...]]:
    """What is left without every second, every third, ... block."""
    every = range(blocks)
    return [tuple(b for b in every if (b + 1) % step) for step in range(2, blocks + 1)]


# the blocks kept in each trial of a method that answers all its trials in one go
PASSES: dict[str, Callable[[int], list[tuple[int, ...]]]] = {
    "early-exit": lambda blocks: _first(range(blocks)),
    "early-exit-raw": lambda blocks: _first(range(blocks)),
    "readout": lambda blocks: _first(range(blocks + 1)),
    "tuned-lens": lambda blocks: _first(range(blocks)),
    "skip": lambda blocks: _spans(blocks, range(1, min(2, blocks))),
    "span": lambda blocks: _spans(blocks, range(2, blocks)),
    "interval": _intervals,
    "greedy": lambda blocks: _first(range(1, blocks)),
    "replace": lambda blocks: _first(range(1, blocks)),
    "elastic": lambda blocks: _first(range(1, blocks + 1)),
}


def plan(study: Study, blocks: int) -> list[Task]:
    """All tasks of a study, each after what it needs.

    Raises:
        BadInput: if the study names depths or blocks that the backbone does not have.
    """
    parse_layers(study.layers, blocks)  # refused even where no method asks for depths
    unneeded = () if study.item_table == "sasrec" else ("sasrec",)
    needs = {
        method: [name for name in _needs(study, method) if name not in unneeded]
        for method in (*METHODS, *study.methods)
    }
    order = list(NEEDS)
    tasks: list[Task] = []
    wanted = _with_needs(study.methods, needs)
    for method in sorted(wanted, key=lambda name: (order.index(base_of(name)), name)):
        for seed in range(1 if method == "popularity" else study.seeds):
            before = tuple(whole_trial(name, seed, blocks).id for name in needs[method])
            groups = _trials(study, method, seed, blocks)
            tasks += [
                Task(method, seed, trials, before, blocks)
                for trials in groups
                if trials or method in TABLED
            ]
    return tasks


def _needs(study: Study, method: str) -> tuple[str, ...]:
    asks = base_of(method) in TRAINED and settings_of(study, method).asks_teacher
    return ("full",) if asks else NEEDS[base_of(method)]


def _trials(study: Study, method: str, seed: int, blocks: int) -> list[tuple[Trial, ...]]:
    """The trials of each of a method's tasks."""
    base = base_of(method)
    if base in (*BASELINES, "full"):
        return [(whole_trial(method, seed, blocks),)]
    if base in TABLED:
        return [()]
    if base == "span" and study.probing.spans:
        return [_screened(seed, blocks, study.probing.spans)]
    if base in PASSES:
        kept = PASSES[base](blocks)
        return [tuple(Trial(method, each, seed, blocks) for each in kept)]
    if base in ("drop-attention", "drop-mlp"):
        every = tuple(range(blocks))
        return [tuple(Trial(method, every, seed, blocks, dropped=out) for out in every)]
    settings = settings_of(study, method)
    select = settings.select
    if select not in SELECTIONS:
        return [(Trial(method, parse_blocks(select, blocks), seed, blocks),)]
    whole = base == "random-init"  # the control of the teacher, too
    depths = {d for d in parse_layers(settings.layers, blocks) if d < blocks or whole}
    if whole and settings.layers == study.layers:
        depths.add(blocks)
    # the deepest first: the longest task should not start last
    return [
        (Trial(method, chosen_blocks(select, depth, blocks, seed=seed), seed, blocks),)
        for depth in sorted(depths, reverse=True)
    ]


def chosen_blocks(select: str, depth: int, blocks: int, *, seed: int) -> tuple[int, ...]:
    """The blocks that a selection keeps; the first ones where it must ask the teacher.

    >>> [chosen_blocks(name, 3, 8, seed=0) for name in ("prefix", "ends", "interval")]
    [(0, 1, 2), (0, 1, 7), (0, 4, 7)]
    """
    if select == "ends":
        first = (depth + 1) // 2
        return (*range(first), *range(blocks - depth + first, blocks))
    if select == "interval":
        places = np.linspace(0, blocks - 1, depth) if depth > 1 else np.zeros(1)
        return tuple(int(np.floor(place + 0.5)) for place in places)
    if select == "random":
        drawn = np.random.default_rng((seed, depth)).choice(blocks, depth, replace=False)
        return tuple(sorted(int(block) for block in drawn))
    return tuple(range(depth))


def _screened(seed: int, blocks: int, most: int) -> tuple[Trial, ...]:
    """The spans of each length that will have the smallest angular distances."""
    return tuple(
        Trial("span", tuple(range(blocks - length)), seed, blocks, place=place)
        for length in range(2, blocks)
        for place in range(min(most, blocks - length + 1))
    )


def whole_trial(method: str, seed: int, blocks: int) -> Trial:
    """A baseline's trial, or the one that keeps all blocks."""
    kept = () if method in BASELINES else tuple(range(blocks))
    return Trial(method, kept, seed, blocks)


def _with_needs(methods: tuple[str, ...], needs: dict[str, list[str]]) -> set[str]:
    wanted = set(methods)
    while more := {need for name in wanted for need in needs[name]} - wanted:
        wanted |= more
    return wanted
