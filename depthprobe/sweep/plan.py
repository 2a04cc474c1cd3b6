"""The plan: trials, the tasks that produce them, and what each task needs done before."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from depthprobe.study import Study, parse_layers

# what must be trained, at the same seed, before a method can run; SASRec is no need of a study
# whose item table comes from elsewhere
NEEDS: dict[str, tuple[str, ...]] = {
    "popularity": (),
    "sasrec": (),
    "full": ("sasrec",),
    "early-exit": ("full",),
    "skip": ("full",),
    "finetune": ("sasrec",),
    "heal": ("full",),
    "distill": ("full",),
    "random-init": ("sasrec",),
}
BASELINES = ("popularity", "sasrec")


@dataclass(frozen=True)
class Trial:
    """One (method, kept blocks, seed): one record."""

    method: str
    kept: tuple[int, ...]  # empty for what has no backbone
    seed: int
    blocks: int  # of the whole backbone

    @property
    def depth(self) -> int:
        """How many blocks are kept."""
        return len(self.kept)

    @property
    def removed(self) -> tuple[int, ...]:
        """Blocks that are not kept; empty for what has no backbone."""
        return tuple(b for b in range(self.blocks) if b not in self.kept) if self.kept else ()

    @property
    def id(self) -> str:
        """Name of the trial and of its folder."""
        if self.method in BASELINES:
            return f"{self.method}-s{self.seed}"
        if self.kept == tuple(range(self.depth)) and self.method != "skip":
            return f"{self.method}-d{self.depth:02d}-s{self.seed}"
        if len(self.removed) == 1:
            return f"{self.method}-b{self.removed[0]:02d}-s{self.seed}"
        digest = hashlib.sha256(repr(self.kept).encode()).hexdigest()[:6]
        return f"{self.method}-d{self.depth:02d}-{digest}-s{self.seed}"


@dataclass(frozen=True)
class Task:
    """What one process does in one go: all trials that share one pass or one training."""

    method: str
    seed: int
    trials: tuple[Trial, ...]
    needs: tuple[str, ...] = ()  # trials that must be done before

    @property
    def id(self) -> str:
        """The only trial's name, or the method's for a shared pass."""
        return self.trials[0].id if len(self.trials) == 1 else f"{self.method}-s{self.seed}"


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
            tasks += [Task(method, seed, trials, before) for trials in groups if trials]
    return tasks


def _trials(method: str, seed: int, depths: list[int], blocks: int) -> list[tuple[Trial, ...]]:
    """The trials of each of a method's tasks."""
    if method in (*BASELINES, "full"):
        return [(whole_trial(method, seed, blocks),)]
    if method == "early-exit":
        return [tuple(Trial(method, tuple(range(d)), seed, blocks) for d in range(1, blocks))]
    if method == "skip":
        every = range(blocks)
        without = [tuple(b for b in every if b != out) for out in every if blocks > 1]
        return [tuple(Trial(method, kept, seed, blocks) for kept in without)]
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
