"""Several sweeps share a run: each task is held by one of them, and a death lets go."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins

from depthprobe.files import write_json
from depthprobe.methods import Task
from depthprobe.runs.plan import trial_of
from depthprobe.runs.processes import Progress
from depthprobe.runs.records import Provenance, Record, forget_failures, outputs_of, write_failure
from depthprobe.runs.scheduler import LOCKS, Claims, clear, held, whole_run
from depthprobe.runs.store import open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Study

TASK = Task("sasrec", 0, (trial_of("sasrec", (), 0, 2),))
ORIGIN = Provenance("study", "data", None, None, {}, "a machine", "cpu", 1)
SPAWN = multiprocessing.get_context("spawn")


def done(folder: Path) -> None:
    place = folder / "trials" / TASK.id
    place.mkdir(parents=True, exist_ok=True)
    (place / "users.parquet").touch()
    record = Record(id=TASK.id, method=TASK.method, seed=0, status="done")
    write_json(place / "record.json", to_builtins(record))


def fail(folder: Path) -> None:
    write_failure(outputs_of(folder, TASK), TASK, "no luck", ORIGIN)


def hold(folder: Path) -> None:
    """In a process of its own: take the task, and never let go."""
    own = Claims(folder)
    assert own.take(TASK) == "ours"
    (folder / "held").touch()
    time.sleep(60)
    own.leave_all()


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.take(TASK) == "ours"
    assert other.take(TASK) == "theirs"
    assert held(tmp_path) == [TASK.id]
    one.leave(TASK)
    assert held(tmp_path) == []
    assert other.take(TASK) == "ours"
    other.leave_all()
    clear(tmp_path)
    assert not (tmp_path / LOCKS).exists()


def test_what_a_dead_sweep_held_is_cleared_and_what_a_living_one_holds_is_not(
    tmp_path: Path,
) -> None:
    living = Claims(tmp_path)
    assert living.take(TASK) == "ours"
    (tmp_path / LOCKS / "similarity-s0.lock").touch()  # its task was done before the kill
    clear(tmp_path)
    assert [path.name for path in (tmp_path / LOCKS).iterdir()] == [f"{TASK.id}.lock"]
    living.leave_all()
    clear(tmp_path)
    assert not (tmp_path / LOCKS).exists()


def test_what_was_done_meanwhile_is_not_done_again(tmp_path: Path) -> None:
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.take(TASK) == "ours"
    done(tmp_path)
    one.leave(TASK)
    assert other.take(TASK) == "done"
    assert held(tmp_path) == []


def test_a_failure_stays_one_until_it_is_forgotten(tmp_path: Path) -> None:
    fail(tmp_path)
    assert Claims(tmp_path).take(TASK) == "failed"
    forget_failures(outputs_of(tmp_path, TASK))
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.take(TASK) == "ours"
    fail(tmp_path)
    one.leave(TASK)
    assert other.take(TASK) == "failed"
    done(tmp_path)
    forget_failures(outputs_of(tmp_path, TASK))
    assert other.take(TASK) == "done"


def test_a_killed_holder_has_let_go(tmp_path: Path) -> None:
    # a process of its own at once; nothing here needs one that has imported all anew
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    process.start()
    for _ in range(600):
        if (tmp_path / "held").exists():
            break
        time.sleep(0.05)
    own = Claims(tmp_path)
    assert own.take(TASK) == "theirs"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert own.take(TASK) == "ours"


def test_alone_with_the_run(tmp_path: Path, recorder: Any) -> None:
    with whole_run(tmp_path, recorder):
        assert held(tmp_path) == []  # it is no task
    assert recorder.texts == []


def sweep(study: Study, folder: Path, told: Path) -> None:
    """In a process of its own: a sweep that writes down what it did itself."""
    did: list[str] = []

    class Tasks(Progress):
        def done(self, trial: str, status: str, seconds: float, note: str) -> None:
            if note != "in another sweep of this run":
                did.append(trial)

    run_sweep(study, folder, jobs=0, progress=Tasks())
    told.write_text(json.dumps(did))


@pytest.mark.slow
def test_two_sweeps_of_a_new_run_share_the_work(study: Study, tmp_path: Path) -> None:
    few = replace(study, methods=("popularity", "sasrec", "full", "finetune", "early-exit"))
    alone = run_sweep(few, tmp_path / "alone", jobs=0)
    told = [tmp_path / "a.json", tmp_path / "b.json"]
    both = [SPAWN.Process(target=sweep, args=(few, tmp_path / "run", path)) for path in told]
    for process in both:
        process.start()
    for process in both:
        process.join()
    first, second = (json.loads(path.read_text()) for path in told)
    tasks = 1 + 2 * (1 + 1 + 2 + 1)
    assert len(set(first) | set(second)) == len(first) + len(second) == tasks
    assert first
    assert second
    shared = open_run(tmp_path / "run")
    assert shared.users.equals(alone.users)
    assert shared.metrics.equals(alone.metrics)
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    assert not (tmp_path / "run" / LOCKS).exists()
