"""Where a run is: what is done, what failed, who works on what, what is left."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from depthprobe.errors import BadInput
from depthprobe.methods import Task
from depthprobe.runs.context import LOGS, PROBES, TRIALS
from depthprobe.runs.plan import plan
from depthprobe.runs.records import MANIFEST, read_record, state_of
from depthprobe.runs.scheduler import held
from depthprobe.runs.store import STUDY, open_run

TAIL = 4096  # bytes of a log that are looked at


@dataclass(frozen=True)
class Working:
    """A task that some living process works on: its log's last line, and how old that is."""

    task: str
    line: str
    seconds: float


@dataclass(frozen=True)
class Status:
    """Tasks of a run by their state; ``counts`` are by method, in the order of the plan."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    working: list[Working] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)  # task, reason

    def total(self, state: str) -> int:
        """How many tasks are ``done``, ``failed``, ``working`` or ``left``."""
        return sum(count[state] for count in self.counts.values())


def status_of(folder: Path) -> Status:
    """The state of every task that a run's study asks for.

    Raises:
        BadInput: if the folder is no run, or one that has not been laid out yet.
    """
    if (folder / STUDY).is_file() and not (folder / MANIFEST).is_file():
        raise BadInput("run", str(folder), "a run that has begun; this one is being laid out")
    run = open_run(folder)
    found, at_work = Status(), {each.task: each for each in working(folder)}
    for task in plan(run.study, run.manifest.backbone.blocks):
        state, reason = _state(folder, task)
        if state != "done" and task.id in at_work:
            state = "working"
            found.working.append(at_work[task.id])
        elif state == "failed":
            found.failed.append((task.id, reason))
        found.counts.setdefault(task.method, Counter())[state] += 1
    return found


def working(folder: Path) -> list[Working]:
    """What living processes work on, on whatever machine, by the locks that they hold."""
    found = []
    for name in held(folder):
        log = folder / LOGS / f"{name}.log"
        try:
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - TAIL))
                lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
            age = time.time() - log.stat().st_mtime
        except OSError:
            lines, age = [], 0.0
        found.append(Working(name, _bare(lines[-1]) if lines else "", max(0.0, age)))
    return found


def _bare(line: str) -> str:
    """Without the date and time before it."""
    words = line.split(" ", 2)
    return words[2] if len(words) == 3 and words[0].count("-") == 2 else line


def _state(folder: Path, task: Task) -> tuple[str, str]:
    names = [f"{TRIALS}/{trial.id}" for trial in task.trials] or [f"{PROBES}/{task.id}"]
    outputs = [folder / name for name in names]
    state = state_of(outputs)
    if state != "failed":
        return state, ""
    errors = (record.error for path in outputs if (record := read_record(path)))
    return state, " ".join(str(next(filter(None, errors), "")).split())
