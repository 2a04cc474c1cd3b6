"""What a sweep would do, read and checked as the sweep does; nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from depthprobe.cost.size import count_bytes, free_memory
from depthprobe.cost.table import random_backbone
from depthprobe.cost.timing import machine
from depthprobe.data.splits import Split
from depthprobe.data.storage import MANIFEST as DATA_MANIFEST
from depthprobe.methods import Task, method_of, method_order
from depthprobe.models import backbones
from depthprobe.models.build import around
from depthprobe.models.item_tables import TEXT, item_texts, make_table
from depthprobe.models.precision import check_attention, quantization
from depthprobe.models.recommender import Recommender
from depthprobe.runs import estimate as effort
from depthprobe.runs import provenance
from depthprobe.runs.context import DATA, ITEM_TABLE, LEARNED, NEGATIVES, TIMING, Context
from depthprobe.runs.estimate import Job
from depthprobe.runs.layout import Inputs, check_same_inputs, new_manifest, read_inputs
from depthprobe.runs.plan import full_trial
from depthprobe.runs.records import is_done, state_of
from depthprobe.runs.sweep import jobs_at_once
from depthprobe.runs.training import FEATURES
from depthprobe.study import Study

SECONDS = 4.0  # to measure for, where the run has no times yet
START = 4.0  # seconds until a worker has loaded its libraries and the log; on two Xeon cores
Span = tuple[float, float]  # seconds between two ends; a single guess has both ends alike


@dataclass(frozen=True)
class Row:
    """Tasks of a method, and their trials; a table that a task makes counts as one."""

    method: str
    tasks: int
    trials: int
    done: int
    failed: int
    left: int


@dataclass(frozen=True)
class Part:
    """What trials share: how many of it the study needs, how many are there."""

    name: str
    needed: int
    there: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is left is guessed to take.

    Attributes:
        timed: by the times of the run; else by a short measurement.
        busy: processes that wanted a core while that was made, by core.
        span: of the whole, on so many workers.
        work: of all jobs one after the other.
        chain: jobs that must follow each other and take longest.
        by_method: the work of each method.
        memory: bytes of a process that trains all blocks, at its peak; None if unknown.
    """

    timed: bool
    busy: float
    span: Span
    work: Span
    chain: tuple[Job, ...]
    by_method: dict[str, Span]
    memory: float | None


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The plan of a sweep, what its folder holds of it, and the estimate of the rest.

    Attributes:
        begun: whether the folder is a run.
        workers: jobs at a time; 0 and 1 are one.
        threads: of a worker, on a CPU.
        processes: that train together.
        apart: each job has a machine of its own.
        together: jobs that share one memory, the machine's or a GPU's.
        lost: trials that will not be done, since something that they need has failed.
        waiting: whether anything is left.
        estimate: None if nothing is left, or nothing could be measured: ``why``.
        free: bytes of memory that may be had.
    """

    study: Study
    folder: Path
    begun: bool
    data: Split
    family: str
    blocks: int
    device: str
    workers: int
    threads: int
    processes: int
    apart: bool
    together: int
    retry_failed: bool
    rows: list[Row]
    shared: list[Part]
    lost: int
    waiting: bool
    free: int
    estimate: Estimate | None = None
    why: str = ""


def preview(
    study: Study,
    folder: Path,
    *,
    jobs: int | None = None,
    retry_failed: bool = False,
    processes: int = 1,
    apart: bool = False,
) -> Preview:
    """Plan a sweep into a folder as :func:`depthprobe.runs.sweep.run_sweep` would.

    Weights are not loaded: that some are missing shows when the sweep begins. What is not on this
    machine of a public log or a Hugging Face id's configuration is fetched into its cache.

    Args:
        processes: that train together, under a launcher.
        apart: the jobs, by default one, run on machines of their own that are like this one.

    Raises:
        BadInput: where the sweep would refuse to begin.
    """
    device = backbones.resolve_device(study.device)
    inputs = read_inputs(study, folder)
    width = _check(inputs, folder, device)
    tasks, blocks, context = inputs.tasks, inputs.blocks, Context(folder, inputs.working)
    vars(context).update(split=inputs.split, sequences=inputs.split.sequences)
    states = {task.id: state_of(context.outputs(task)) for task in tasks}
    left = [task for task in tasks if states[task.id] != "done"]
    failed = {name for name, state in states.items() if state == "failed" and not retry_failed}
    waiting = effort.without_lost(left, failed)
    doable = {task.id for task in waiting}
    wanted = 1 if processes > 1 or (apart and jobs is None) else jobs
    workers = max(1, jobs_at_once(wanted, device, len(waiting)))
    threads = max(1, provenance.available_cores() // (1 if apart else workers))
    # of several GPUs each has its share of the workers
    together = 1 if apart else -(-workers // max(1, torch.cuda.device_count()))
    why, guess = "", None
    if waiting:
        try:
            guess = _estimate(
                context,
                waiting,
                blocks,
                width,
                there=_made(context, blocks),
                workers=workers,
                threads=threads,
                processes=processes,
                slower=None if apart else together,
                start=0.0 if jobs == 0 or processes > 1 else START,
            )
        except (ValueError, RuntimeError) as error:  # the plan can be told all the same
            why = str(error).partition("\n")[0]
    return Preview(
        study=context.study,
        folder=folder,
        begun=inputs.before is not None,
        data=inputs.split,
        family=str(inputs.config.model_type),
        blocks=blocks,
        device=device.type,
        workers=workers,
        threads=threads,
        processes=processes,
        apart=apart,
        together=together,
        retry_failed=retry_failed,
        rows=_rows(context, tasks, failed),
        shared=_shared(context, tasks, blocks),
        lost=sum(len(context.outputs(task)) for task in left if task.id not in doable | failed),
        waiting=bool(waiting),
        free=free_memory(device),
        estimate=guess,
        why=why,
    )


def _estimate(
    context: Context,
    waiting: Sequence[Task],
    blocks: int,
    width: int | None,
    *,
    there: set[str],
    workers: int,
    threads: int,
    processes: int,
    slower: int | None,
    start: float,
) -> Estimate:
    """What the waiting tasks take, by the times of the run, else by a short measurement.

    Args:
        slower: how many jobs share a device, which slows each down at most so many times; on a
            CPU the threads that it loses do. None: each job is alone.
    """
    study, device, path = context.study, context.device, context.shared / TIMING
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    timed = (
        bool(measured)
        and measured["conditions"]["device"] == device.type
        and effort.covers(measured, context, blocks)
    )
    sizes, train_length, test_length = effort.sizes_of(context.split, study)
    trained = any(method_of(task.method).role != "baseline" for task in waiting)
    compute = study.budget == "compute" and trained
    model = _shape(context, width) if trained and (compute or not timed) else None
    flops = {}
    if compute and model is not None:
        flops = effort.window_flops(model, round(train_length), study.recipe.objective)
    busy, alone = 0.0, 0.0
    if not timed:
        busy = float(machine(device)["busy"])
        if model is not None:
            _check_memory(model, device)
        asked = tuple(dict.fromkeys(task.method for task in waiting))
        few = Context(context.folder, replace(study, methods=asked))
        vars(few).update(split=context.split, sequences=context.sequences)
        with _threads(threads if device.type == "cpu" else None):
            measured = effort.measure(few, blocks, seconds=SECONDS, width=width, all_depths=False)
        # the sweep begins with a longer one
        a_round = sum(float(np.median(values)) for values in measured["seconds"].values())
        rounds = study.cost.warmup + study.cost.rounds
        alone = max(a_round, min(study.cost.seconds, rounds * a_round))
    units = effort.units_of(measured, flops, train_length=train_length, test_length=test_length)
    jobs = effort.jobs_of(study, waiting, sizes, units, there=there, processes=processes)
    if not math.isfinite(sum(job.seconds for job in jobs)):
        raise ValueError("a step of the full depth takes too long to be timed")
    times = 1.0 if slower is None else float(slower)
    if slower is not None and device.type == "cpu":
        times = max(1.0, measured["conditions"]["threads"] / threads)
    slow = [replace(job, seconds=times * job.seconds) for job in jobs]

    def both(seconds: Callable[[Sequence[Job]], float]) -> Span:
        return seconds(jobs), seconds(slow)

    def of(method: str) -> Span:
        return both(lambda each: sum(job.seconds for job in each if job.method == method))

    return Estimate(
        timed=timed,
        busy=busy,
        span=both(lambda each: alone + effort.schedule(each, workers, start=start)),
        work=both(lambda each: sum(job.seconds for job in each)),
        chain=effort.longest_chain(slow),
        by_method={method: of(method) for method in dict.fromkeys(job.method for job in jobs)},
        memory=measured.get("peak_bytes") if trained else None,
    )


def _shape(context: Context, width: int | None) -> Recommender:
    """The study's full recommender without weights.

    Raises:
        ValueError: for weights that can't be made up.
    """
    settings = context.study.backbone
    if settings.quantize != "none":
        raise ValueError("quantised weights can't be made up; the sweep will measure them")
    config = backbones.pretrained_config(settings)
    backbone = random_backbone(config, settings.dtype, torch.device("meta"))
    table = torch.empty(context.sequences.n_items + 1, width or context.item_width, device="meta")
    return around(backbone, settings, table, seed=0, train_items=context.study.trains_items)


def _check_memory(model: Recommender, device: torch.device) -> None:
    held, free = count_bytes(model), free_memory(device)
    if held["total"] + held["optimizer"] > free:
        needs = (held["total"] + held["optimizer"]) / 1e9
        raise ValueError(f"a training takes more than {needs:.1f} GB; {free / 1e9:.1f} GB are free")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(inputs: Inputs, folder: Path, device: torch.device) -> int | None:
    """Refuse what the sweep would; returns the width of an item table that all trials share."""
    study, before = inputs.working, inputs.before
    table: Tensor | None = None
    ids, titles = inputs.split.sequences.item_ids.tolist(), inputs.split.sequences.titles
    if study.item_table == TEXT:
        item_texts(ids, titles)
    elif study.item_table not in ("sasrec", LEARNED):
        table = make_table(study.item_table, study.backbone, ids, titles, device=device)
    check_attention(study.backbone.attention)
    quantization(study.backbone.quantize)
    source = study.backbone.source
    if source != backbones.EMBEDDED and backbones.is_folder(source):
        backbones.check_weights(backbones.folder_of(source))
    if before is not None:
        manifest = new_manifest(study, inputs.split, table, before.backbone, device, None)
        if study.item_table == TEXT:  # it is made of the titles and the backbone
            manifest.item_table = before.item_table
        check_same_inputs(folder, before, manifest, backbones.backbone_revision(study.backbone))
    if study.item_table == TEXT:
        return int(inputs.config.hidden_size)
    return None if table is None else int(table.shape[1])


def _rows(context: Context, tasks: Sequence[Task], failed: set[str]) -> list[Row]:
    rows = []
    for method in dict.fromkeys(task.method for task in tasks):
        own = [task for task in tasks if task.method == method]
        states = [
            (task.id in failed, state_of([path])) for task in own for path in context.outputs(task)
        ]
        done = sum(state == "done" for _, state in states)
        bad = sum(lost and state != "done" for lost, state in states)
        told = bad or sum(state == "failed" for _, state in states)
        rows.append(Row(method, len(own), len(states), done, told, len(states) - done - bad))
    return sorted(rows, key=lambda row: method_order(row.method))


def _shared(context: Context, tasks: Sequence[Task], blocks: int) -> list[Part]:
    """What is made once a run or once a seed, and how many of it are there."""
    study, shared = context.study, context.shared
    parts = [Part("data", 1, int((shared / DATA / DATA_MANIFEST).is_file()))]
    if study.protocol.sampled:
        parts.append(Part("negatives", 1, int((shared / NEGATIVES).exists())))
    if study.item_table not in ("sasrec", LEARNED):
        parts.append(Part("item table", 1, int((shared / ITEM_TABLE).exists())))
    needed = {need for task in tasks for need in task.needs} | {task.id for task in tasks}
    for method in ("sasrec", "full"):
        own = [full_trial(method, seed, blocks) for seed in range(study.seeds)]
        if own[0].id in needed:
            done = sum(is_done(context.trial_folder(trial)) for trial in own)
            parts.append(Part(method, len(own), done))
    wanted = {name for task in tasks for name in effort.shared_of(study, task)}
    there = _made(context, blocks)
    for kind in ("features", "removal"):
        own_kind = {name for name in wanted if name.startswith(kind)}
        if own_kind:
            parts.append(Part(kind, len(own_kind), len(own_kind & there)))
    return [*parts, Part("times", 1, int((shared / TIMING).exists()))]


def _made(context: Context, blocks: int) -> set[str]:
    """Features and greedy removals in the folder, of teachers that are there, too."""
    found = set()
    for seed in range(context.study.seeds):
        if not is_done(context.trial_folder(full_trial("full", seed, blocks))):
            continue
        for objective in ("every", "last"):
            if any(context.shared.glob(f"{FEATURES}-s{seed}-{objective}-*")):
                found.add(effort.features_id(seed, objective))
        if any(context.shared.glob(f"greedy-s{seed}-*.json")):
            found.add(effort.removal_id(seed))
    return found
