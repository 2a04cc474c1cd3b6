"""Search for the sufficient depth in a run: read its records, and choose the next tasks.

The records are the search's only memory. So a killed search, or one in the run of a full sweep,
goes on from the trainings that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.search import (
    MOST,
    WARY,
    Replay,
    Search,
    Step,
    predict,
    replay,
    search,
)
from depthprobe.formatting import duration, plain_percent
from depthprobe.methods import Task
from depthprobe.runs.plan import POPULARITY, READOUT, TEACHER, full_trial, plan, trial_of
from depthprobe.runs.records import (
    FULL,
    TRIALS,
    CutShort,
    Record,
    is_done,
    outputs_of,
    read_record,
    read_users,
    state_of,
)
from depthprobe.study import Study, parse_layers, settings_of


@dataclass(frozen=True)
class Found:
    """What a search reads from the records of a run.

    Attributes:
        trained: per-user values (U,) by depth and seed, the teacher's under ``blocks``.
        predicted: the share of the teacher's accuracy that each depth is predicted to keep.
        popularity: the mean of its values; None where it was not ranked.
        seconds: of every training.
        lost: trainings that failed.
    """

    study: Study = field(repr=False)
    blocks: int
    trained: Mapping[int, Mapping[int, np.ndarray]] = field(repr=False)
    predicted: Mapping[int, float]
    popularity: float | None
    seconds: Mapping[Step, float]
    lost: frozenset[Step]

    @cached_property
    def state(self) -> Search:
        """What the trainings show so far, and what comes next."""
        trained = dict(self.trained)
        return search(trained.pop(self.blocks, {}), trained, **self._asked)

    @cached_property
    def history(self) -> Replay:
        """The steps in which a search would have trained what is there."""
        return replay(self.trained, **self._asked)

    @property
    def _asked(self) -> dict[str, Any]:
        protocol = self.study.protocol
        return {
            "blocks": self.blocks, "predicted": self.predicted, "seeds": self.study.seeds,
            "lost": self.lost, "method": self.study.searched, "margin": protocol.margin,
            "level": protocol.level,
        }  # fmt: skip

    @property
    def cost(self) -> int:
        """The cost of all trainings so far, each counted by its depth."""
        return sum(depth * len(arms) for depth, arms in self._trainings.items())

    @property
    def _trainings(self) -> Mapping[int, Mapping[int, np.ndarray]]:
        """What is trained; a user's own teacher is not."""
        own = self.study.backbone.own
        return {d: arms for d, arms in self.trained.items() if not own or d != self.blocks}

    @property
    def models(self) -> tuple[int, int]:
        """How many models are trained, and how many a full sweep would train."""
        every = self.study.seeds * (len(self.predicted) + (not self.study.backbone.own))
        return sum(map(len, self._trainings.values())), every

    @property
    def full_cost(self) -> int:
        """The cost of a full sweep of all depths and seeds, each training counted by its depth."""
        teacher = 0 if self.study.backbone.own else self.blocks
        return self.study.seeds * (sum(self.predicted) + teacher)

    @property
    def no_teacher(self) -> str:
        """Why no shallower model can be compared with the teacher; empty if it can."""
        if not self.trained.get(self.blocks):
            return "the teacher failed" if Step(self.blocks, 0) in self.lost else ""
        mean = float(np.mean([arm.mean() for arm in self.trained[self.blocks].values()]))
        if self.popularity is None or mean > self.popularity:
            return ""
        return (
            f"the teacher is no better than popularity ({self.study.protocol.metric} {mean:.4f},"
            f" popularity {self.popularity:.4f}); train it better first"
        )

    @property
    def ended(self) -> str:
        """Why the search has ended; empty while it goes on."""
        step, study = self.state.next, self.study
        if self.no_teacher or not self.trained.get(self.blocks):
            return self.no_teacher
        if step is None and any(self._worth(depth) for depth in self.state.open):
            return f"one more training would exceed {plain_percent(MOST)} of a full sweep"
        if step is None:
            return "nothing more is likely to change the verdict"
        needed, hours = self.seconds_of(step.depth), study.search.hours
        if hours is not None and sum(self.seconds.values()) + needed > 3600 * hours:
            return f"the next training, {duration(needed)}, would exceed search.hours = {hours:g}"
        return ""

    def _worth(self, depth: int) -> bool:
        """Whether a depth's odds with the remaining seeds justify their cost."""
        some_left = any(
            not self.lost & {Step(each, seed), Step(self.blocks, seed)}
            for each in self.predicted if depth <= each <= self.state.chains[depth]
            for seed in range(self.study.seeds) if seed not in self.trained.get(each, ())
        )  # fmt: skip
        return some_left and self.state.odds[depth] >= MOST**WARY

    def seconds_of(self, depth: int) -> float:
        """Estimated seconds of a training at a depth, from those at this or the nearest depth.

        0 before the first training.
        """
        if not self.seconds:
            return 0.0
        nearest = min((step.depth for step in self.seconds), key=lambda had: abs(had - depth))
        own = [seconds for step, seconds in self.seconds.items() if step.depth == nearest]
        return median(own) * depth / nearest

    @property
    def words(self) -> str:
        """The search's progress: ``shown: 8; refuted: 1, 2; looking at 3 (seed 2 of 5)``."""
        state, seeds = self.state, self.study.seeds
        parts = [f"shown: {state.shown or 'none yet'}"]
        if state.refuted:
            parts.append(f"refuted: {', '.join(map(str, state.refuted))}")
        if self.ended:
            parts.append(f"ended: {self.ended}")
        elif (step := state.next) is not None:
            what = "the teacher" if step.depth == self.blocks else f"{step.depth}"
            parts.append(f"looking at {what} (seed {step.seed + 1} of {seeds})")
        return "; ".join(parts)


def find_out(folder: Path, study: Study, blocks: int) -> Found:
    """Read what a search decides by."""

    def record_of(trial: str) -> Record | None:
        with suppress(CutShort):  # a sweep makes it anew
            return read_record(folder / TRIALS / trial)
        return None

    def values(record: Record) -> np.ndarray:
        _, ranks = read_users(folder / TRIALS / record.id, record)[FULL]
        return per_user_metric(ranks.astype(np.float64), study.protocol.metric)

    trained: dict[int, dict[int, np.ndarray]] = {}
    seconds, lost = {}, set()
    for task in plan(study, blocks):
        if task.method not in (TEACHER, study.searched):
            continue
        record, step = record_of(task.id), Step(task.trials[0].depth, task.seed)
        if record is None:
            continue
        if not record.done:
            lost.add(step)
            continue
        trained.setdefault(step.depth, {})[step.seed] = values(record)
        if (costs := record.training) is not None:
            seconds[step] = costs.seconds + costs.tuning_seconds
    kept = (range(depth) for depth in range(blocks + 1))
    probes = [record_of(trial_of(READOUT, each, 0, blocks).id) for each in kept]
    readout = {each.depth: each.validation.ndcg for each in probes if each and each.validation}
    depths = parse_layers(settings_of(study, study.searched).layers, blocks)
    popular = record_of(full_trial(POPULARITY, 0, blocks).id)
    return Found(
        study, blocks, trained,
        predict(readout, [depth for depth in depths if depth < blocks], blocks),
        float(values(popular).mean()) if popular and popular.done else None,
        seconds, frozenset(lost),
    )  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """The tasks that a search wants next, none when it has ended, and its progress."""

    tasks: tuple[Task, ...]
    words: str = ""


def plan_search(folder: Path, study: Study, tasks: Sequence[Task], blocks: int) -> Asked:
    """Choose the next tasks of a search: first those of the first seed, then its steps."""

    def left(some: Sequence[Task]) -> tuple[Task, ...]:
        return tuple(task for task in some if state_of(outputs_of(folder, task)) == "left")

    searched = study.searched

    def comes_first(task: Task) -> bool:
        if any(trial.of for trial in task.trials):  # a variant of a trial that may never be trained
            return all(is_done(folder / TRIALS / need) for need in task.needs)
        return task.seed == 0 and task.method != searched

    if first := left([task for task in tasks if comes_first(task)]):
        return Asked(first)
    found = find_out(folder, study, blocks)
    step = found.state.next
    if step is None or found.ended:
        return Asked((), found.words)
    by_name = {name: task for task in tasks for name in task.names}
    method = TEACHER if step.depth == blocks else searched
    closure = [by_name[trial_of(method, range(step.depth), step.seed, blocks).id]]
    for task in closure:  # and everything that it needs
        closure += [by_name[need] for need in task.needs if by_name[need] not in closure]
    return Asked(left([task for task in tasks if task in closure]), found.words)
