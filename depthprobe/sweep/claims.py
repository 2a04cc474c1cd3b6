"""Who works on what: a lock a task, so that several sweeps share one run and do nothing twice.

The locks are the operating system's (``flock``): whoever dies, by any signal, has let go of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from depthprobe.sweep.plan import Task
from depthprobe.sweep.records import state_of, to_retry
from depthprobe.sweep.team import Team

LOCKS = ".locks"
WHOLE = ".run"  # what lays a run out, times it or writes its tables

State = Literal["ours", "theirs", "done", "failed"]
Outputs = Callable[[Task], list[Path]]


class Claims:
    """The tasks of a run that this sweep holds.

    Args:
        folder: of the run.
        outputs: the folders that a task leaves.
        retry: failures that are tried again, with how often they had failed when the command
            was given: those alone, so that each is tried once a command.
        team: processes that train together: the first one claims for all.
    """

    def __init__(
        self, folder: Path, outputs: Outputs, retry: Mapping[str, int], team: Team | None = None
    ) -> None:
        self._folder, self._outputs, self._team = folder / LOCKS, outputs, team or Team()
        self._locks: dict[str, FileLock] = {}
        self._retry = retry

    def take(self, task: Task) -> State:
        """Claim a task: ``ours`` now, ``theirs``, or it was ``done`` or ``failed`` meanwhile."""
        state: State = self._team.agree(self._take(task) if self._team.writes else "theirs")
        return state

    def leave(self, task: Task) -> None:
        """Let go of a task, once its records are written; of one that is not held, nothing."""
        self._let_go(task.id)

    def leave_all(self) -> None:
        """Let go of everything."""
        for name in list(self._locks):
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        lock = self._locks.pop(name, None)
        if lock is not None:
            # while it is held: whoever has it open already sees that it guards no name any more
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _take(self, task: Task) -> State:
        lock = _lock(self._folder / f"{task.id}.lock")
        try:
            _acquire(lock, 0)
        except Timeout:
            return "theirs"
        self._locks[task.id] = lock
        outputs = self._outputs(task)
        state = state_of(outputs)
        if state == "left" or (state == "failed" and to_retry(outputs, self._retry)):
            return "ours"
        self.leave(task)
        return state


@contextmanager
def whole_run(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Alone with what all trials share: waits until no other sweep is at it."""
    place = folder / LOCKS / f"{WHOLE}.lock"
    lock = _lock(place)
    try:
        _acquire(lock, 0)
    except Timeout:
        say("waiting for another sweep of this run")
        _acquire(lock, -1)
    try:
        yield
    finally:
        lock.release()


def clear(folder: Path) -> None:
    """Remove the folder of the locks, unless another sweep has some there.

    What a sweep that was killed held, nobody may have come to since: its task can have been done.
    """
    for place in [*(folder / LOCKS).glob("*.lock")]:
        lock = _lock(place)
        with suppress(OSError, Timeout):
            _acquire(lock, 0)
            place.unlink(missing_ok=True)
            lock.release()
    with suppress(OSError):
        (folder / LOCKS).rmdir()


def held(folder: Path) -> list[str]:
    """Tasks of a run that some living process works on, by name."""
    found = []
    for place in sorted((folder / LOCKS).glob("[!.]*.lock")):
        lock = _lock(place)
        try:
            _acquire(lock, 0)
        except Timeout:
            found.append(place.stem)
        except OSError:  # a run that this user may only read: nobody can be asked
            continue
        else:
            lock.release()
    return found


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, thread_local=False)


def _acquire(lock: FileLock, timeout: float) -> None:
    """Take a lock, though another sweep that ends may remove its folder in between."""
    while True:
        try:
            lock.acquire(timeout=timeout)
        except FileNotFoundError:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        else:
            return
