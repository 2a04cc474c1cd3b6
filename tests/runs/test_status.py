"""The state of a run's tasks, and what those who work on it last said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from depthprobe.methods import Task
from depthprobe.runs.plan import plan, trial_of
from depthprobe.runs.scheduler import Claims
from depthprobe.runs.store import Run, status_of, working


def test_states_of_tasks(small_run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_run.path, tmp_path / "run"))
    tasks = {task.id: task for task in plan(small_run.study, 3)}
    whole = status_of(folder)
    assert whole.total("done") == len(tasks)
    assert not whole.working
    assert not whole.failed
    shutil.rmtree(folder / "trials" / "finetune-d01-s0")
    shutil.rmtree(folder / "trials" / "early-exit-d01-s1")  # one of its pass
    record = folder / "trials" / "heal-d02-s1" / "record.json"
    failed = json.loads(record.read_text()) | {"status": "failed", "error": "no\nluck"}
    record.write_text(json.dumps(failed))
    claims = Claims(folder)
    assert claims.take(tasks["finetune-d01-s0"]) == "ours"
    found = status_of(folder)
    assert found.failed == [("heal-d02-s1", "no luck")]
    assert [each.task for each in found.working] == ["finetune-d01-s0"]
    assert found.counts["finetune"] == {"done": 3, "working": 1}
    assert found.counts["early-exit"] == {"done": 1, "left": 1}
    assert found.total("done") == len(tasks) - 3
    claims.leave_all()
    assert status_of(folder).counts["finetune"] == {"done": 3, "left": 1}


def test_the_last_line_without_its_time(tmp_path: Path) -> None:
    task = Task("sasrec", 0, (trial_of("sasrec", (), 0, 2),))
    claims = Claims(tmp_path)
    assert claims.take(task) == "ours"
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / f"{task.id}.log"
    log.write_text("2026-01-01 10:00:00 begun\n2026-01-01 10:00:09 step 3/9  loss 1.2\n")
    (found,) = working(tmp_path)
    assert (found.task, found.line) == (task.id, "step 3/9  loss 1.2")
    assert 0 <= found.seconds < 60
    log.unlink()
    (found,) = working(tmp_path)
    assert found.line == ""
    claims.leave_all()
