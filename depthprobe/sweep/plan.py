"""The plan: trials, the tasks that produce them, and what each task needs done before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from depthprobe.study import Study, parse_layers

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
    "random-init": ("sasrec",),
}
BASELINES = ("popularity", "sasrec")
# methods that leave a table of scores or of users in place of trials
TABLED = ("similarity", "taylor", "settling")
# methods that find out which blocks they keep: their trials are planned, and named, by depth alone
SEARCHING = ("greedy", "replace")


@dataclass(frozen=True)
class Trial:
    """One (method, kept blocks, seed): one record.

    Attributes:
        kept: the first blocks, for a trial of a searching method that is planned and not yet run.
        dropped: the block of which a part alone is left out; it counts as kept.
    """

    method: str
    kept: tuple[int, ...]  # empty for what has no backbone, and at depth 0
    seed: int
    blocks: int  # of the whole backbone
    dropped: int | None = None

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
        if self.method in ("span", "skip", "drop-attention", "drop-mlp"):
            first, last = self.removed[0], self.removed[-1]
            blocks = f"b{first:02d}" if first == last else f"b{first:02d}-{last:02d}"
            return f"{self.method}-{blocks}-s{self.seed}"
        if self.method == "interval":
            return f"interval-e{self.removed[0] + 1:02d}-s{self.seed}"
        if self.kept == tuple(range(self.depth)) or self.method in SEARCHING:
            return f"{self.method}-d{self.depth:02d}-s{self.seed}"
        digest = hashlib.sha256(repr(self.kept).encode()).hexdigest()[:6]
        return f"{self.method}-d{self.depth:02d}-{digest}-s{self.seed}"


@dataclass(frozen=True)
class Task:
    """What one process does in one go: all trials that share one pass or one training."""

    method: str
    seed: int
    trials: tuple[Trial, ...]  # none where a table is made
    needs: tuple[str, ...] = ()  # trials that must be done before
    blocks: int = 0  # of the whole backbone

    @property
    def id(self) -> str:
        """The only trial's name, or the method's for a shared pass."""
        return self.trials[0].id if len(self.trials) == 1 else f"{self.method}-s{self.seed}"


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
}


def plan(study: Study, blocks: int) -> list[Task]:
    """All tasks of a study, each after what it needs.

    Raises:
        BadInput: if the study names depths that the backbone does not have.
    """
    depths = [depth for depth in parse_layers(study.layers, blocks) if depth < blocks]
    unneeded = () if study.item_table == "sasrec" else ("sasrec",)
    needs = {name: [n for n in needed if n not in unneeded] for name, needed in NEEDS.items()}
    wanted = _with_needs(study.methods, needs)
    tasks: list[Task] = []
    for method in (name for name in NEEDS if name in wanted):
        for seed in range(1 if method == "popularity" else study.seeds):
            before = tuple(whole_trial(name, seed, blocks).id for name in needs[method])
            groups = _trials(method, seed, depths, blocks)
            tasks += [
                Task(method, seed, trials, before, blocks)
                for trials in groups
                if trials or method in TABLED
            ]
    return tasks


def _trials(method: str, seed: int, depths: list[int], blocks: int) -> list[tuple[Trial, ...]]:
    """The trials of each of a method's tasks."""
    if method in (*BASELINES, "full"):
        return [(whole_trial(method, seed, blocks),)]
    if method in TABLED:
        return [()]
    if method in PASSES:
        kept = PASSES[method](blocks)
        return [tuple(Trial(method, each, seed, blocks) for each in kept)]
    if method in ("drop-attention", "drop-mlp"):
        every = tuple(range(blocks))
        return [tuple(Trial(method, every, seed, blocks, dropped=out) for out in every)]
    if method == "random-init":
        depths = [*depths, blocks]
    # the deepest first: the longest task should not start last
    return [(Trial(method, tuple(range(d)), seed, blocks),) for d in reversed(depths)]


def whole_trial(method: str, seed: int, blocks: int) -> Trial:
    """A baseline's trial, or the one that keeps all blocks."""
    kept = () if method in BASELINES else tuple(range(blocks))
    return Trial(method, kept, seed, blocks)


def _with_needs(methods: tuple[str, ...], needs: dict[str, list[str]]) -> set[str]:
    wanted = set(methods)
    while more := {need for name in wanted for need in needs[name]} - wanted:
        wanted |= more
    return wanted
