"""`sweep`, `find`, and `train`, `probe`, `distill`: a study restricted to one phase's methods."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthprobe.cli.dry_run import dry_run
from depthprobe.cli.options import (
    SET,
    SWEEP,
    default_output,
    make_study,
    option,
    path,
    takes_flags,
    whole,
)
from depthprobe.cli.terminal import Display, echo, open_streams, show_progress, show_table
from depthprobe.errors import BadInput, check_writable, one_line, one_of, shell_line
from depthprobe.methods import METHODS, Method, method_of, method_order
from depthprobe.study import Study, override

if TYPE_CHECKING:
    import pandas as pd

    from depthprobe.runs.store import Run

SEARCHING = ("popularity", "sasrec", "full", "early-exit", "readout", "finetune")
LOCAL, SLURM = EXECUTORS = ("local", "slurm")
INTERRUPTED = 130


@dataclass(frozen=True)
class Phase:
    """A command that runs some of the methods, and whatever these need."""

    help: str
    has: Callable[[Method], bool]

    def methods(self) -> tuple[str, ...]:
        """The names of its methods, in the order of the reports."""
        return tuple(name for name, method in METHODS.items() if self.has(method))

    def list_methods(self) -> str:
        """A summary of each method for the end of the help; typer must not wrap its lines."""
        lines = [f"  {name:16}  {METHODS[name].summary}" for name in self.methods()]
        return "\n".join(["\b", "Methods:", *lines])


def _distils(method: Method) -> bool:
    return method.settings == "distillation"


SEARCH = "find"
PHASES = {
    SEARCH: Phase(
        "Find the smallest sufficient depth without training every depth."
        "\n\nTrains one depth at a time, each time the one that probes and earlier depths make"
        " the most promising for its cost, until the verdict stands. --layers limits the depths.",
        lambda method: True,
    ),
    "sweep": Phase(
        "Measure accuracy, size and time by depth; write the report.", lambda method: True
    ),
    "train": Phase(
        "Train the baselines, the teacher and the shallower models.",
        lambda method: method.role != "probe" and not _distils(method),
    ),
    "probe": Phase(
        "Run the methods that train nothing but the teacher.", lambda m: m.role == "probe"
    ),
    "distill": Phase("Train the students only.", _distils),
}


@takes_flags(SWEEP)
def sweep(
    context: typer.Context,
    study: Annotated[
        Path | None,
        typer.Argument(metavar="STUDY.toml", help="A study file. Flags override it.", parser=path),
    ] = None,
    *,
    settings: SET = None,
    output: Annotated[
        Path | None, option("RUN", "The run's folder [default: runs/NAME].", parser=path)
    ] = None,
    executor: Annotated[str, option("|".join(EXECUTORS), "Where the trials run.")] = LOCAL,
    jobs: Annotated[
        int | None,
        option(
            "N", "Trials at a time; 0: in this process. With slurm: number of jobs.", parser=whole
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run failed trials again.")
    ] = False,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and its estimated time; write nothing."),
    ] = False,
    **flags: Any,
) -> int:
    """Run the methods of the phase that the command names."""
    one_of("executor", executor, EXECUTORS)
    if jobs is not None and jobs < 0:
        raise BadInput("jobs", jobs, "a whole number of at least 0")
    chosen = make_study(study, settings or (), **flags)
    if context.info_name == SEARCH:
        chosen = to_search(chosen, given=study is not None, **flags)
    chosen = restrict(chosen, str(context.info_name), strict=flags["methods"] is not None)
    folder = default_output(chosen) if output is None else output
    check_writable("output", folder)
    if flags["epochs"] is not None and "sasrec" in {*chosen.methods, chosen.item_table}:
        own = f"it keeps {chosen.sasrec.recipe.epochs} (sasrec.recipe.epochs)"
        echo(f"--epochs does not apply to SASRec: {own}", sys.stderr)
    if chosen.searches and (jobs or 0) > 1:
        echo(
            "a search trains one model after the other: --jobs does not make it faster", sys.stderr
        )
    if dry:
        return dry_run(chosen, folder, jobs=jobs, retry_failed=retry_failed, executor=executor)
    command = shell_line(["depthprobe", *context.obj])  # as typed
    how: dict[str, Any] = {"jobs": jobs, "retry_failed": retry_failed, "command": command}
    with show_progress(sys.stderr, folder) as progress:
        if executor == SLURM:
            run = _run_on_cluster(chosen, folder, progress, **how)
            if isinstance(run, int):
                return run
        else:
            from depthprobe.runs.processes import join_processes
            from depthprobe.runs.sweep import run_sweep

            group = join_processes(chosen.device)
            run = run_sweep(chosen, folder, progress=progress, **how)
            group.leave()
            if not group.writes:  # of the processes that train together, one finishes the run
                return int(bool(run.failed))
        from depthprobe.report.page import report_words

        progress.message("writing the report")
        words = report_words(run)
    table = results(run)
    title = "Test users, the whole catalogue ranked; means over trials"
    show_table(table.columns.tolist(), table.itertuples(index=False), words=["method"], title=title)
    for trial, error in run.failed:
        echo(one_line(f"failed: {trial}: {error}"), sys.stderr)
    echo(words)
    return 1 if run.failed else 0


def to_search(study: Study, *, given: bool, **flags: Any) -> Study:
    """The study as a search for the sufficient depth, among its own depths if it names some.

    Args:
        study: from flags, or from a file.
        given: whether there is a file, whose methods and seeds are kept.
        flags: with the methods and seeds asked for, or None.
    """
    changes: dict[str, Any] = {}
    if not study.searches:
        everything = study.layers.strip().lower() in {"auto", "all"}
        changes["layers"] = SEARCH if everything else f"{SEARCH}:{study.layers}"
    if not given and flags["methods"] is None:
        changes["methods"] = SEARCHING
    if not given and flags["seeds"] is None:
        changes["seeds"] = 5
    return override(study, **changes)


def restrict(study: Study, phase: str, *, strict: bool) -> Study:
    """The study with only the methods of a phase; ``strict`` refuses others."""
    has = PHASES[phase].has
    methods = tuple(name for name in study.methods if has(method_of(name)))
    if not methods or (strict and methods != study.methods):
        allowed = f"methods that {phase} runs: {', '.join(PHASES[phase].methods())}"
        raise BadInput("methods", ",".join(study.methods), allowed)
    return replace(study, methods=methods)


def job_progress() -> Display:
    """The progress display of a cluster's job."""
    open_streams()
    return Display(sys.stdout)


def _run_on_cluster(
    study: Study, folder: Path, progress: Display, *, jobs: int | None, command: str, **how: Any
) -> Run | int:
    """Submit jobs that share the trials, and wait; returns an exit code if no job succeeds.

    An interrupt ends only the waiting; the jobs continue.
    """
    from depthprobe.runs.cluster import JOBS, SharedSweep, array_id, follow, submit
    from depthprobe.runs.store import open_run

    folder, jobs = folder.absolute(), 1 if jobs is None else jobs
    shared = SharedSweep(study=study, folder=str(folder), command=command, progress=job_progress)
    submitted = submit(shared, jobs=jobs, cluster=SLURM, retry_failed=how["retry_failed"])
    number = array_id(submitted)
    # printed, since a terminal shows only the latest message
    line = f"submitted {jobs} {'job' if jobs == 1 else 'jobs'} ({number}), sharing {folder}"
    status = shell_line(["depthprobe", "status", str(folder)])
    echo(f"{line}; {status} shows their progress", sys.stderr)
    progress.message(f"their output is in {folder / JOBS}")
    try:
        failures = follow(submitted, progress)
    except KeyboardInterrupt:
        line = f"no longer waiting; the jobs go on ({status}; scancel {number})"
        echo(line, sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    for name, reason in failures.items():
        echo(one_line(f"job {name} failed: {reason}"), sys.stderr)
    # a job succeeds when nothing is left to do, so one is enough
    return 1 if len(failures) == jobs else open_run(folder)


def results(run: Run) -> pd.DataFrame:
    """One row per method and depth: number of trials, accuracy, parameters, milliseconds."""
    costs = ["parameters_total", "train_step_ms", "encode_ms", "score_ms"]
    trials = run.trials[run.trials["status"] == "done"]
    # for methods that leave blocks out, a mean over different blocks means nothing
    trials = trials[[not method_of(name).by_block for name in trials["method"]]]
    chosen = run.metrics.query("split == 'test' and protocol == 'full' and slice == 'all'")
    chosen = chosen[chosen["metric"].isin(["HR@10", "NDCG@10"])]
    accuracy = chosen.pivot_table(index="trial", columns="metric", values="value")
    table = trials.set_index("trial")[["method", "depth", *costs]].join(accuracy)
    groups = table.groupby(["method", "depth"])
    frame: pd.DataFrame = groups.mean().reindex(columns=["NDCG@10", "HR@10", *costs])
    frame.insert(0, "trials", groups.size())
    # baselines and the teacher come first
    frame = frame.loc[sorted(frame.index, key=lambda row: (method_order(row[0]), row[1]))]
    return frame.reset_index().rename(columns={"parameters_total": "parameters"})
