"""`sweep`, and `train`, `probe`, `distill`: the same study restricted to one phase's methods."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from depthprobe.cli.dry_run import dry_run
from depthprobe.cli.options import (
    SplitKind,
    SplitPoints,
    StudyFlags,
    check_at_least,
    check_output,
    default_output,
    make_study,
    whole,
)
from depthprobe.cli.progress import watch
from depthprobe.cli.tables import show_frame
from depthprobe.errors import BadInput
from depthprobe.methods import METHODS, base_of, names
from depthprobe.study import Study

if TYPE_CHECKING:
    import pandas as pd

    from depthprobe.runs.store import Run

SLURM = "slurm"
EXECUTORS = ("local", SLURM)


@dataclass(frozen=True)
class Phase:
    """A command that runs some of the methods; what they need besides, the runner adds."""

    name: str
    help: str
    methods: tuple[str, ...]


PHASES = {
    phase.name: phase
    for phase in (
        Phase("sweep", "Accuracy, size and time against depth, and the report.", tuple(METHODS)),
        Phase(
            "train",
            "The baselines, the teacher and the variants alone.",
            (
                "popularity",
                "sasrec",
                "full",
                *(name for name in names("trained", "control") if name != "distill"),
            ),
        ),
        Phase("probe", "What needs no training but the teacher's.", names("probe")),
        Phase("distill", "The students alone.", ("distill",)),
    )
}


def command(phase: Phase) -> Callable[..., int]:
    """The typer command of a phase; all phases take the same options."""

    def run(
        context: typer.Context,
        study: Annotated[
            Path | None,
            typer.Argument(
                metavar="STUDY.toml", help="What to run; flags override it.", show_default=False
            ),
        ] = None,
        data: Annotated[
            str | None,
            typer.Option(metavar="D", help="A log, a prepared folder, a public set, or embedded."),
        ] = None,
        backbone: Annotated[
            str | None, typer.Option(metavar="B", help="A folder, a Hugging Face id, or embedded.")
        ] = None,
        revision: Annotated[
            str | None,
            typer.Option(metavar="REV", help="The branch, tag or commit of a Hugging Face id."),
        ] = None,
        layers: Annotated[
            str | None, typer.Option(metavar="DEPTHS", help="Depths: 1,2,4 or 1-12 or all or auto.")
        ] = None,
        methods: Annotated[
            str | None,
            typer.Option(
                metavar="NAMES",
                help=f"Of: {', '.join(METHODS)}; also heal:ends and the like (see docs/sweep.md).",
            ),
        ] = None,
        seeds: Annotated[
            int | None, typer.Option(metavar="N", parser=whole, help="How many seeds.")
        ] = None,
        epochs: Annotated[
            int | None,
            typer.Option(metavar="N", parser=whole, help="At most so many epochs a training."),
        ] = None,
        output: Annotated[
            Path | None, typer.Option(metavar="RUN", help="The run's folder [default: runs/NAME].")
        ] = None,
        device: Annotated[
            str | None, typer.Option(metavar="auto|cpu|cuda|mps", help="Where to compute.")
        ] = None,
        budget: Annotated[
            str | None,
            typer.Option(metavar="steps|compute", help="What all trainings have the same of."),
        ] = None,
        cache: Annotated[
            str | None,
            typer.Option(
                metavar="DIR",
                help="Take equal trainings of other runs from there, and leave new ones.",
            ),
        ] = None,
        executor: Annotated[
            str, typer.Option(metavar="|".join(EXECUTORS), help="What runs the trials.")
        ] = "local",
        jobs: Annotated[
            int | None,
            typer.Option(
                metavar="N",
                parser=whole,
                help="Trials at the same time; 0: in this process. With slurm: jobs.",
            ),
        ] = None,
        retry_failed: Annotated[
            bool, typer.Option("--retry-failed", help="Try again what failed in an earlier sweep.")
        ] = False,
        dry: Annotated[
            bool,
            typer.Option("--dry-run", help="Print the plan and an estimate of it; write nothing."),
        ] = False,
        tuning: Annotated[
            str | None,
            typer.Option(metavar="full|lora|frozen", help="What of the blocks is trained."),
        ] = None,
        item_embeddings: Annotated[
            str | None,
            typer.Option(
                metavar="FILE.npy|text|learned|sasrec", help="Where the item table comes from."
            ),
        ] = None,
        split: SplitKind = None,
        split_at: SplitPoints = None,
        name: Annotated[str | None, typer.Option(metavar="NAME", help="The study's name.")] = None,
    ) -> int:
        flags = StudyFlags(
            study=study,
            data=data,
            backbone=backbone,
            revision=revision,
            layers=layers,
            methods=methods,
            seeds=seeds,
            epochs=epochs,
            budget=budget,
            cache=cache,
            device=device,
            tuning=tuning,
            item_embeddings=item_embeddings,
            split=split,
            split_at=split_at,
            name=name,
        )
        if executor not in EXECUTORS:
            raise BadInput("executor", executor, f"one of {', '.join(EXECUTORS)}")
        check_at_least("jobs", jobs, 1 if executor == SLURM else 0)
        wanted = restrict(make_study(flags), phase, chosen=methods is not None)
        folder = default_output(wanted) if output is None else output
        check_output(folder)
        if dry:
            return dry_run(wanted, folder, jobs=jobs, retry_failed=retry_failed, executor=executor)
        line = shlex.join(["depthprobe", *context.obj])
        return execute(
            wanted, folder, jobs=jobs, line=line, retry_failed=retry_failed, executor=executor
        )

    return run


def restrict(study: Study, phase: Phase, *, chosen: bool) -> Study:
    """The study with the phase's methods alone.

    Raises:
        BadInput: if none is left, or one ``chosen`` on the command line is not the phase's.
    """
    methods = tuple(name for name in study.methods if base_of(name) in phase.methods)
    if not methods or (chosen and methods != study.methods):
        allowed = f"{phase.name} runs {', '.join(phase.methods)}"
        raise BadInput("methods", ",".join(study.methods), allowed)
    return replace(study, methods=methods)


def execute(
    study: Study,
    folder: Path,
    *,
    jobs: int | None,
    line: str,
    retry_failed: bool = False,
    executor: str = "local",
) -> int:
    """Run the study, write its report, print the results; ``line`` is the command as typed."""
    with watch(sys.stderr, folder) as progress:
        if executor == SLURM:
            from depthprobe.cli.cluster import run_on_cluster

            there = run_on_cluster(
                study, folder, progress, jobs=jobs, line=line, retry_failed=retry_failed
            )
            if there is None:
                return 1
            run = there
        else:
            from depthprobe.runs.processes import join_processes
            from depthprobe.runs.sweep import run_sweep

            team = join_processes(study.device)
            run = run_sweep(
                study,
                folder,
                jobs=jobs,
                command=line,
                progress=progress if team.writes else None,
                retry_failed=retry_failed,
            )
            team.leave()
            if not team.writes:
                return 1 if run.failed else 0
        from depthprobe.report.page import build_report

        progress.message("writing the report")
        page = build_report(run)
    show_frame(results(run), title="Test users, the whole catalogue ranked; means over trials")
    for trial, error in run.failed:
        print(f"failed: {trial}: {' '.join(str(error).split())}", file=sys.stderr)
    print(page)
    return 1 if run.failed else 0


def results(run: Run) -> pd.DataFrame:
    """One row a method and depth: how many trials, accuracy, parameters, milliseconds."""
    costs = ["parameters_total", "train_step_ms", "encode_ms", "score_ms"]
    trials = run.trials[run.trials["status"] == "done"]
    metrics = run.metrics
    chosen = metrics[
        (metrics["split"] == "test")
        & (metrics["protocol"] == "full")
        & (metrics["slice"] == "all")
        & metrics["metric"].isin(["HR@10", "NDCG@10"])
    ]
    accuracy = chosen.pivot_table(index="trial", columns="metric", values="value")
    table = trials.set_index("trial")[["method", "depth", *costs]].join(accuracy)
    groups = table.groupby(["method", "depth"], sort=False)
    frame: pd.DataFrame = groups.mean().reindex(columns=["NDCG@10", "HR@10", *costs])
    frame.insert(0, "trials", groups.size())
    # in the order of the methods' table, so that baselines and the teacher come first
    order = {name: place for place, name in enumerate(METHODS)}
    frame = frame.reset_index().sort_values("depth", kind="stable")
    frame = frame.sort_values(
        "method", key=lambda names: names.map(base_of).map(order), kind="stable"
    )
    return frame.rename(columns={"parameters_total": "parameters"})
