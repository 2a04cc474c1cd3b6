"""A sweep that several processes run together equals one process with a larger batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from depthprobe.runs.processes import ProcessGroup, join_processes
from depthprobe.runs.store import open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Study, study_to_toml

# accelerate's own way to several processes; its --cpu would start one
SETTINGS = {
    "num_processes": "2",
    "num_machines": "1",
    "mixed_precision": "no",
    "dynamo_backend": "no",
    "num_cpu_threads_per_process": "1",
    "main_process_port": "0",
}
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu"),
    *(word for name, value in SETTINGS.items() for word in (f"--{name}", value)),
    *("-m", "depthprobe", "sweep"),
]


def quiet(study: Study, batch_size: int) -> Study:
    """Two trained trials without dropout, whose masks would differ between the processes."""
    recipe = replace(study.recipe, batch_size=batch_size)
    return replace(
        study,
        methods=("sasrec", "full", "early-exit"),
        seeds=1,
        recipe=recipe,
        sasrec=replace(study.sasrec, dropout=0.0, recipe=recipe),
    )


def test_one_process_is_a_team() -> None:
    assert join_processes("cpu") == ProcessGroup(rank=0, processes=1)
    ProcessGroup().wait()


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(study: Study, tmp_path: Path) -> None:
    file, folder = tmp_path / "study.toml", tmp_path / "together"
    file.write_text(study_to_toml(quiet(study, 8)), encoding="utf-8")
    done = subprocess.run(  # noqa: S603
        [sys.executable, *LAUNCH, str(file), "--output", str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("report.html") == 1  # the first process speaks alone
    together = open_run(folder)
    alone = run_sweep(quiet(study, 16), tmp_path / "alone", jobs=0)
    assert set(together.trials["trial"]) == set(alone.trials["trial"])
    for trial in ("sasrec-s0", "full-d03-s0"):
        ours, theirs = (run.record(trial).costs.training for run in (together, alone))
        assert (ours.processes, theirs.processes) == (2, 1)
        assert ours.steps == theirs.steps
        assert ours.validation == pytest.approx(theirs.validation, abs=1e-4)
        assert ours.losses == pytest.approx(theirs.losses, abs=1e-4)
    assert not (folder / "checkpoints").exists()
