"""What is left of a sweep is guessed to take: jobs, by the times of this machine, on workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from depthprobe.cost.workload import Workload
from depthprobe.methods import Task, names
from depthprobe.runs.context import Context
from depthprobe.runs.effort import jobs_of, timing_seconds
from depthprobe.runs.forecast import Job, Span, longest_chain, schedule, slowed
from depthprobe.runs.pieces import Sizes
from depthprobe.runs.rates import Found, measured_rates, timed_rates

START = 4.0  # seconds until a worker has loaded its libraries and the log; on two Xeon cores


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """Who works: so many workers, each with so many threads on a CPU.

    Attributes:
        processes: that train together, under a launcher.
        here: a worker is a process that is there already.
        apart: each worker has a machine of its own.
    """

    workers: int
    threads: int
    processes: int = 1
    here: bool = False
    apart: bool = False


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is left is guessed to take, seconds and bytes.

    Attributes:
        span: of the whole, on so many workers.
        work: of all jobs one after the other.
        chain: jobs that must follow each other and take longest.
        by_method: the work of each method.
    """

    span: Span
    work: Span
    chain: tuple[Job, ...]
    by_method: dict[str, Span]


def find_rates(
    context: Context,
    tasks: Sequence[Task],
    sizes: Sizes,
    workload: Workload,
    *,
    threads: int,
    say: Callable[[str], None],
) -> Found:
    """The times that the run has measured, else what a short measurement says.

    Args:
        threads: that a worker will have.
        say: is told before anything is measured.
    """
    blocks, whole = tasks[0].blocks, any_depth(tasks)
    found = timed_rates(context, blocks, sizes, workload, whole=whole)
    if found is not None:
        return found
    say("timing the backbone for some seconds, with random weights")
    return measured_rates(context, blocks, workload, threads=threads, whole=whole)


def any_depth(tasks: Sequence[Task]) -> bool:
    """Whether anything but baselines is among the tasks."""
    return any(task.method not in names("baseline") for task in tasks)


def estimate_of(
    context: Context,
    tasks: Sequence[Task],
    sizes: Sizes,
    found: Found,
    crowd: Crowd,
    *,
    there: frozenset[str] = frozenset(),
) -> Estimate | None:
    """What the tasks take by the times that were found; None if none were.

    Args:
        there: what the tasks need and the run has already, see
            :func:`depthprobe.runs.effort.jobs_of`.
    """
    if found.rates is None:
        return None
    study, rates = context.study, found.rates
    jobs = jobs_of(study, tasks, sizes, rates, there=there, processes=crowd.processes)
    alone = 0.0
    if found.source != "timed":  # the run begins with it
        alone = timing_seconds(study, tasks[0].blocks, rates, whole=any_depth(tasks))
    begins = 0.0 if crowd.here else START
    slow = slowed(jobs, sharing(context.device, found.threads, crowd))

    def both(seconds: Callable[[Sequence[Job]], float]) -> Span:
        return Span(seconds(jobs), seconds(slow))

    def of(method: str) -> Span:
        return both(lambda each: sum(job.seconds for job in each if job.method == method))

    return Estimate(
        span=both(lambda each: alone + schedule(each, crowd.workers, start=begins)),
        work=both(lambda each: sum(job.seconds for job in each)),
        chain=longest_chain(slow),
        by_method={method: of(method) for method in dict.fromkeys(job.method for job in jobs)},
    )


def sharing(device: torch.device, timed: int, crowd: Crowd) -> float:
    """How many times as long a job takes beside others, at most, as it was timed to take alone.

    On a CPU by how many threads fewer it has, as if all of them had been of use; on GPUs by how
    many jobs share one.
    """
    if crowd.apart:
        return 1.0
    if device.type == "cpu":
        return max(1.0, timed / crowd.threads)
    return float(shared_by(device, crowd.workers))


def shared_by(device: torch.device, workers: int) -> int:
    """How many workers are on one device: all of them, but where there are several GPUs."""
    return -(-workers // max(1, torch.cuda.device_count()))
