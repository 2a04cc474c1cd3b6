"""One sweep, and two of one run, killed again and again; each time the same command goes on."""

# ruff: noqa: S101 - its assertions are what it is for
from __future__ import annotations

import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from sweeps import TASKS, check, complete, finish, start

from depthprobe.sweep.store import Run

LOOK = 0.02  # seconds between two looks at what a sweep has said
# what a sweep has said last, and what it is doing then; the first that is found
PHASES = {
    r"writing the report": "writing the report",
    r"\[(\d+)/\1\]": "writing the tables",
    r"\[\d+/\d+\]|\d+ trials|every depth is timed": "between the first trial and the last",
    r"timing": "timing depths",
}
FIRST = "importing, reading, laying out"


@dataclass(frozen=True)
class Life:
    """Seconds of a sweep in peace: until its first task, for each of them, and after the last."""

    before: float
    task: float
    after: float

    def of(self, left: int) -> float:
        """The life of a sweep with so many tasks left."""
        return self.before + self.task * left + self.after


def in_peace(study: Path, run: Path) -> Life:
    """A sweep that nobody disturbs."""
    said = run.with_suffix(".txt")
    began = time.perf_counter()
    process, seen = start(study, run, said=said), dict[str, float]()
    while process.poll() is None:
        seen.setdefault(_phase(said), time.perf_counter() - began)
        time.sleep(LOOK)
    assert process.returncode == 0, said.read_text()
    ended = time.perf_counter() - began
    first, last = seen["between the first trial and the last"], seen["writing the tables"]
    return Life(first, (last - first) / TASKS, ended - last)


def one(study: Path, folder: Path, quiet: Run, life: Life, kills: int, draw: random.Random) -> str:
    """Kill one sweep and continue it; a new run each time that one has come to its end.

    Three fifths of the moments are uniform over the life of what is left, stratified; a fifth lies
    before the first task, another after the last.
    """
    phases, runs = Counter[str](), 0
    moments = _moments(kills, life, draw)
    moment = next(moments)
    while moment is not None:
        run, runs, done = folder / f"one-{runs}", runs + 1, dict[str, tuple[int, int]]()
        while moment is not None:
            said = folder / "said.txt"
            process = start(study, run, said=said)
            if not _wait_until(moment, process, said, TASKS - _tasks_done(run)):
                break  # it came to its end before: no kill
            phases[_kill(process, said)] += 1
            done = _same(done, run)
            moment = next(moments)
        finish(study, run, said=folder / "said.txt")
        check(run, quiet, done)
    assert sum(phases.values()) == kills
    return f"{kills} kills in {runs} runs: {_told(phases)}"


def two(study: Path, folder: Path, quiet: Run, life: Life, kills: int, draw: random.Random) -> str:
    """Two sweeps of one run; one of them, drawn anew, is killed and begun again."""
    phases, runs, hit = Counter[str](), 0, 0
    while hit < kills:
        run, runs, done = folder / f"two-{runs}", runs + 1, dict[str, tuple[int, int]]()
        said = [folder / "said-0.txt", folder / "said-1.txt"]
        both = [start(study, run, said=path) for path in said]
        while hit < kills and any(process.poll() is None for process in both):
            time.sleep(draw.uniform(0, 0.7 * life.of(TASKS - _tasks_done(run))))
            place = draw.randrange(2)
            if both[place].poll() is None:
                phases[_kill(both[place], said[place])] += 1
                hit += 1
                done = _same(done, run)
                both[place] = start(study, run, said=said[place])
        for process, path in zip(both, said, strict=True):
            assert process.wait() == 0, path.read_text()
        check(run, quiet, done)
    return f"{kills} kills in {runs} runs: {_told(phases)}"


Moment = Callable[[int], tuple[str, float]]  # of the tasks left: from which phase on, seconds


def _moments(kills: int, life: Life, draw: random.Random) -> Iterator[Moment | None]:
    """When to kill, in a random order; None at the end."""
    edge = kills // 5
    first = [draw.uniform(0, life.before) for _ in range(edge)]
    last = [draw.uniform(0, life.after) for _ in range(edge)]
    rest = kills - 2 * edge
    shares = [(stratum + draw.random()) / rest for stratum in range(rest)]
    found: list[Moment] = [
        *(lambda left, wait=wait: (FIRST, wait) for wait in first),
        *(lambda left, wait=wait: ("writing the tables", wait) for wait in last),
        *(lambda left, share=share: (FIRST, share * life.of(left)) for share in shares),
    ]
    draw.shuffle(found)
    yield from found
    yield None


def _wait_until(moment: Moment, process: subprocess.Popen[bytes], said: Path, left: int) -> bool:
    """Whether the process still lives when the moment has come."""
    phase, seconds = moment(left)
    late = ["writing the tables", "writing the report"]
    while phase != FIRST and process.poll() is None and _phase(said) not in late:
        time.sleep(LOOK)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    assert process.returncode == 0, said.read_text()
    return False


def _kill(process: subprocess.Popen[bytes], said: Path) -> str:
    """SIGKILL to the sweep alone; its workers must follow. Returns what it was doing."""
    workers = psutil.Process(process.pid).children(recursive=True)
    phase = _phase(said)
    process.kill()
    assert process.wait() == -9, "it had ended"
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, f"workers live on: {alive}"
    return phase


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


def _tasks_done(run: Path) -> int:
    logs = run.glob("logs/*.log")
    return sum("done in" in log.read_text() for log in logs)


def _told(phases: Counter[str]) -> str:
    order = [FIRST, *reversed(PHASES.values())]
    return ", ".join(f"{phases[name]} while {name}" for name in order if phases[name])
