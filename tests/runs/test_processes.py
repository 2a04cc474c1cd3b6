"""A sweep that several processes run together equals one process with a larger batch."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from depthprobe.cli.app import main
from depthprobe.errors import BadInput
from depthprobe.runs.processes import FirstProcessError, ProcessGroup, join_processes
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
    assert ProcessGroup().from_first(lambda: 3) == 3


def of_two(rank: int, store: str, told: Any) -> None:
    """In a process of its own: the first of two raises where the other waits."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    group = ProcessGroup(rank, 2)

    def refuse() -> None:
        assert group.writes
        raise BadInput("disk", "full", "room")

    heard = [str(group.from_first(lambda: "laid out"))]
    for action in (refuse, lambda: (_ for _ in ()).throw(Unsendable(1, 2))):
        try:
            group.from_first(action)
        except Exception as error:
            heard.append(f"{type(error).__name__}: {error}")
    told.put((rank, heard))
    group.leave()


class Unsendable(RuntimeError):
    """It can be pickled, and not be made again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_an_error_of_the_first_process_is_raised_in_all(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    told = spawn.Queue()
    both = [
        spawn.Process(target=of_two, args=(rank, str(tmp_path / "store"), told)) for rank in (0, 1)
    ]
    for process in both:
        process.start()
    heard = dict(told.get(timeout=120) for _ in both)
    for process in both:
        process.join(timeout=60)
    refused = "BadInput: disk: 'full' is not usable; room"
    assert heard[0] == ["laid out", refused, "Unsendable: 1 and 2"]
    words = "FirstProcessError: the first process failed: Unsendable: 1 and 2"
    assert heard[1] == ["laid out", refused, words]


def test_the_other_processes_end_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FirstProcessError("the first process failed: OSError: no room")

    monkeypatch.setattr("depthprobe.runs.sweep.run_sweep", fail)
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "--methods", "popularity"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: the first process failed: OSError: no room"
    )


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
