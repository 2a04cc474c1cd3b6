"""A sweep by a cluster's jobs: what is said, what is waited for, and the exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from depthprobe.cli.sweep import INTERRUPTED, job_progress
from depthprobe.errors import BadInput
from depthprobe.runs import cluster
from depthprobe.runs.cluster import SharedSweep
from depthprobe.study import demo_study

RUN = Path("runs/demo")


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SharedSweep, int]]:
    """What was submitted, with how many jobs; nothing is."""
    seen: list[tuple[SharedSweep, int]] = []

    def submit(
        sweep: SharedSweep, *, jobs: int, cluster: str, retry_failed: bool
    ) -> list[SimpleNamespace]:
        assert cluster == "slurm"
        assert retry_failed == ("--retry-failed" in str(sweep.command))
        seen.append((sweep, jobs))
        return [SimpleNamespace(job_id=f"31_{place}") for place in range(jobs)]

    monkeypatch.setattr(cluster, "submit", submit)
    return seen


def ends(monkeypatch: pytest.MonkeyPatch, how: Callable[[], dict[str, str]]) -> None:
    monkeypatch.setattr(cluster, "follow", lambda jobs, progress: how())


def test_jobs_are_submitted_and_waited_for(
    cli: Callable[..., Any],
    submitted: list[tuple[SharedSweep, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Path] = []

    def open_run(folder: Path) -> None:
        opened.append(folder)
        raise BadInput("run", "this far", "enough for a test")

    ends(monkeypatch, lambda: {"31_0": "ValueError: no"})
    monkeypatch.setattr("depthprobe.runs.store.open_run", open_run)
    outcome = cli("sweep", "--executor", "slurm", "--jobs", "2", "--retry-failed")
    ((sweep, jobs),) = submitted
    assert jobs == 2
    assert (sweep.study, sweep.progress) == (demo_study(), job_progress)
    assert sweep.command == "depthprobe sweep --executor slurm --jobs 2 --retry-failed"
    assert Path(sweep.folder) == RUN.absolute() == opened[0]
    assert "submitted 2 jobs (31)" in outcome.err
    assert f"depthprobe status {RUN.absolute()}" in outcome.err
    assert "job 31_0 failed: ValueError: no" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: run: expected enough for a test")


def test_without_a_job_that_ends_well_there_is_no_report(
    cli: Callable[..., Any],
    submitted: list[tuple[SharedSweep, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends(monkeypatch, lambda: {"31_0": "OUT_OF_MEMORY"})
    outcome = cli("sweep", "--executor", "slurm")
    assert [jobs for _, jobs in submitted] == [1]
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.splitlines()[-1] == "job 31_0 failed: OUT_OF_MEMORY"


def test_an_interrupt_ends_the_waiting_alone(
    cli: Callable[..., Any],
    submitted: list[tuple[SharedSweep, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt() -> dict[str, str]:
        raise KeyboardInterrupt

    ends(monkeypatch, interrupt)
    outcome = cli("sweep", "--executor", "slurm", "--jobs", "3")
    assert outcome.code == INTERRUPTED == 130
    last = outcome.err.splitlines()[-1]
    assert "the jobs go on" in last
    assert "scancel 31)" in last
