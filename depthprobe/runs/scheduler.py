"""Distribute tasks over processes and over the sweeps that share a run.

One lock per task, so that no two sweeps do the same work. The locks are the operating system's
(``flock``): it releases them when their process dies, whatever the signal.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from depthprobe.methods import Task
from depthprobe.runs.processes import SAFE_PATH, ProcessGroup, Progress
from depthprobe.runs.records import LOCKS, outputs_of, state_of

# --- locks: one sweep a task ----------------------------------------------------------------------

WHOLE_RUN = ".run"  # the lock for work on the whole run: its layout, its timings, its tables

State = Literal["ours", "theirs", "done", "failed"]


class Claims:
    """The tasks that this sweep has claimed. In a group of processes the first one claims."""

    def __init__(self, folder: Path, group: ProcessGroup | None = None) -> None:
        self._run, self._group = folder, group or ProcessGroup()
        self._locks: dict[str, FileLock] = {}

    def take(self, task: Task) -> State:
        """Try to claim a task: it is ``ours``, ``theirs``, or already ``done`` or ``failed``."""
        return self._group.from_first(lambda: self._take(task))

    def leave(self, task: Task) -> None:
        """Release a task once its records are written; does nothing if it is not held."""
        if (lock := self._locks.pop(task.id, None)) is not None:
            _remove(lock)

    def leave_all(self) -> None:
        """Release every task."""
        while self._locks:
            _remove(self._locks.popitem()[1])

    def _take(self, task: Task) -> State:
        lock = _lock(self._run, task.id)
        if not _acquire(lock):
            return "theirs"
        self._locks[task.id] = lock
        # read under the lock: another sweep may have done it
        state = state_of(outputs_of(self._run, task))
        if state == "left":
            return "ours"
        self.leave(task)
        return state


@contextmanager
def whole_run(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of what all trials share; waits while another sweep holds it."""
    lock = _lock(folder, WHOLE_RUN)
    if not _acquire(lock):
        progress.message("waiting for another sweep of this run")
        _acquire(lock, wait=True)
    try:
        yield
    finally:
        lock.release()


def clear(folder: Path) -> None:
    """Remove the folder of locks, unless another sweep still holds one.

    A killed sweep leaves its lock files behind.
    """
    for place in [*(folder / LOCKS).glob("*.lock")]:
        lock = _lock(folder, place.stem)
        with suppress(OSError):
            if _acquire(lock):
                _remove(lock)
    with suppress(OSError):
        (folder / LOCKS).rmdir()


def held(folder: Path) -> list[str]:
    """Names of the tasks that a living process is working on."""
    names = []
    for place in sorted((folder / LOCKS).glob("[!.]*.lock")):
        lock = _lock(folder, place.stem)
        with suppress(OSError):  # this user may only read the run, so the locks can't be tested
            if _acquire(lock):
                lock.release()
            else:
                names.append(place.stem)
    return names


def _lock(folder: Path, name: str) -> FileLock:
    return FileLock(folder / LOCKS / f"{name}.lock", thread_local=False)


def _acquire(lock: FileLock, *, wait: bool = False) -> bool:
    """Take a lock; make its folder again if another sweep removes it meanwhile."""
    while True:
        Path(lock.lock_file).parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            try:
                lock.acquire(timeout=-1 if wait else 0)
            except Timeout:
                return False
            return True


def _remove(lock: FileLock) -> None:
    """Unlink a lock's file while holding it; a waiter then sees an unlinked inode and retries."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


# --- the queue of tasks --------------------------------------------------------------------------

POLL = 1.0  # seconds between two looks at tasks that another sweep holds


@dataclass(frozen=True)
class Outcome:
    """How a task ended; ``error`` is None on success."""

    task: Task
    error: str | None
    seconds: float
    elsewhere: bool = False  # another sweep of the run did it and wrote its records


class Queue:
    """Yields tasks in the order of the plan until each has ended, here or in another sweep.

    If ``more`` is set, it is asked for further tasks when all have ended; none ends the queue.

    The caller must hand the outcome of each task back to :meth:`end`.

    Args:
        done: ids of trials whose records are there.
        failed: ids of trials that failed before and are not tried again.
    """

    more: Callable[[], Iterable[Task]] = tuple

    def __init__(
        self, tasks: Iterable[Task], claims: Claims, *, done: set[str], failed: set[str]
    ) -> None:
        self.waiting, self._given = list(tasks), 0
        self._claims, self._done, self._failed = claims, set(done), set(failed)

    def next(self) -> Task | Outcome | None:
        """A task, the outcome of one that ended elsewhere, or None while others hold all."""
        for task in self.waiting:
            lost = next((need for need in task.needs if need in self._failed), None)
            if lost is None and not self._done.issuperset(task.needs):
                continue
            state = self._claims.take(task)
            if state == "theirs":
                continue
            self.waiting.remove(task)
            self._given += 1
            if state != "ours":
                error = "failed in another sweep" if state == "failed" else None
                return Outcome(task, error, 0.0, elsewhere=True)
            return task if lost is None else Outcome(task, f"needs {lost}, which failed", 0.0)
        return None

    def __iter__(self) -> Iterator[Task | Outcome]:
        """Yield tasks one after the other, to run in this process."""
        while self.waiting:
            ready = self.next()
            if ready is None:
                time.sleep(POLL)
            else:
                yield ready

    def end(self, outcome: Outcome) -> None:
        """Release a task that has ended, so that tasks that depend on it may start."""
        (self._done if outcome.error is None else self._failed).update(outcome.task.names)
        self._claims.leave(outcome.task)
        self._given -= 1
        if not self.waiting and not self._given:
            self.waiting += self.more()


# --- workers -------------------------------------------------------------------------------------


def run_in_processes(
    queue: Queue,
    work: Callable[[Task], Outcome],
    *,
    jobs: int,
    prepare: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[Outcome]:
    """Run up to ``jobs`` tasks at a time. A task that kills its process fails; the others go on.

    Args:
        work: called with a task in a worker.
        prepare: called once in each worker, with a counter of workers and then ``arguments``.
    """
    running: dict[Future[Outcome], Task] = {}
    suspects: list[Task] = []  # tasks that ran when a worker died: run again, one at a time
    context = _Workers()

    def new_pool() -> ProcessPoolExecutor:
        initial = (context.Value("i", 0), *arguments)
        return ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare, initargs=initial)

    path = {name: os.environ.get(name) for name in SAFE_PATH}
    os.environ.update(SAFE_PATH)
    pool = new_pool()
    try:
        while queue.waiting or running or suspects:
            limit = 1 if suspects else jobs
            while len(running) < limit:
                ready = suspects.pop(0) if suspects else queue.next()
                if ready is None:
                    break
                if isinstance(ready, Outcome):
                    yield ready
                else:
                    running[pool.submit(work, ready)] = ready
            if not running:
                if queue.waiting:
                    time.sleep(POLL)
                continue
            alone = len(running) == 1
            free = queue.waiting and len(running) < limit
            broken: list[Task] = []
            for future in wait(running, POLL if free else None, FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    broken.append(task)
                else:
                    yield outcome
            if broken:
                # the pool loses all running tasks; run singly, the culprit shows
                broken += running.values()
                running.clear()
                pool.shutdown(wait=False, cancel_futures=True)
                pool = new_pool()
                if alone:
                    yield Outcome(broken.pop(), "its process died (killed, or out of memory)", 0.0)
                suspects += broken
    finally:
        # kill at once: after an interrupt nobody waits for the workers' trainings
        workers = [worker for worker in context.started if worker.pid is not None]
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(timeout=10)
        # end the pool's thread before Python exits, which would wake it unguarded
        pool.shutdown(wait=True, cancel_futures=True)
        for name, before in path.items():
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def describe(error: BaseException) -> str:
    """An error in one line: type, message, and the innermost line of our code that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "depthprobe" in f.filename]
    place = f" (at {Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


class _Workers(SpawnContext):
    """Starts worker processes and remembers them.

    They are spawned: a fork of a process that has used torch's threads or CUDA can hang.
    """

    def __init__(self) -> None:
        self.started: list[SpawnProcess] = []

    def Process(self, *arguments: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        process = _Worker(*arguments, **options)
        self.started.append(process)
        return process


class _Worker(SpawnProcess):
    """A process that ignores an interrupt from the terminal; its parent ends it."""

    def start(self) -> None:
        """Start it with the signal blocked, which it inherits: it is ignored only later."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
