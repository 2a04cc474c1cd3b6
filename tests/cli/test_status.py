"""`status`, and how a sweep ends that is told to, or has no room."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depthprobe.cli import report

STUDY = """
methods = ["popularity"]
seeds = 1
device = "cpu"
[protocol]
resamples = 100
"""


def test_a_folder_that_is_no_run(cli: Callable[..., Any], tmp_path: Path) -> None:
    told = cli("status", tmp_path)
    assert told.code == 2
    assert len(told.err.splitlines()) == 1
    assert str(tmp_path) in told.err


@pytest.mark.slow
def test_a_sweep_that_is_told_to_end_goes_on_later(cli: Callable[..., Any], tmp_path: Path) -> None:
    run, study = tmp_path / "run", tmp_path / "study.toml"
    study.write_text(STUDY.replace('"popularity"', '"popularity", "sasrec"'))
    command = [sys.executable, "-m", "depthprobe", "sweep", study, "--output", run, "--jobs", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        for _ in range(1200):
            if (run / "logs" / "sasrec-s0.log").is_file():
                break
            time.sleep(0.1)
        told = cli("status", run)
        assert told.code == 0
        assert "sasrec-s0" in told.out
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "error: interrupted; the same command continues a sweep"
    assert "nobody works on it" in cli("status", run).out
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "1 trial to run" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_one_line(
    number: int, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(number, "told by the system", str(path))

    monkeypatch.setattr(report, "check_run", refuse)
    told = cli("report", tmp_path / "run")
    assert told.code == 1
    (line,) = told.err.splitlines()
    assert os.strerror(number) in line
    assert str(tmp_path / "run") in line
