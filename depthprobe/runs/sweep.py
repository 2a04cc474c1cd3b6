"""Run a study into a folder: what is done is skipped, what others do is left to them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from depthprobe.files import write_json
from depthprobe.methods import Task
from depthprobe.models.backbones import backbone_revision, describe, resolve_device
from depthprobe.runs import provenance, worker
from depthprobe.runs.context import TIMING, Context
from depthprobe.runs.estimate import covers, measure
from depthprobe.runs.layout import (
    check_same_inputs,
    lay_out,
    new_manifest,
    read_inputs,
    repeating,
    shared_table,
    tidy,
)
from depthprobe.runs.processes import ProcessGroup, join_processes
from depthprobe.runs.progress import Progress, Silent
from depthprobe.runs.records import (
    MANIFEST,
    BackboneFacts,
    Manifest,
    Provenance,
    failures,
    read_manifest,
    read_record,
    state_of,
    to_retry,
    write_failure,
    write_manifest,
)
from depthprobe.runs.scheduler import (
    Claims,
    Outcome,
    Queue,
    clear,
    run_here,
    run_in_processes,
    whole_run,
)
from depthprobe.runs.store import TABLES, Run, open_run, write_tables
from depthprobe.runs.tables import write_slices
from depthprobe.study import Study
from depthprobe.training.loop import DivergedError

MOST_JOBS = 4  # by default on a CPU: each job holds its own copy of the model


def run_sweep(
    study: Study,
    output: str | Path | None = None,
    *,
    jobs: int | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    retry_failed: bool | Mapping[str, int] = False,
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
            Default: one a GPU, else one a core, at most four. Processes are spawned: a script
            that calls this needs the usual ``if __name__ == "__main__":``.
        command: what the report names as the way to repeat the run.
        progress: is told what happens.
        retry_failed: trials that failed before are tried again, once. Several sweeps of one
            command are given the failures that it found (:func:`.records.failures`): what one of
            them has tried in vain, no other tries again.

    Raises:
        BadInput: before anything is written, if the data, the backbone, the item table, the
            depths or a tracker can't be used, or the folder holds another study.
    """
    team = join_processes(study.device)
    watcher = (progress if team.writes else None) or Silent()
    disable_progress_bar()  # one bar a loaded model would drown what the watcher says
    folder = Path(output) if output is not None else Path("runs") / study.name
    device = resolve_device(study.device)
    inputs = read_inputs(study, folder)
    retry = failures(folder) if retry_failed is True else retry_failed or {}
    working, before, slices = inputs.working, inputs.before, inputs.slices
    table = shared_table(working, inputs.split.sequences, folder, device, watcher)
    revision = backbone_revision(working.backbone)
    # of a run that is continued nothing may be left to do, and loading takes long
    backbone = (
        BackboneFacts(**describe(working.backbone, revision)) if before is None else before.backbone
    )
    manifest = new_manifest(inputs.study, inputs.split, table, backbone, device, command)
    if before is not None:
        check_same_inputs(folder, before, manifest, revision)
        manifest.command = repeating(folder, study, command, before.command)

    began = time.perf_counter()
    team.wait()  # all have read the folder as it was
    context = Context(folder, working)
    with _alone(folder, team, watcher):
        overtaken = team.agree(before is None and (folder / MANIFEST).is_file())
        if not overtaken:
            if team.writes:
                lay_out(folder, inputs.study, inputs.split, table, manifest)
                if slices is not None:
                    write_slices(slices, folder / "shared")
            waiting, done, failed = team.agree(_sorted(context, inputs.tasks, retry))
            if waiting and team.writes:
                _measure_once(context, manifest.backbone.blocks, watcher)
    if overtaken:  # another sweep has begun the run since it was looked at: this one continues it
        return run_sweep(
            study,
            folder,
            jobs=jobs,
            command=command,
            progress=progress,
            retry_failed=retry,
        )
    watcher.plan([task.id for task in waiting])
    if failed:
        watcher.message(f"{len(failed)} failed before; --retry-failed runs them again")
    claims = Claims(folder, context.outputs, retry, team)
    queue = Queue(waiting, claims, done=done, failed=failed)
    workers = 0 if team.processes > 1 else jobs_at_once(jobs, device, len(waiting))
    threads = max(1, provenance.available_cores() // max(1, workers))
    origin = _provenance(manifest, device, threads)
    try:
        for outcome in _outcomes(queue, folder, working, origin, workers, team):
            if team.writes:
                _report(outcome, context, origin, watcher)
            team.wait()
    finally:
        claims.leave_all()
    if not team.writes:
        return open_run(folder)
    if waiting or slices is not None or not _has_tables(folder):
        with whole_run(folder, watcher.message):
            tidy(folder)
            write_tables(open_run(folder))
            _update_manifest(context, time.perf_counter() - began)
    clear(folder)
    return open_run(folder)


def _has_tables(folder: Path) -> bool:
    """Whether the tables of a run are those of its records."""
    return (folder / TABLES[0]).is_file() and open_run(folder).written_metrics() is not None


@contextmanager
def _alone(folder: Path, team: ProcessGroup, watcher: Progress) -> Iterator[None]:
    """Alone with the run; of a team, the first process is so for all."""
    with whole_run(folder, watcher.message) if team.writes else nullcontext():
        yield
        team.wait()


def _sorted(
    context: Context, tasks: Sequence[Task], retry: Mapping[str, int]
) -> tuple[list[Task], set[str], set[str]]:
    """Tasks to do; trials that are done; tasks that failed before and are left so."""
    waiting, done, failed = [], set[str](), set[str]()
    for task in tasks:
        outputs = context.outputs(task)
        state = state_of(outputs)
        if state == "done":
            done |= task.names
        elif state == "failed" and not to_retry(outputs, retry):
            failed |= task.names
        else:
            waiting.append(task)
    return waiting, done, failed


def _outcomes(
    queue: Queue,
    folder: Path,
    study: Study,
    origin: Provenance,
    workers: int,
    team: ProcessGroup,
) -> Iterator[Outcome]:
    """How the tasks end, in workers or in this process."""
    if not queue.waiting:
        return iter(())
    if workers:
        arguments = (str(folder), study, origin)
        return run_in_processes(
            queue, worker.work, jobs=workers, prepare=worker.prepare, arguments=arguments
        )
    worker.begin(str(folder), study, origin, writes=team.writes)
    # all processes of a team see a training diverge; after any other fault of one of them, the
    # others would wait for it for ever
    caught = Exception if team.processes == 1 else DivergedError
    return run_here(queue, worker.work, caught=caught)


def _update_manifest(context: Context, seconds: float) -> None:
    """The times that this sweep adds; others may have changed the rest since."""
    manifest, timing = read_manifest(context.folder), context.shared / TIMING
    manifest.timing = json.loads(timing.read_text())["conditions"] if timing.exists() else None
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


def _measure_once(context: Context, blocks: int, watcher: Progress) -> None:
    path = context.shared / TIMING
    # a sweep of the baselines alone has left no depth's times to one that goes on with more
    if not path.exists() or not covers(json.loads(path.read_text()), context, blocks):
        watcher.message("timing every depth, alone on the machine")
        write_json(path, measure(context, blocks))
        watcher.message("every depth is timed")


def jobs_at_once(asked: int | None, device: torch.device, tasks: int) -> int:
    """How many of so many tasks run at the same time; 0: in this process."""
    if asked is not None:
        return min(asked, tasks)
    if device.type == "cpu":
        return min(provenance.available_cores(), MOST_JOBS, tasks)
    return min(max(1, torch.cuda.device_count()), tasks)


def _report(outcome: Outcome, context: Context, origin: Provenance, watcher: Progress) -> None:
    task = outcome.task
    if outcome.elsewhere:
        told = "failed" if outcome.error else "done"
        watcher.done(task.id, told, outcome.seconds, "in another sweep of this run")
        return
    if outcome.error is None:
        watcher.done(task.id, "done", outcome.seconds, _score(context, task))
        return
    write_failure(context.outputs(task), task, outcome.error, origin)
    watcher.done(task.id, "failed", outcome.seconds, outcome.error)


def _score(context: Context, task: Task) -> str:
    if len(task.trials) != 1:
        return f"{len(task.trials)} trials" if task.trials else "a table"
    record = read_record(context.trial_folder(task.trials[0]))
    if record is None:
        return ""
    note, training = f"NDCG@10 {record.metrics['test']['full']['NDCG@10']:.4f}", record.training
    if training is not None and training.parts > 1:
        note += f", batches in {training.parts} parts"
    if training is not None and training.reused:
        note += ", trained before"
    return note
