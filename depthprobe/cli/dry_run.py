"""`--dry-run`: the plan of a sweep, what is there of it, and an estimate of the rest."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from depthprobe.cli.cost_views import BUSY, TUNINGS
from depthprobe.cli.progress import show_progress
from depthprobe.cli.tables import cell, console, scaled, show_table

if TYPE_CHECKING:
    from depthprobe.runs.estimate import Estimate
    from depthprobe.runs.forecast import Span
    from depthprobe.runs.preview import Preview
    from depthprobe.study import Study

WIDEST = 100  # columns of a line of words
PARTS = {
    "data": "prepared data",
    "negatives": "negatives of the sampled protocol",
    "item table": "item table",
    "sasrec": "SASRec, one a seed",
    "full": "teacher, one a seed",
    "features": "teacher's features for the students, one a seed",
    "removals": "teacher's greedy removal, one a seed",
    "times": "times of every depth",
}

COUNTED = (
    "every training to its last epoch, though early stopping may end it sooner and a cache may"
    " have it; not the report, nor what else this machine is busy with"
)


def dry_run(
    study: Study,
    folder: Path,
    *,
    jobs: int | None = None,
    retry_failed: bool = False,
    executor: str = "local",
) -> int:
    """Print what the sweep would do and is guessed to take; write nothing. Returns the exit code.

    Raises:
        BadInput: where the sweep would refuse to begin.
    """
    with show_progress(sys.stderr) as progress:
        from depthprobe.runs.preview import preview
        from depthprobe.runs.processes import join_processes

        team = join_processes(study.device)
        if not team.writes:
            team.leave()
            return 0
        progress.message("reading the data")
        found = preview(
            study,
            folder,
            jobs=jobs,
            retry_failed=retry_failed,
            processes=team.processes,
            apart=executor != "local",
            say=progress.message,
        )
        team.leave()
    print("Dry run: nothing is written, and no trial is run.")
    show_study(found)
    show_tasks(found)
    show_shared(found)
    show_estimate(found)
    return 0


def show_study(found: Preview) -> None:
    """Print which study it is, of which data and backbone, and where it would run."""
    sequences, backbone = found.data.sequences, found.study.backbone
    many = _count(found.workers, "job") + (" of a cluster" if found.apart else "")
    each = f", {_count(found.threads, 'thread')}" if found.device == "cpu" else ""
    each += " each" if each and found.workers > 1 else ""
    if found.processes > 1:
        many = f"1 job, trained by {found.processes} processes together"
    show_words(
        {
            "run": f"{found.folder} ({'goes on' if found.begun else 'new'})",
            "data": f"{sequences.name}: {cell(sequences.n_users)} users,"
            f" {cell(sequences.n_items)} items, {cell(sequences.n_interactions)} interactions",
            "backbone": f"{backbone.source}: {found.family}, {_count(found.blocks, 'block')};"
            f" {TUNINGS[backbone.tuning]}",
            "seeds": str(found.study.seeds),
            "runs on": f"{found.device}, {many} at a time{each}",
        }
    )


def show_tasks(found: Preview) -> None:
    """Print a row a method, and their sums."""
    rows: list[list[object]] = []
    times = found.estimate.by_method if found.estimate else {}
    for row in found.rows:
        own = times.get(row.method)
        counts = [row.tasks, row.trials, row.done, row.failed, row.left]
        rows.append([row.method, *counts, "-" if own is None else duration(own)])
    sums = [sum(int(str(row[place])) for row in rows) for place in range(1, 6)]
    work = duration(found.estimate.work) if found.estimate else "-"
    header = ["method", "tasks", "trials", "done", "failed", "left", "ESTIMATED work"]
    show_table(header, [*rows, ["all", *sums, work]], words=header[:1])
    failed = sum(row.failed for row in found.rows)
    if failed and found.retry_failed:
        say(f"What failed is tried again: it counts as left, too ({failed}).")
    elif failed:
        say(f"{failed} failed before and stay so; --retry-failed runs them again.")
    if found.lost:
        say(f"{found.lost} of those left need one that failed, and will not be run.")


def show_shared(found: Preview) -> None:
    """Print what is made once for many trials, and whether it is there."""
    rows = [
        [PARTS[part.name], part.needed, part.there, part.needed - part.there]
        for part in found.shared
    ]
    show_table(
        ["shared between trials", "needed", "there", "to make"],
        rows,
        words=("shared between trials",),
    )


def show_estimate(found: Preview) -> None:
    """Print time and memory of what is left, that they are guesses, and what from."""
    if found.found is None:
        say("\nNothing is left to do.")
        return
    if found.estimate is None:
        say(f"\nNo ESTIMATE of time and memory: {found.found.why}.")
        return
    print("\nESTIMATE of what is left:")
    rows = {"time": _time(found, found.estimate), "longest chain": _chain(found.estimate)}
    if found.found.memory is not None:
        rows["memory"] = _memory(found, found.found.memory)
    show_words(rows | {"from": _source(found), "counted": COUNTED})


def _time(found: Preview, estimate: Estimate) -> str:
    bound = "at least" if found.found and found.found.source == "predicted" else "at most"
    workers = _count(found.workers, "job") + (" at a time" if found.workers > 1 else "")
    span = estimate.span
    if duration_of(span.low) != duration_of(span.high):
        return (
            f"{bound} {duration_of(span.high)} with {workers};"
            f" {duration_of(span.low)} if they don't slow each other down"
        )
    return f"{bound} {duration_of(span.high)} with {workers}"


def _chain(estimate: Estimate) -> str:
    names = " > ".join(job.id for job in estimate.chain)
    seconds = sum(job.seconds for job in estimate.chain)
    return f"{duration_of(seconds)}, however many jobs: {names}"


def _memory(found: Preview, peak: float) -> str:
    """Of the jobs that share a memory, and what there is of it.

    Args:
        peak: bytes of one job.
    """
    how = "measured" if found.found and found.found.memory_measured else "predicted"
    if found.apart:
        return f"{scaled(peak, 'B')} a job at the peak: training all blocks, {how}"
    total, free = found.together * peak, scaled(found.free, "B")
    each = f"{found.together} x {scaled(peak, 'B')}, " if found.together > 1 else ""
    where = " of a GPU" if found.device == "cuda" else ""
    text = f"{scaled(total, 'B')}{where} at the peak: {each}training all blocks, {how}"
    short = "; that is MORE than the" if total > found.free else ";"
    return f"{text}{short} {free} {'that may' if total > found.free else 'may'} be had"


def _source(found: Preview) -> str:
    """Where the times come from, and for what they are taken."""
    like = "; each job is taken to have a machine like this one" if found.apart else ""
    return _times_from(found) + like


def _times_from(found: Preview) -> str:
    told = found.found
    if told is None or told.source == "timed":
        return "the times of every depth that this run measured (shared/timing.json)"
    if told.source == "predicted":
        return (
            f"PREDICTED by the roofline of this device, the least it can take: {told.why}, so"
            " nothing was measured but SASRec"
        )
    busy = f" other work was running ({told.busy:.1f} processes a core): times are too long;"
    return (
        "a measurement of some seconds just now, on models of this shape with random weights;"
        f"{busy if told.busy > BUSY else ''} depths between one block and all by a straight line"
    )


def show_words(rows: dict[str, str]) -> None:
    """Print what a thing is called and what it is, wrapped to the terminal."""
    width = max(12, *map(len, rows))
    columns = min(console().width, WIDEST) - width - 4
    print()
    for key, value in rows.items():
        first, *rest = textwrap.wrap(value, columns, break_on_hyphens=False)
        print(f"  {key:{width}}  {first}")
        for line in rest:
            print(f"  {'':{width}}  {line}")


def say(text: str) -> None:
    """Print a sentence, wrapped to the terminal; a line break before it is kept."""
    if text.startswith("\n"):
        print()
    print(textwrap.fill(text.strip(), min(console().width, WIDEST), break_on_hyphens=False))


def duration(span: Span) -> str:
    """Seconds between two ends: ``52 s``, ``12 to 24 min``."""
    low, high = duration_of(span.low), duration_of(span.high)
    if low == high:
        return high
    (number, unit), (_, other) = low.split(), high.split()
    return f"{number if unit == other else low} to {high}"


def duration_of(seconds: float) -> str:
    """Seconds in a unit that a person would take, at two digits.

    >>> [duration_of(s) for s in (0.2, 52.3, 100, 5000, 400000)]
    ['<1 s', '52 s', '1.7 min', '83 min', '4.6 days']
    """
    if seconds < 1:
        return "<1 s"
    units = ((1, "s", 90), (60, "min", 5400), (3600, "h", 172800), (86400, "days", float("inf")))
    size, unit = next((size, unit) for size, unit, until in units if seconds < until)
    number = seconds / size
    return f"{number:.0f} {unit}" if number >= 10 or unit == "s" else f"{number:.1f} {unit}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
