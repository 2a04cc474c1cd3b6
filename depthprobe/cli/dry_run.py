"""`--dry-run`: the plan of a sweep, what of it is done, and an estimate of the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from depthprobe.cli.cost import BUSY, TUNINGS
from depthprobe.cli.terminal import cell, echo, say, scaled, show_facts, show_progress, show_table
from depthprobe.formatting import duration, plain_percent, plural

if TYPE_CHECKING:
    from depthprobe.runs.estimate import Estimate, Preview
    from depthprobe.study import Study

PARTS = {
    "data": "prepared data",
    "negatives": "negatives of the sampled protocol",
    "item table": "item table",
    "sasrec": "SASRec, one per seed",
    "full": "teacher, one per seed",
    "features": "teacher's features for the students, one per seed",
    "removal": "teacher's greedy removal, one per seed",
    "times": "times of every depth",
}
COUNTED = (
    "every training to its last epoch; early stopping or a cache may save some. Not counted: the"
    " report, and other work on this machine"
)


def dry_run(
    study: Study,
    folder: Path,
    *,
    jobs: int | None = None,
    retry_failed: bool = False,
    executor: str = "local",
) -> int:
    """Print what the sweep would do and cost; write nothing. Returns the exit code."""
    with show_progress(sys.stderr) as progress:
        from depthprobe.runs.estimate import preview
        from depthprobe.runs.processes import join_processes

        team = join_processes(study.device)
        if not team.writes:
            team.leave()
            return 0
        progress.message("reading the data")
        plan = preview(
            study,
            folder,
            jobs=jobs,
            retry_failed=retry_failed,
            processes=team.processes,
            apart=executor != "local",
        )
        team.leave()
    echo("Dry run: nothing is written, and no trial is run.")
    show_facts(_study(plan))
    _show_tasks(plan)
    header = ["shared between trials", "needed", "there", "to make"]
    rows = [[PARTS[name], needed, have, needed - have] for name, needed, have in plan.shared]
    show_table(header, rows, words=header[:1])
    echo("")
    if plan.estimate is None:
        why = f"No ESTIMATE of time and memory: {plan.why}."
        say(why if plan.waiting else "Nothing is left to do.")
    else:
        echo("ESTIMATE of what is left:")
        show_facts(_estimate(plan, plan.estimate))
    return 0


def _study(plan: Preview) -> dict[str, str]:
    """The study, its data, its backbone, and where it would run."""
    inputs, study = plan.inputs, plan.inputs.working
    sequences, backbone, device = inputs.split.sequences, study.backbone, plan.device.type
    many = plural(plan.workers, "job") + (" of a cluster" if plan.apart else "")
    if plan.processes > 1:
        many = f"1 job, trained by {plan.processes} processes together"
    each = f", {plural(plan.threads, 'thread')}" if device == "cpu" else ""
    each += " each" if each and plan.workers > 1 else ""
    return {
        "run": f"{plan.folder} ({'new' if inputs.before is None else 'goes on'})",
        "data": f"{sequences.name}: {cell(sequences.n_users)} users,"
        f" {cell(sequences.n_items)} items, {cell(sequences.n_interactions)} interactions",
        "backbone": f"{backbone.source}: {inputs.config.model_type},"
        f" {plural(inputs.blocks, 'block')}; {TUNINGS[backbone.tuning]}",
        "seeds": str(study.seeds),
        "runs on": f"{device}, {many} at a time{each}",
    }


def _show_tasks(plan: Preview) -> None:
    """Print one row per method, and the sums."""
    times = plan.estimate.by_method if plan.estimate else {}
    rows: list[list[object]] = [
        [*row, duration(times[row[0]]) if row[0] in times else "-"] for row in plan.rows
    ]
    sums = [sum(each) for each in zip(*(row[1:] for row in plan.rows), strict=True)]
    work = duration(plan.estimate.work) if plan.estimate else "-"
    header = ["method", "tasks", "trials", "done", "failed", "left", "ESTIMATED work"]
    show_table(header, [*rows, ["all", *sums, work]], words=header[:1])
    if plan.inputs.working.searches:
        from depthprobe.evaluation.search import MOST

        say(
            "This is the most that a search may train. It ends when the verdict stands, and at "
            f"{plain_percent(MOST)} of the compute at the latest."
        )
    failed = sums[3]
    if failed and plan.retry_failed:
        say(f"Failed trials run again and count as left, too ({failed}).")
    elif failed:
        say(f"{failed} failed before; --retry-failed runs them again.")
    if plan.lost:
        say(f"{plan.lost} of those left need one that failed, and will not be run.")


def _estimate(plan: Preview, guess: Estimate) -> dict[str, str]:
    """The estimated time and memory of what is left, and the basis of the estimate."""
    workers = plural(plan.workers, "job") + (" at a time" if plan.workers > 1 else "")
    time = f"at most {duration(guess.seconds)} with {workers}"
    seconds = sum(job.seconds for job in guess.chain)
    chain = " > ".join(job.id for job in guess.chain)
    rows = {"time": time, "longest chain": f"{duration(seconds)}, however many jobs: {chain}"}
    if guess.memory is not None:
        rows["memory"] = ("at least " if guess.fewer else "") + _memory(plan, guess.memory)
    source = "the times of every depth that this run measured (shared/timing.json)"
    if not guess.timed:
        busy = f" other work was running ({guess.busy:.1f} processes a core): times are too long;"
        source = (
            "a measurement of some seconds just now, on a model of this shape with random weights;"
            f"{busy if guess.busy > BUSY else ''} other depths interpolated"
        )
    like = "; each job is taken to have a machine like this one" if plan.apart else ""
    return rows | {"from": source + like, "counted": COUNTED}


def _memory(plan: Preview, peak: float) -> str:
    """The memory that jobs take together, at ``peak`` bytes each, and the memory available."""
    how = "at the peak: training all blocks, measured"
    if plan.apart:
        return f"{scaled(peak, 'B')} a job {how}"
    total, free = plan.together * peak, scaled(plan.free, "B")
    each = f"{plan.together} x {scaled(peak, 'B')}, " if plan.together > 1 else ""
    where = " of a GPU" if plan.device.type == "cuda" else ""
    text = f"{scaled(total, 'B')}{where} {how.replace(': ', f': {each}')}"
    if total > plan.free:
        return f"{text}; that is MORE than the {free} available"
    return f"{text}; {free} available"
