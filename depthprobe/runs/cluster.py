"""Sweep on a SLURM cluster: identical jobs, each of which shares the work of one run.

Every job calls ``run_sweep`` on the same folder and ends when nothing is left to do. The run's
locks decide who does what. submitit writes and submits the jobs.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from depthprobe.errors import CONTROL, BadInput
from depthprobe.runs.processes import SAFE_PATH, Progress, launched
from depthprobe.study import Study

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission


JOBS = ".jobs"  # in a run's folder; hidden, so that an otherwise empty run still counts as new
POLL = 30.0  # seconds between two looks at the jobs; the scheduler is asked at each
# a job that ran out of time has made progress, so it is queued again
REQUEUES = 1000
MOST_JOBS = 10_000


@dataclass(frozen=True, kw_only=True)
class SharedSweep:
    """What each job calls: works on a run until nothing is left to do.

    A job that is pre-empted or runs out of time is queued again, and goes on from its training's
    checkpoint. It trains in its own process: SLURM signals all processes of a job, so a worker that
    died of a pre-emption would look like a failed trial.

    Attributes:
        progress: makes what the job shows; it is pickled by its name.
    """

    study: Study
    folder: str
    command: str | None = None
    progress: Callable[[], Progress] = Progress

    def __call__(self) -> None:
        """Run it."""
        from depthprobe.runs.sweep import run_sweep

        progress = self.progress()
        run_sweep(self.study, self.folder, jobs=0, command=self.command, progress=progress)

    def checkpoint(self) -> DelayedSubmission:
        """What to queue again: the same call, since the run's folder holds all progress."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    sweep: SharedSweep, *, jobs: int = 1, cluster: str = "slurm", retry_failed: bool = False
) -> list[Job[None]]:
    """Submit identical jobs, several as an array, with the settings of ``study.slurm``.

    Their output and submitit's files are in ``.jobs`` of the run's folder.

    Args:
        sweep: what each job calls; its folder must be one that all machines see.
        cluster: ``slurm``, or ``local`` for processes of this machine.

    Raises:
        BadInput: before anything is written, if submitit or SLURM is missing, the folder holds
            another run, or a tracker is not installed; later, if SLURM refuses the settings.
    """
    try:
        import submitit
    except ImportError:
        allowed = "submitit to be installed (pip install 'depthprobe[slurm]')"
        raise BadInput("executor", "slurm", allowed) from None
    from depthprobe.runs.layout import continued
    from depthprobe.runs.records import PROBES, TRIALS, folders_of, forget_failures
    from depthprobe.training.tracking import check_trackers

    # errors that would end every job at once, as far as they can be seen here
    if not 1 <= jobs <= MOST_JOBS:
        raise BadInput("jobs", jobs, f"at least 1 job, at most {MOST_JOBS:,}")
    if launched():
        allowed = "no accelerate launch around it (each of its processes would submit the jobs)"
        raise BadInput("executor", cluster, allowed)
    if cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
        allowed = "a machine that submits to SLURM (there is no srun here)"
        raise BadInput("executor", cluster, allowed)
    check_trackers(sweep.study.tracking.to)
    folder = Path(sweep.folder)
    # a line break would end the line of sbatch's script, and the rest would run as a command
    if CONTROL.search(str(folder.absolute())):
        raise BadInput("output", folder, "a folder without line breaks and the like in its path")
    continued(folder, sweep.study)
    if retry_failed:
        forget_failures([*folders_of(folder / TRIALS), *folders_of(folder / PROBES)])

    settings = sweep.study.slurm
    python = f"{shlex.quote(sys.executable)} -P"  # -P: don't import from the folder
    executor = submitit.AutoExecutor(
        folder / JOBS, cluster=cluster, slurm_max_num_timeout=REQUEUES, slurm_python=python
    )
    executor.update_parameters(
        name=re.sub(r"[^\w.-]+", "-", sweep.study.name, flags=re.ASCII)[:64],
        timeout_min=settings.minutes,
        gpus_per_node=settings.gpus or None,  # some clusters refuse a request for none
        cpus_per_task=settings.cpus,
        mem_gb=settings.memory_gb,
        slurm_partition=settings.partition,
        slurm_account=settings.account,
        slurm_setup=list(settings.setup) or None,
    )
    # an interactive job's own variables would get into these; sbatch's are the user's wishes, and
    # without the place of its configuration, where that is an unusual one, it finds no cluster
    wishes = ("SBATCH_", "SLURM_CONF")
    kept = {name: value for name, value in os.environ.items() if name.startswith(wishes)}
    tools = submitit.helpers
    try:
        with tools.clean_env(), tools.environment_variables(**kept, **SAFE_PATH):
            submitted: list[Job[None]] = executor.submit_array([sweep] * jobs)
    except RuntimeError as error:  # what submitit makes of a failed sbatch
        given = f"partition {settings.partition}, account {settings.account}"
        allowed = f"settings that SLURM takes ({last_line(str(error))})"
        raise BadInput("slurm", given, allowed) from error
    return submitted


def follow(jobs: Sequence[Job[None]], progress: Progress, *, poll: float = POLL) -> dict[str, str]:
    """Wait until all jobs have ended; returns why, by id, for those that did not end well."""
    shown, ended = "", [False]
    while not all(ended):
        if shown:
            time.sleep(poll)
        jobs[0].get_info(mode="force")  # or a dead job shows minutes later
        ended = [job.done() for job in jobs]
        states = Counter(
            "ended" if done else job.state.lower() for job, done in zip(jobs, ended, strict=True)
        )
        line = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        if line != shown:
            progress.message(f"jobs: {line}")
            shown = line
    errors = {job.job_id: job.exception() for job in jobs}
    return {name: last_line(str(error)) for name, error in errors.items() if error is not None}


def array_id(jobs: Sequence[Job[None]]) -> str:
    """The number that ``scancel`` takes for all of them."""
    return " ".join(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))


def last_line(text: str) -> str:
    """The last line with content: of a traceback the error itself."""
    hints = ("-----", "You can check full logs", "or at paths", "- ")
    lines = [line.strip() for line in text.splitlines()]
    reasons = [line for line in lines if line and not line.startswith(hints)]
    return reasons[-1] if reasons else "no reason given"
