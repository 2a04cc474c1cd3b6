"""Order of needs, and a task that fails or kills its process fails alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from depthprobe.sweep.executors import Outcome, run_here, run_in_processes
from depthprobe.sweep.plan import Task, Trial

SASREC, FULL, PROBE = (
    Task(method, 0, (Trial(method, kept, 0, 2),), needs)
    for method, kept, needs in (
        ("sasrec", (), ()),
        ("full", (0, 1), ("sasrec-s0",)),
        ("early-exit", (0,), ("full-d02-s0",)),
    )
)
OTHERS = [Task("popularity", seed, (Trial("popularity", (), seed, 2),)) for seed in range(4)]


class _State:
    folder = Path()


def prepare(folder: str) -> None:
    _State.folder = Path(folder)


def work(task: Task) -> float:
    (_State.folder / task.id).touch()
    if (_State.folder / f"{task.id}.raise").exists():
        raise RuntimeError("a reason\nin two lines")
    if (_State.folder / f"{task.id}.die").exists():
        os._exit(9)
    return 1.5


Executor = Callable[[list[Task], Path], Iterator[Outcome]]


def here(tasks: list[Task], folder: Path) -> Iterator[Outcome]:
    prepare(str(folder))
    return run_here(tasks, work, set())


def processes(tasks: list[Task], folder: Path) -> Iterator[Outcome]:
    return run_in_processes(tasks, work, set(), jobs=2, prepare=prepare, arguments=(str(folder),))


@pytest.mark.parametrize("execute", [here, processes])
def test_order_of_needs(execute: Executor, tmp_path: Path) -> None:
    found = list(execute([SASREC, FULL, PROBE, *OTHERS], tmp_path))
    order = [outcome.task.id for outcome in found]
    assert sorted(order) == sorted(t.id for t in (SASREC, FULL, PROBE, *OTHERS))
    assert order.index(SASREC.id) < order.index(FULL.id) < order.index(PROBE.id)
    assert {outcome.error for outcome in found} == {None}
    assert {outcome.seconds for outcome in found} == {1.5}


@pytest.mark.parametrize("execute", [here, processes])
def test_a_fault_ends_its_task_and_what_needs_it(execute: Executor, tmp_path: Path) -> None:
    (tmp_path / f"{FULL.id}.raise").touch()
    found = {o.task.id: o.error for o in execute([SASREC, FULL, PROBE, *OTHERS], tmp_path)}
    assert found[SASREC.id] is None
    assert "RuntimeError: a reason" in str(found[FULL.id])
    assert "needs full-d02-s0" in str(found[PROBE.id])
    assert all(found[task.id] is None for task in OTHERS)
    assert not (tmp_path / PROBE.id).exists()


def test_a_killed_process_fails_its_task_alone(tmp_path: Path) -> None:
    (tmp_path / f"{OTHERS[1].id}.die").touch()
    found = {o.task.id: o.error for o in processes([SASREC, *OTHERS], tmp_path)}
    assert "process died" in str(found.pop(OTHERS[1].id))
    assert len(found) == 4
    assert set(found.values()) == {None}
