"""One sweep, and two of one run, killed again and again; each time the same command goes on."""

# ruff: noqa: S101 - its assertions are what it is for
from __future__ import annotations

import random
import re
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
from sweeps import TASKS, check, complete, finish, start

from depthprobe.runs.store import Run

LOOK = 0.02  # seconds between two looks at what a sweep has said
WORKERS: list[psutil.Process] = []  # of sweeps that were killed
FIRST, TIMING = "importing, reading, laying out", "timing depths"
WORK, TABLES, REPORT = "between plan and last trial", "writing the tables", "writing the report"
ORDER = (FIRST, TIMING, WORK, TABLES, REPORT)
# by the last line that a sweep has said, what it does then; the first one that is found
PHASES = {
    r"writing the report": REPORT,
    r"\[(\d+)/\1\]|\d 0 trials to run": TABLES,
    r"\[\d+/\d+\]|trials? to run|every depth is timed": WORK,
    r"timing": TIMING,
}


@dataclass(frozen=True)
class Life:
    """Seconds of a sweep in peace: to the plan, the first task, the last one's end, its own."""

    before: float
    workers: float
    tasks: float
    after: float

    @property
    def whole(self) -> float:
        """All of it."""
        return self.before + self.workers + self.tasks + self.after


def in_peace(study: Path, run: Path) -> Life:
    """A sweep that nobody disturbs."""
    said = run.with_suffix(".txt")
    began = time.perf_counter()
    process, seen = start(study, run, said=said), dict[str, float]()
    while process.poll() is None:
        now = time.perf_counter() - began
        seen.setdefault(_phase(said), now)
        if any(run.glob("logs/*")):
            seen.setdefault("begun", now)
        time.sleep(LOOK)
    assert process.returncode == 0, said.read_text()
    plan, begun, last = seen[WORK], seen["begun"], seen[TABLES]
    return Life(plan, begun - plan, last - begun, time.perf_counter() - began - last)


def one(study: Path, folder: Path, quiet: Run, life: Life, kills: int, draw: random.Random) -> str:
    """Kill one sweep and continue it, first before its plan, then among its tasks, then after them.

    Among the tasks it is let live until none, one or two more have ended, and a little longer, so
    that it comes to their end at about the last kill; if it does so before, another run takes the
    rest.
    """
    phases, runs, hit = Counter[str](), 0, 0
    edge = kills // 5
    while hit < kills:
        run, runs, done = folder / f"one-{runs}", runs + 1, dict[str, tuple[int, int]]()
        while hit < kills:
            said = folder / "said.txt"
            process = start(study, run, said=said)
            if hit < edge:
                alive = _lives(process, draw.uniform(0, life.before))
            elif hit < kills - edge:
                more = draw.randrange(3)
                wait = life.tasks / TASKS + (0 if more else life.workers)
                alive = _comes_to(WORK, process, said) and _ends(more, process, said)
                alive = alive and _lives(process, draw.uniform(0, wait))
            else:
                alive = _comes_to(TABLES, process, said)
                alive = alive and _lives(process, draw.uniform(0, life.after))
            if not alive:
                assert process.returncode == 0, said.read_text()
                break  # it came to its end: no kill
            phases[_kill(process, said)] += 1
            hit += 1
            done = _same(done, run)
        finish(study, run, said=folder / "said.txt")
        check(run, quiet, done)
        _gone()
    return f"{kills} kills in {runs} runs: {_told(phases)}"


def two(study: Path, folder: Path, quiet: Run, life: Life, kills: int, draw: random.Random) -> str:
    """Two sweeps of one run; one of them, drawn anew, is killed and begun again."""
    phases, runs, hit = Counter[str](), 0, 0
    while hit < kills:
        run, runs, done = folder / f"two-{runs}", runs + 1, dict[str, tuple[int, int]]()
        said = [folder / "said-0.txt", folder / "said-1.txt"]
        both = [start(study, run, said=path) for path in said]
        while hit < kills and any(process.poll() is None for process in both):
            time.sleep(draw.uniform(0, 0.7 * life.whole))
            place = draw.randrange(2)
            if both[place].poll() is None:
                phases[_kill(both[place], said[place])] += 1
                hit += 1
                done = _same(done, run)
                both[place] = start(study, run, said=said[place])
        for process, path in zip(both, said, strict=True):
            assert process.wait() == 0, path.read_text()
        check(run, quiet, done)
        _gone()
    return f"{kills} kills in {runs} runs: {_told(phases)}"


def _ends(tasks: int, process: subprocess.Popen[bytes], said: Path) -> bool:
    """Whether a sweep lives when so many tasks have ended."""
    while len(re.findall(r"\[\d+/\d+\]", said.read_text(errors="replace"))) < tasks:
        if not _lives(process, LOOK):
            return False
    return process.poll() is None


def _comes_to(phase: str, process: subprocess.Popen[bytes], said: Path) -> bool:
    """Whether a sweep comes to a phase, and lives."""
    while _place(_phase(said)) < _place(phase):
        if not _lives(process, LOOK):
            return False
    return process.poll() is None


def _lives(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process lives so many seconds more."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _kill(process: subprocess.Popen[bytes], said: Path) -> str:
    """SIGKILL to the sweep alone; its workers must follow. Returns what it was doing."""
    workers = psutil.Process(process.pid).children(recursive=True)
    phase = _phase(said)
    process.kill()
    assert process.wait() == -9, "it had ended"
    # not waited for: those that still import what they need see it later
    WORKERS.extend(workers)
    return phase


def _gone() -> None:
    """All workers of sweeps that were killed have followed."""
    _, alive = psutil.wait_procs(WORKERS, timeout=120)
    assert not alive, f"workers live on: {alive}"
    WORKERS.clear()


def _phase(said: Path) -> str:
    lines = said.read_text(errors="replace").splitlines()
    for line in reversed(lines):
        for pattern, phase in PHASES.items():
            if re.search(pattern, line):
                return phase
    return FIRST


def _same(before: dict[str, tuple[int, int]], run: Path) -> dict[str, tuple[int, int]]:
    """What is done now; what was done before must be as it was."""
    now = complete(run)
    assert {name: now[name] for name in before} == before, "something was done twice"
    return now


def _place(phase: str) -> int:
    return ORDER.index(phase)


def _told(phases: Counter[str]) -> str:
    return ", ".join(f"{phases[name]} while {name}" for name in ORDER if phases[name])
