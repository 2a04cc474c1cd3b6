"""How long a sweep will take: jobs that wait for each other, dealt out to workers in order."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter


@dataclass(frozen=True)
class Job:
    """Something that one worker does in one go.

    Attributes:
        seconds: how long it takes.
        needs: ids of jobs that must have ended before; ids of none are of what is there already.
        method: whose time it is.
    """

    id: str
    seconds: float
    needs: tuple[str, ...] = ()
    method: str = ""


@dataclass(frozen=True)
class Span:
    """Seconds that a number lies between; a single guess has both ends alike."""

    low: float
    high: float


def schedule(jobs: Sequence[Job], workers: int, *, start: float = 0.0) -> float:
    """Seconds until the last job ends, if free workers take the first job that is ready.

    That is how a sweep deals its tasks out (list scheduling). It is never shorter than the longest
    chain of needs, nor than all seconds divided by the workers.

    Args:
        jobs: in the order in which they are looked at.
        workers: at least 1.
        start: seconds until a worker can begin.

    Raises:
        ValueError: without a worker, or if jobs need each other in a circle.

    >>> sasrec, full = Job("sasrec", 2), Job("full", 5, ("sasrec",))
    >>> schedule([sasrec, full, Job("student", 1, ("full",)), Job("variant", 3, ("sasrec",))], 2)
    8.0
    """
    if workers < 1:
        raise ValueError(f"{workers} workers, expected 1 or more")
    known = {job.id for job in jobs}
    waiting, ended = list(jobs), set[str]()
    running: list[tuple[float, int, str]] = []  # a heap: when it ends, its place, its id
    now, place = float(start) if jobs else 0.0, 0
    while waiting or running:
        while len(running) < workers:
            ready = next((job for job in waiting if not (known & {*job.needs}) - ended), None)
            if ready is None:
                break
            waiting.remove(ready)
            heapq.heappush(running, (now + ready.seconds, place, ready.id))
            place += 1
        if not running:
            names = ", ".join(job.id for job in waiting[:3])
            raise ValueError(f"jobs that need each other in a circle: {names}")
        now, _, name = heapq.heappop(running)
        ended.add(name)
    return now


def longest_chain(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """The jobs, each needing the one before, that take longest: no number of workers helps.

    Args:
        jobs: each after what it needs.
    """
    best: dict[str, tuple[float, tuple[Job, ...]]] = {}
    for job in jobs:
        before = max(
            (best[need] for need in job.needs if need in best), default=(0.0, ()), key=itemgetter(0)
        )
        best[job.id] = (before[0] + job.seconds, (*before[1], job))
    return max(best.values(), default=(0.0, ()), key=itemgetter(0))[1]


def without_lost(jobs: Sequence[Job], lost: Collection[str]) -> list[Job]:
    """The jobs that can be done where some will never be: neither those nor what needs them.

    Args:
        jobs: each after what it needs.
        lost: ids of what has failed and is left so.
    """
    gone, kept = set(lost), list[Job]()
    for job in jobs:
        if job.id in gone or gone & {*job.needs}:
            gone.add(job.id)
        else:
            kept.append(job)
    return kept


def slowed(jobs: Sequence[Job], times: float) -> list[Job]:
    """The same jobs, each taking so many times as long."""
    return [replace(job, seconds=times * job.seconds) for job in jobs]
