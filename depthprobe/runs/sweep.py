"""Run a study into a folder: skip what is done, leave to other sweeps what they are at."""

from __future__ import annotations

import pickle  # noqa: S403 - to see whether a method can be sent to a worker
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from depthprobe.cost.size import release_memory
from depthprobe.errors import BadInput
from depthprobe.formatting import duration, rounded
from depthprobe.methods import BUILT_IN, METHODS, Method, Task
from depthprobe.runs import worker
from depthprobe.runs.context import Context
from depthprobe.runs.estimate import seconds_of
from depthprobe.runs.layout import (
    Inputs,
    available_cores,
    jobs_at_once,
    lay_out,
    manifest_before,
    read_inputs,
    threads_of,
    tidy,
)
from depthprobe.runs.plan import TEACHER
from depthprobe.runs.processes import ProcessGroup, Progress, join_processes
from depthprobe.runs.records import (
    FULL,
    MANIFEST,
    TABLES,
    TIMING,
    Manifest,
    Provenance,
    forget_failures,
    read_manifest,
    read_record,
    state_of,
    write_failure,
    write_manifest,
    write_sealed,
)
from depthprobe.runs.scheduler import (
    Claims,
    Outcome,
    Queue,
    clear,
    run_in_processes,
    whole_run,
)
from depthprobe.runs.search import plan_search
from depthprobe.runs.store import Run, open_run, write_tables
from depthprobe.runs.timing import covers, measure, read_timing, retime
from depthprobe.study import Study


def run_sweep(
    study: Study,
    output: str | Path | None = None,
    *,
    jobs: int | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    retry_failed: bool = False,
) -> Run:
    """Run every trial of a study that has no record yet, and return the run.

    Several of these may work on one run at the same time, on one machine or on many that share a
    file system with locks: each trial is done by one of them.

    A branch or tag of the hub is looked up once, when a run begins: all its trials, whenever they
    run, load the commit that it pointed to then. Under ``accelerate launch`` every process calls
    this; they train each trial together, and the first one writes.

    Args:
        study: what to run.
        output: the run's folder, new, empty, or an earlier run of the same study; default
            ``runs/<name>``.
        jobs: trials at the same time, each in a process of its own; 0 runs them in this process.
            Default: one per GPU, or one per core, at most four. Processes are spawned: a script
            that calls this needs the usual ``if __name__ == "__main__":``.
        command: what the report names as the way to repeat the run.
        progress: is shown what happens.
        retry_failed: trials that failed before are tried again.

    Raises:
        BadInput: before anything is written, if the data, the backbone, the item table, the
            depths or a tracker can't be used, or the folder holds another study or is damaged;
            later, if it is moved.
    """
    group = join_processes(study.device)
    progress = (progress if group.writes else None) or Progress()
    disable_progress_bar()  # transformers would show a bar for every model that it loads
    folder = Path(output) if output is not None else Path("runs") / study.name
    inputs = read_inputs(study, folder, command=command)
    working, before, manifest = inputs.working, inputs.before, inputs.manifest
    if working.seeds > study.seeds:
        progress.message(f"the run keeps its {working.seeds} seeds: --seeds {study.seeds} is fewer")

    began = time.perf_counter()
    context = Context(folder, working)
    group.wait()  # all have read the folder as it was

    def begin() -> tuple[bool, list[Task], set[str], set[str]] | None:
        if before is None:
            folder.mkdir(parents=True, exist_ok=True)
        with whole_run(folder, progress):
            if before is None and manifest_before(folder) is not None:
                return None
            resliced = lay_out(folder, study, inputs)
            if retry_failed:
                forget_failures(path for task in inputs.tasks for path in context.outputs(task))
            by_state: dict[str, list[Task]] = {"done": [], "failed": [], "left": []}
            for task in inputs.tasks:
                by_state[state_of(context.outputs(task))].append(task)
            waiting = by_state["left"]
            if working.searches:
                waiting = [*_asked_for(context, inputs, progress)]
            if waiting:
                _measure_once(context, inputs.blocks, progress)
            if working.searches:
                _check_hours(context, inputs.tasks, group.processes)
        return resliced, waiting, _names(by_state["done"]), _names(by_state["failed"])

    begun = group.from_first(begin)
    if begun is None:  # another sweep has begun the run since it was looked at: continue it
        more: dict[str, Any] = {"command": command, "retry_failed": retry_failed}
        return run_sweep(study, folder, jobs=jobs, progress=progress, **more)
    resliced, waiting, done, failed = begun
    if not working.searches:
        progress.plan([task.id for task in waiting])
    if failed:
        progress.message(f"{len(failed)} failed before; --retry-failed runs them again")
    claims = Claims(folder, group)
    queue = Queue(waiting, claims, done=done, failed=failed)
    if working.searches:
        queue.more = lambda: group.from_first(partial(_asked_for, context, inputs, progress))
    at_once = partial(jobs_at_once, jobs, context.device, memory=inputs.job_memory)
    most = 1 if working.searches else len(inputs.tasks)  # a search trains one after the other
    workers = 0 if group.processes > 1 else at_once(min(len(waiting), most))
    # by all tasks, not by those that are left: threads decide the last bits of a training
    planned = at_once(most) if workers else 0
    origin = _provenance(manifest, context.device, threads_of(planned, available_cores()))
    with _in_place(folder):
        try:
            for ready in _ready(queue, context, origin, workers, group):
                outcome = worker.work(ready) if isinstance(ready, Task) else ready
                group.from_first(partial(_report, outcome, context, origin, progress))
                queue.end(outcome)
        finally:
            claims.leave_all()
        if not group.writes:
            return open_run(folder)
        has_tables = (folder / TABLES[0]).is_file()
        up_to_date = has_tables and open_run(folder).written_metrics() is not None
        if waiting or resliced or not up_to_date:
            with whole_run(folder, progress):
                tidy(folder)
                write_tables(open_run(folder))
                _update_manifest(context, time.perf_counter() - began)
    clear(folder)
    return open_run(folder)


@contextmanager
def _in_place(folder: Path) -> Iterator[None]:
    """Turn a failed write into a clear error if the run's folder was moved or deleted."""
    try:
        yield
    except OSError as error:
        if (folder / MANIFEST).is_file():
            raise
        allowed = (
            "it was moved or deleted while the sweep ran; run the same command on its new path"
        )
        raise BadInput("output", str(folder), allowed, fault=True) from error


def _asked_for(context: Context, inputs: Inputs, progress: Progress) -> tuple[Task, ...]:
    """The tasks that a search wants next. None once it has ended, and it reports why."""
    asked = plan_search(context.folder, context.study, inputs.tasks, inputs.blocks)
    if asked.tasks:
        progress.plan([task.id for task in asked.tasks])
    if asked.words:
        progress.message(asked.words)
    return asked.tasks


def _names(tasks: Iterable[Task]) -> set[str]:
    return {name for task in tasks for name in task.names}


def _measure_once(context: Context, blocks: int, progress: Progress) -> None:
    path = context.shared / TIMING
    # a sweep of the baselines alone has left no depth's times to one that goes on with more
    if not path.exists() or not covers(read_timing(path), context, blocks):
        progress.message("timing every depth, alone on the machine")
        measured = measure(context, blocks)
        retime(context, blocks, measured)
        write_sealed(path, measured)  # the last: until it is there, all is measured again
        release_memory()
        progress.message("every depth is timed")


def _check_hours(context: Context, tasks: Sequence[Task], processes: int) -> None:
    """Before training starts, refuse a search whose budget is too short for its first teacher."""
    hours, teacher = context.study.search.hours, next(t for t in tasks if t.method == TEACHER)
    if hours is None or state_of(context.outputs(teacher)) != "left":
        return
    if (needed := seconds_of(teacher, context, processes=processes)) > 3600 * hours:
        allowed = f"at least {rounded(needed / 3600)}, that is {duration(needed)} for one teacher"
        raise BadInput("search.hours", f"{hours:g}", allowed)


def _ready(
    queue: Queue, context: Context, origin: Provenance, workers: int, group: ProcessGroup
) -> Iterable[Task | Outcome]:
    """Outcomes from workers; or tasks for this process, and outcomes from other sweeps."""
    if not workers:
        worker.begin(context.folder, context.study, origin, group)
        return queue
    arguments = (context.folder, context.study, origin, _registered())
    return run_in_processes(
        queue, worker.work, jobs=workers, prepare=worker.prepare, arguments=arguments
    )


def _registered() -> list[Method]:
    """Methods registered in this process; worker processes must register them too."""
    methods = [method for name, method in METHODS.items() if name not in BUILT_IN]
    for method in methods:
        try:
            pickle.dumps(method)
        except Exception as error:
            allowed = f"--jobs 0, or functions that a module holds ({error})"
            raise BadInput("method", method.name, allowed) from error
    return methods


def _report(outcome: Outcome, context: Context, origin: Provenance, progress: Progress) -> None:
    task, error = outcome.task, outcome.error
    if outcome.elsewhere:
        note = "in another sweep of this run"
    elif error is None:
        note = _note(context, task)
    else:
        note = error
        write_failure(context.outputs(task), task, error, origin)
    progress.done(task.id, "failed" if error else "done", outcome.seconds, note)


def _note(context: Context, task: Task) -> str:
    if len(task.trials) != 1:
        return f"{len(task.trials)} trials" if task.trials else "a table"
    record = read_record(context.trial_folder(task.trials[0]))
    if record is None:
        return ""
    note, training = f"NDCG@10 {record.metrics['test'][FULL]['NDCG@10']:.4f}", record.training
    if training is not None and training.parts > 1:
        note += f", batches in {training.parts} parts"
    if training is not None and training.tried:
        note += f", best learning rate {rounded(training.learning_rate or 0)}"
    if training is not None and training.reused:
        note += ", trained before"
    return note


def _update_manifest(context: Context, seconds: float) -> None:
    """Add this sweep's times to the manifest; other sweeps may have changed the rest of it."""
    manifest, timing = read_manifest(context.folder), context.shared / TIMING
    manifest.timing = read_timing(timing)["conditions"] if timing.exists() else None
    manifest.wall_seconds = round(manifest.wall_seconds + seconds, 1)
    write_manifest(context.folder, manifest)


def _provenance(manifest: Manifest, device: torch.device, threads: int) -> Provenance:
    return Provenance(
        study=manifest.study_hash,
        data=manifest.data.fingerprint,
        backbone=manifest.backbone.revision,
        git=manifest.git,
        versions=manifest.versions,
        device=manifest.machine.gpu or manifest.machine.cpu,
        device_type=device.type,
        threads=threads,
    )
