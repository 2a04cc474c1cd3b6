"""Order of needs, and a task that fails or kills its process fails alone."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from depthprobe.errors import BadInput, one_of
from depthprobe.methods import Task
from depthprobe.runs import scheduler as executors
from depthprobe.runs.plan import trial_of
from depthprobe.runs.scheduler import Outcome, Queue, describe, run_in_processes

SASREC, FULL, PROBE = (
    Task(method, 0, (trial_of(method, kept, 0, 2),), needs)
    for method, kept, needs in (
        ("sasrec", (), ()),
        ("full", (0, 1), ("sasrec-s0",)),
        ("early-exit", (0,), ("full-d02-s0",)),
    )
)
OTHERS = [Task("popularity", seed, (trial_of("popularity", (), seed, 2),)) for seed in range(4)]


class _State:
    folder = Path()


class FakeClaims:
    """Others hold, or have ended, some of the tasks; what is taken must be left."""

    def __init__(self, **told: list[str]) -> None:
        self.told, self.held, self.left = told, list[str](), list[str]()

    def take(self, task: Task) -> str:
        told = self.told.get(task.id.replace("-", "_"), [])
        state = told.pop(0) if told else "ours"
        if state == "ours":
            self.held.append(task.id)
        return state

    def leave(self, task: Task) -> None:
        self.left.append(task.id)


def prepare(started: Any, folder: str) -> None:
    _State.folder = Path(folder)


def work(task: Task) -> Outcome:
    (_State.folder / task.id).touch()
    if (_State.folder / f"{task.id}.fail").exists():
        return Outcome(task, "a reason", 0.0)
    if (_State.folder / f"{task.id}.die").exists():
        os._exit(9)
    return Outcome(task, None, 1.5)


Executor = Callable[[Queue, Path], Iterator[Outcome]]


def here(queue: Queue, folder: Path) -> Iterator[Outcome]:
    prepare(None, str(folder))
    for ready in queue:
        outcome = work(ready) if isinstance(ready, Task) else ready
        yield outcome
        queue.end(outcome)


def processes(queue: Queue, folder: Path) -> Iterator[Outcome]:
    options = {"jobs": 2, "prepare": prepare, "arguments": (str(folder),)}
    for outcome in run_in_processes(queue, work, **options):
        yield outcome
        queue.end(outcome)


def queue_of(*tasks: Task, claims: FakeClaims | None = None, failed: Iterable[str] = ()) -> Queue:
    return Queue(tasks, claims or FakeClaims(), done=set(), failed=set(failed))


@pytest.mark.parametrize("execute", [here, processes])
def test_order_of_needs(execute: Executor, tmp_path: Path) -> None:
    found = list(execute(queue_of(SASREC, FULL, PROBE, *OTHERS), tmp_path))
    order = [outcome.task.id for outcome in found]
    assert sorted(order) == sorted(t.id for t in (SASREC, FULL, PROBE, *OTHERS))
    assert order.index(SASREC.id) < order.index(FULL.id) < order.index(PROBE.id)
    assert {outcome.error for outcome in found} == {None}
    assert {outcome.seconds for outcome in found} == {1.5}


@pytest.mark.parametrize("execute", [here, processes])
def test_a_fault_ends_its_task_and_what_needs_it(execute: Executor, tmp_path: Path) -> None:
    (tmp_path / f"{FULL.id}.fail").touch()
    found = {o.task.id: o.error for o in execute(queue_of(SASREC, FULL, PROBE, *OTHERS), tmp_path)}
    assert found[SASREC.id] is None
    assert found[FULL.id] == "a reason"
    assert "needs full-d02-s0" in str(found[PROBE.id])
    assert all(found[task.id] is None for task in OTHERS)
    assert not (tmp_path / PROBE.id).exists()


def test_a_killed_process_fails_its_task_alone(tmp_path: Path) -> None:
    (tmp_path / f"{OTHERS[1].id}.die").touch()
    found = {o.task.id: o.error for o in processes(queue_of(SASREC, *OTHERS), tmp_path)}
    assert "process died" in str(found.pop(OTHERS[1].id))
    assert len(found) == 4
    assert set(found.values()) == {None}


def test_one_that_is_stopped_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    ended = processes(queue_of(*OTHERS), tmp_path)
    next(ended)
    ended.close()  # as an interrupt does
    left = {thread for thread in threading.enumerate() if thread.is_alive()} - before
    assert not left


@pytest.mark.parametrize("execute", [here, processes])
def test_what_others_hold_is_left_to_them(
    execute: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "POLL", 0.01)
    claims = FakeClaims(sasrec_s0=["theirs", "theirs", "done"], popularity_s1=["theirs", "failed"])
    found = list(execute(queue_of(SASREC, FULL, *OTHERS, claims=claims), tmp_path))
    ended = {outcome.task.id: outcome for outcome in found}
    assert ended[SASREC.id] == Outcome(SASREC, None, 0.0, elsewhere=True)
    assert ended[OTHERS[1].id].elsewhere
    assert "another sweep" in str(ended[OTHERS[1].id].error)
    assert ended[FULL.id].error is None  # it waited for what the other sweep did
    assert not (tmp_path / SASREC.id).exists()
    assert not (tmp_path / OTHERS[1].id).exists()
    assert sorted(claims.held) == sorted(t.id for t in (FULL, OTHERS[0], *OTHERS[2:]))
    assert set(claims.held) <= set(claims.left)


def test_a_task_is_held_until_its_outcome_has_been_dealt_with(tmp_path: Path) -> None:
    claims = FakeClaims()
    for outcome in here(queue_of(*OTHERS, claims=claims), tmp_path):
        assert claims.held == [*claims.left, outcome.task.id]
    assert claims.left == claims.held


def test_what_needs_an_earlier_failure_fails_too(tmp_path: Path) -> None:
    found = list(here(queue_of(FULL, PROBE, failed=[SASREC.id]), tmp_path))
    assert [outcome.error for outcome in found] == [
        "needs sasrec-s0, which failed",
        "needs full-d02-s0, which failed",
    ]


def test_an_error_is_described_with_our_line_that_raised_it() -> None:
    with pytest.raises(BadInput) as caught:
        one_of("a.b", 2, ("3",))
    assert re.match(
        r"BadInput: a\.b: expected one of 3, got 2 \(at errors\.py, line \d+\)",
        describe(caught.value),
    )


def look(task: Task) -> Outcome:
    """What a worker imports, and how it takes Ctrl-C."""
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    return Outcome(task, f"{socket.__file__} {blocked} {sys.path[0]}", 0.0)


def test_workers_import_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("socket", "selectors", "pickle"):
        text = f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})\n"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("/a/folder/of/the/parent")
    resource_tracker._resource_tracker._stop()  # it is started anew, from this folder
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    options = {"jobs": 1, "prepare": prepare, "arguments": (str(tmp_path),)}
    (outcome,) = run_in_processes(queue_of(OTHERS[0]), look, **options)
    assert outcome.error == f"{socket.__file__} True /a/folder/of/the/parent"
    assert not (tmp_path / "imported").exists()
    assert "PYTHONSAFEPATH" not in os.environ
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
