"""Run tasks in the order of their needs: in worker processes, or in this one."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from depthprobe.sweep.plan import Task


@dataclass(frozen=True)
class Outcome:
    """How a task ended; ``error`` is None when it did its work."""

    task: Task
    error: str | None
    seconds: float


Work = Callable[[Task], float]


def run_here(
    tasks: Iterable[Task], work: Work, done: set[str], *, caught: type[Exception] = Exception
) -> Iterator[Outcome]:
    """One task after the other in this process; a fault ends its task alone.

    Args:
        caught: the faults that end their task alone; any other ends the sweep.
    """
    for task in tasks:
        missing = [need for need in task.needs if need not in done]
        if missing:
            yield Outcome(task, f"needs {missing[0]}, which failed", 0.0)
            continue
        try:
            seconds = work(task)
        except caught as error:  # by default whatever it was: the other tasks go on
            yield Outcome(task, describe(error), 0.0)
        else:
            done.add(task.id)
            yield Outcome(task, None, seconds)


def run_in_processes(
    tasks: Iterable[Task],
    work: Work,
    done: set[str],
    *,
    jobs: int,
    prepare: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[Outcome]:
    """Up to ``jobs`` tasks at a time; one that kills its process fails alone.

    Args:
        work: called with a task in a worker, returns its seconds.
        done: ids whose needs are met already; grows as tasks end well.
        prepare: called with ``arguments`` once in each worker.
    """
    waiting = list(tasks)
    running: dict[Future[float], Task] = {}
    pool = _pool(jobs, prepare, arguments)
    suspects: list[Task] = []  # were running when a worker died: run again, one at a time
    try:
        while waiting or running or suspects:
            limit = 1 if suspects else jobs
            queue = suspects or waiting
            while len(running) < limit and (task := _next_ready(queue, done)) is not None:
                queue.remove(task)
                running[pool.submit(work, task)] = task
            if not running:  # what is left needs something that failed
                task = queue.pop(0)
                lost = next(need for need in task.needs if need not in done)
                yield Outcome(task, f"needs {lost}, which failed", 0.0)
                continue
            alone = len(running) == 1
            broken: list[Task] = []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    seconds = future.result()
                except BrokenProcessPool:
                    broken.append(task)
                except Exception as error:  # whatever it was, the other tasks go on
                    yield Outcome(task, describe(error), 0.0)
                else:
                    done.add(task.id)
                    yield Outcome(task, None, seconds)
            if broken:
                # every running task is lost with the pool; which one killed it shows when alone
                broken += running.values()
                running.clear()
                pool.shutdown(wait=False, cancel_futures=True)
                pool = _pool(jobs, prepare, arguments)
                if alone:
                    yield Outcome(broken.pop(), "its process died (killed, or out of memory)", 0.0)
                suspects += broken
    finally:
        _stop(pool)


def describe(error: BaseException) -> str:
    """One line: type, message, and the innermost line of ours that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "depthprobe" in f.filename]
    place = f" (at {frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _next_ready(queue: list[Task], done: set[str]) -> Task | None:
    return next((task for task in queue if all(need in done for need in task.needs)), None)


def _pool(
    jobs: int, prepare: Callable[..., None], arguments: tuple[Any, ...]
) -> ProcessPoolExecutor:
    # spawn: a forked copy of a process that has used torch's threads or CUDA can hang
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare, initargs=arguments)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers at once: after an interrupt nobody waits for their training."""
    workers = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        if worker.is_alive():
            worker.terminate()
    for worker in workers:
        worker.join(timeout=10)
