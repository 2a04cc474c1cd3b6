"""A sweep that several processes run together equals one process with a larger batch."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from depthprobe.cli.app import main
from depthprobe.errors import BadInput
from depthprobe.runs.processes import (
    LAUNCHER,
    FirstProcessError,
    ProcessGroup,
    join_processes,
    launched,
)
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


@pytest.mark.parametrize("text", ["", " ", "1"])
def test_an_empty_variable_of_a_launcher_is_none(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    for name in LAUNCHER:
        monkeypatch.setenv(name, text)
    assert not launched()
    assert join_processes("cpu") == ProcessGroup()
    assert all(os.environ.get(name, "1") == "1" for name in LAUNCHER)  # accelerate reads them, too


@pytest.mark.parametrize("name", LAUNCHER)
@pytest.mark.parametrize("text", ["two", "1.0", "１", "1_0", "9" * 5000, "0x2"])
def test_a_variable_of_a_launcher_that_is_no_number(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(BadInput, match=f"^{name}: expected a whole number"):
        join_processes("cpu")


class Unsendable(RuntimeError):
    """It can be pickled, and not be made again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def laid_out() -> str:
    return "laid out"


def refused() -> str:
    raise BadInput("disk", "full", "room")


def lost() -> str:
    raise Unsendable(1, 2)


@pytest.mark.parametrize(
    ("action", "first", "second"),
    [
        (laid_out, "laid out", "laid out"),
        (refused, *["BadInput: disk: expected room, got 'full'"] * 2),
        (
            lost,
            "Unsendable: 1 and 2",
            "FirstProcessError: the first process failed: Unsendable: 1 and 2",
        ),
    ],
)
def test_an_error_of_the_first_process_is_raised_in_all(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[], str], first: str, second: str
) -> None:
    """Two processes in their turn; else the second one would wait for ever."""
    sent: list[bytes] = []

    def send(outcome: list[Any]) -> None:
        sent.append(pickle.dumps(outcome))

    def receive(outcome: list[Any]) -> None:
        (pickled,) = sent
        outcome[:] = pickle.loads(pickled)  # noqa: S301

    heard = []
    for rank, broadcast in enumerate((send, receive)):
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
        try:
            heard.append(ProcessGroup(rank, 2).from_first(action))
        except Exception as error:
            heard.append(f"{type(error).__name__}: {error}")
    assert heard == [first, second]


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
