"""A sweep that a cluster's jobs run: submit them, say how to follow them, wait for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from depthprobe.cli.progress import Lines
from depthprobe.runs.progress import Progress
from depthprobe.study import Study

if TYPE_CHECKING:
    from depthprobe.runs.store import Run

INTERRUPTED = 130


def job_lines() -> Progress:
    """What a job says, on its own standard output."""
    return Lines(sys.stdout)


def run_on_cluster(
    study: Study,
    folder: Path,
    progress: Progress,
    *,
    jobs: int | None,
    line: str,
    retry_failed: bool,
    cluster: str = "slurm",
) -> Run | None:
    """Submit jobs that share the study's trials, and wait for them.

    An interrupt ends the waiting, and the process with exit code 130; the jobs go on.

    Args:
        progress: is told of the jobs.
        jobs: how many, by default one.
        line: the command as typed, for the report.

    Returns:
        The run, or None if no job ended well.
    """
    from depthprobe.runs.cluster import JOBS, SharedSweep, array_id, follow, submit
    from depthprobe.runs.records import failures as known
    from depthprobe.runs.store import open_run

    folder = folder.absolute()
    sweep = SharedSweep(
        study=study,
        folder=str(folder),
        command=line,
        retry=known(folder) if retry_failed else {},
        watcher=job_lines,
    )
    count = 1 if jobs is None else jobs
    submitted = submit(sweep, jobs=count, cluster=cluster)
    number = array_id(submitted)
    # printed: of messages a terminal shows the latest alone
    told = f"submitted {count} {'job' if count == 1 else 'jobs'} ({number}), sharing {folder}"
    print(f"{told}; depthprobe status {folder} says how far they are", file=sys.stderr)
    progress.message(f"what they print is in {folder / JOBS}")
    try:
        failures = follow(submitted, progress.message)
    except KeyboardInterrupt:
        told = f"no longer waiting; the jobs go on (depthprobe status {folder}; scancel {number})"
        print(told, file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    for name, reason in failures.items():
        print(f"job {name} failed: {reason}", file=sys.stderr)
    # a job ends well when nothing is left to do: one is enough
    return None if len(failures) == count else open_run(folder)
