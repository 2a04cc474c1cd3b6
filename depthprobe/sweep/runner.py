"""Run a study into a folder: what is done is skipped, what failed is tried again."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from depthprobe.data.batches import negatives
from depthprobe.data.prepared import read_data
from depthprobe.data.splits import Split, make_split
from depthprobe.data.storage import MANIFEST as DATA_MANIFEST
from depthprobe.data.storage import Sequences, load_data, write_data
from depthprobe.files import complete_file, remove_leftovers, write_json
from depthprobe.models.backbones import pretrained_config
from depthprobe.models.devices import resolve_device
from depthprobe.models.item_tables import TEXT, make_table, table_hash
from depthprobe.models.revision import backbone_revision, describe, pinned, pinned_now
from depthprobe.study import METHODS as NAMES
from depthprobe.study import BadInput, Study, base_of, differences, study_to_toml
from depthprobe.sweep import provenance, worker
from depthprobe.sweep.context import (
    DATA,
    ITEM_TABLE,
    LEARNED,
    NEGATIVES,
    PROBES,
    TIMING,
    TRIALS,
    Context,
)
from depthprobe.sweep.executors import Outcome, run_here, run_in_processes
from depthprobe.sweep.plan import Task, plan
from depthprobe.sweep.progress import Progress, Silent
from depthprobe.sweep.records import SCHEMA, is_done, read_record, write_failure
from depthprobe.sweep.slicing import asked_slices, own_slices, write_slices
from depthprobe.sweep.store import MANIFEST, STUDY, TABLES, Run, open_run, write_tables
from depthprobe.sweep.team import Team, find_team
from depthprobe.sweep.timing import covers, measure
from depthprobe.training.loop import DivergedError

MOST_JOBS = 4  # by default: each job holds its own copy of the model
NEGATIVE_SEED = 999
TOO_SMALL = "sampled ranking is left out: some user has fewer than 999 items left to draw from"


def run_sweep(
    study: Study,
    output: str | Path | None = None,
    *,
    jobs: int | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> Run:
    """Run every trial of a study that is not done yet, and return the run.

    A branch or tag of the hub is looked up once, when a run begins: all its trials, whenever they
    run, load the commit that it pointed to then. Under ``accelerate launch`` every process calls
    this; they train each trial together, and the first one writes.

    Args:
        study: what to run.
        output: the run's folder, new, empty, or an earlier run of the same study; default
            ``runs/<name>``.
        jobs: trials at the same time, each in a process of its own; 0 runs them in this process.
            Default: one on a GPU, else one a core, at most four. Processes are spawned: a script
            that calls this needs the usual ``if __name__ == "__main__":``.
        command: what the report names as the way to repeat the run.
        progress: is told what happens.

    Raises:
        BadInput: before anything is written, if the data, the backbone, the item table or the
            depths can't be used, or the folder holds another study.
    """
    team = find_team(study.device)
    watcher = (progress if team.writes else None) or Silent()
    disable_progress_bar()  # one bar a loaded model would drown what the watcher says
    folder = Path(output) if output is not None else Path("runs") / study.name
    device = resolve_device(study.device)
    asked, study = study, _check_folder(folder, study)
    before = _before(folder)
    recorded = None if before is None else before["backbone"]["revision"]
    backbone = pinned_now(pinned(study.backbone, recorded))
    config = pretrained_config(backbone)
    tasks = plan(asked, int(config.get_text_config(decoder=True).num_hidden_layers))
    sequences = _data(study, folder)
    split = make_split(sequences, study.protocol)  # refuses a log in which nobody can be asked
    slices = _new_slices(study, split, before)
    working = replace(study, backbone=backbone)  # the study, but for the name of the commit
    table = _item_table(working, sequences, folder, device, watcher)
    manifest = _manifest(study, split, table, device, command)
    revision = backbone_revision(backbone)
    _check_same_inputs(folder, before, manifest, revision)
    if before is None:  # else nothing may be left to do, and loading takes long
        manifest["backbone"] = describe(backbone, revision)

    began = time.perf_counter()
    team.wait()  # all have read the folder as it was
    if team.writes:
        _lay_out(folder, study, split, table, manifest)
        if slices is not None:
            write_slices(slices, folder / "shared")
    team.wait()
    context = Context(folder, working)
    waiting = [t for t in tasks if not all(map(is_done, context.outputs(t)))]
    done = {t.id for t in tasks if t not in waiting}
    watcher.plan([task.id for task in waiting])
    if waiting:
        if team.writes:
            _measure_once(context, manifest["backbone"]["blocks"], watcher)
        team.wait()
        workers = 0 if team.processes > 1 else _jobs(jobs, device, len(waiting))
        threads = max(1, provenance.available_cores() // max(1, workers))
        arguments = (str(folder), working, _provenance(manifest, device, threads), threads)
        outcomes = (
            run_in_processes(
                waiting,
                worker.work,
                done,
                jobs=workers,
                prepare=worker.prepare,
                arguments=arguments,
            )
            if workers
            else _here(waiting, done, arguments, team)
        )
        for outcome in outcomes:
            if team.writes:
                _report(outcome, context, arguments[2], watcher)
            team.wait()
    run = open_run(folder)
    if not team.writes:
        return run
    if waiting or slices is not None or not all((folder / name).exists() for name in TABLES):
        write_tables(run)
        timing = context.shared / TIMING
        conditions = json.loads(timing.read_text())["conditions"] if timing.exists() else None
        spent = manifest["wall_seconds"] + time.perf_counter() - began
        manifest |= {"timing": conditions, "wall_seconds": round(spent, 1)}
        write_json(folder / MANIFEST, manifest)
    return open_run(folder)


def _check_folder(folder: Path, study: Study) -> Study:
    """The study with the methods that the run has already; refuses any other difference."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return study
    if not (folder / STUDY).is_file():
        raise BadInput("output", str(folder), "a new or empty folder, or an earlier run")
    before = open_run(folder).study
    changed = differences(before, study)
    if changed:
        allowed = f"another folder, or the study it began with ({'; '.join(changed)})"
        raise BadInput("output", str(folder), allowed)
    methods = {*before.methods, *study.methods}
    names = sorted(methods, key=lambda name: (NAMES.index(base_of(name)), name))
    variants = {**before.variants, **study.variants}
    return replace(study, name=before.name, methods=tuple(names), variants=variants)


def _before(folder: Path) -> dict[str, Any] | None:
    """The manifest of the run that is continued; None where a run begins."""
    return open_run(folder).manifest if (folder / MANIFEST).is_file() else None


def _check_same_inputs(
    folder: Path, before: dict[str, Any] | None, manifest: dict[str, Any], revision: str
) -> None:
    """Refuse to mix records of other data, weights or embeddings under the same names."""
    if before is None:
        return
    for name, was, now in (
        ("data", before["data"]["fingerprint"], manifest["data"]["fingerprint"]),
        ("backbone", before["backbone"]["revision"], revision),
        ("item table", before["item_table"]["sha256"], manifest["item_table"]["sha256"]),
    ):
        if was != now:
            allowed = f"another folder: the {name} has changed since this run began"
            raise BadInput("output", str(folder), allowed)
    kept = ("created", "wall_seconds", "timing", "command", "backbone")
    manifest |= {key: before[key] for key in kept}


def _new_slices(study: Study, split: Split, before: dict[str, Any] | None) -> pd.DataFrame | None:
    """The own columns of the slices, read; None if the run has them already, or needs none."""
    had = {"user": [], "item": []} if before is None else before.get("slices")
    same = had is not None and asked_slices(study.protocol) == had
    return None if same else own_slices(study.protocol, split)


def _data(study: Study, folder: Path) -> Sequences:
    """The log that the run was begun with, or the source, read but not yet written."""
    prepared = folder / "shared" / DATA
    if study.data.source == "embedded" and (prepared / DATA_MANIFEST).is_file():
        return load_data(prepared)
    return read_data(study.data)


def _item_table(
    study: Study, sequences: Sequences, folder: Path, device: torch.device, watcher: Progress
) -> Tensor | None:
    """The item table that all trials share, not yet written; None where each seed has its own."""
    if study.item_table in {"sasrec", LEARNED}:
        return None
    written = folder / "shared" / ITEM_TABLE
    if study.item_table == TEXT and written.is_file():
        return torch.from_numpy(np.load(written))
    return make_table(
        study.item_table,
        study.backbone,
        sequences.item_ids.tolist(),
        sequences.titles,
        device=device,
        say=watcher.message,
    )


def _lay_out(
    folder: Path, study: Study, split: Split, table: Tensor | None, manifest: dict[str, Any]
) -> None:
    """Write what trials share; a folder that has it already is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / TRIALS, folder / PROBES, folder / "shared"):
        remove_leftovers(place)
    shared = folder / "shared"
    drawn = _draw_negatives(study, split, shared)
    manifest["sampled"] = None
    if drawn is not None or (shared / NEGATIVES).exists():
        manifest["sampled"] = {"negatives": study.protocol.negatives, "seed": NEGATIVE_SEED}
    elif study.protocol.sampled:
        manifest["data"]["warnings"].append(TOO_SMALL)
    with complete_file(folder / STUDY) as temporary:
        temporary.write_text(study_to_toml(study), encoding="utf-8")
    write_json(folder / MANIFEST, manifest)
    if not (shared / DATA / DATA_MANIFEST).is_file():
        write_data(split.sequences, shared / DATA)
    if table is not None and not (shared / ITEM_TABLE).exists():
        with complete_file(shared / ITEM_TABLE) as temporary:
            np.save(temporary, table.numpy())
    if drawn is not None:
        with complete_file(shared / NEGATIVES) as temporary:
            np.save(temporary, drawn)


def _draw_negatives(study: Study, split: Split, shared: Path) -> np.ndarray | None:
    """The sampled protocol's negatives, (E, 999), if they are wanted, not there, and can be had."""
    if not study.protocol.sampled or (shared / NEGATIVES).exists():
        return None
    popular = study.protocol.negatives == "popularity"
    pool = split.sequences.items[split.trained] if popular else None
    return negatives(split.sequences, split.test.users, seed=NEGATIVE_SEED, pool=pool)


def _manifest(
    study: Study,
    split: Split,
    table: Tensor | None,
    device: torch.device,
    command: str | None,
) -> dict[str, Any]:
    sequences = split.sequences
    return {
        "schema": SCHEMA,
        "study_hash": study.digest(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "data": {
            "name": sequences.name,
            "users": sequences.n_users,
            "items": sequences.n_items,
            "interactions": sequences.n_interactions,
            "fingerprint": sequences.fingerprint,
            "warnings": [*sequences.warnings, *split.warnings],
            "statistics": sequences.statistics,
            "cleaning": [asdict(step) for step in sequences.cleaning],
            "split": split.statistics,
        },
        "item_table": {
            "source": study.item_table,
            "width": _table_width(study) if table is None else table.shape[1],
            "trained": study.trains_items,
            "sha256": None if table is None else table_hash(table),
        },
        "slices": asked_slices(study.protocol),
        "machine": provenance.machine(device),
        "versions": provenance.versions(),
        "git": provenance.git_state(),
        "timing": None,
        "wall_seconds": 0.0,
    }


def _table_width(study: Study) -> int:
    return study.sasrec.width if study.item_table == "sasrec" else study.item_width


def _provenance(manifest: dict[str, Any], device: torch.device, threads: int) -> dict[str, Any]:
    return {
        "study": manifest["study_hash"],
        "data": manifest["data"]["fingerprint"],
        "backbone": manifest["backbone"]["revision"],
        "git": manifest["git"],
        "versions": manifest["versions"],
        "device": manifest["machine"]["gpu"] or manifest["machine"]["cpu"],
        "device_type": device.type,
        "threads": threads,
    }


def _measure_once(context: Context, blocks: int, watcher: Progress) -> None:
    path = context.shared / TIMING
    # a sweep of the baselines alone has left no depth's times to one that goes on with more
    if not path.exists() or not covers(json.loads(path.read_text()), context, blocks):
        watcher.message("timing every depth, alone on the machine")
        write_json(path, measure(context, blocks))


def _jobs(asked: int | None, device: torch.device, tasks: int) -> int:
    if asked is not None:
        return min(asked, tasks)
    return 1 if device.type != "cpu" else min(provenance.available_cores(), MOST_JOBS, tasks)


def _here(
    waiting: list[Task], done: set[str], arguments: tuple[Any, ...], team: Team
) -> Iterator[Outcome]:
    worker.begin(*arguments[:3], writes=team.writes)
    # all processes of a team see a training diverge; after any other fault of one of them, the
    # others would wait for it for ever
    caught = Exception if team.processes == 1 else DivergedError
    return run_here(waiting, worker.work, done, caught=caught)


def _report(outcome: Outcome, context: Context, origin: dict[str, Any], watcher: Progress) -> None:
    task = outcome.task
    if outcome.error is None:
        watcher.done(task.id, "done", outcome.seconds, _score(context, task))
        return
    write_failure(context.outputs(task), task, outcome.error, origin)
    watcher.done(task.id, "failed", outcome.seconds, outcome.error)


def _score(context: Context, task: Task) -> str:
    if len(task.trials) != 1:
        return f"{len(task.trials)} trials" if task.trials else "a table"
    record = read_record(context.trial_folder(task.trials[0]))
    return f"NDCG@10 {record['metrics']['test']['full']['NDCG@10']:.4f}" if record else ""
