"""What a sweep would do, read and checked as the sweep does; nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from depthprobe.cost.flops import UncountableError, product_counter, score_flops
from depthprobe.cost.size import count_bytes, free_memory
from depthprobe.cost.table import random_backbone
from depthprobe.cost.timing import machine
from depthprobe.data.storage import MANIFEST as DATA_MANIFEST
from depthprobe.methods import Task, method_of, method_order
from depthprobe.models import backbones
from depthprobe.models.build import around
from depthprobe.models.item_tables import TEXT, item_texts, make_table
from depthprobe.models.recommender import Recommender
from depthprobe.runs import estimate as effort
from depthprobe.runs.context import LEARNED, Context
from depthprobe.runs.estimate import Job
from depthprobe.runs.layout import (
    Inputs,
    available_cores,
    check_same_inputs,
    new_manifest,
    read_inputs,
)
from depthprobe.runs.plan import full_trial
from depthprobe.runs.records import DATA, ITEM_TABLE, NEGATIVES, TIMING, is_done, state_of
from depthprobe.runs.sweep import jobs_at_once
from depthprobe.runs.training import FEATURES
from depthprobe.study import Study

SECONDS = 4.0  # to measure for, where the run has no times yet
START = 4.0  # seconds until a worker has loaded its libraries and the log; on two Xeon cores
Span = tuple[float, float]  # seconds between two ends; a single guess has both ends alike


class Row(NamedTuple):
    """Tasks of a method, and their trials; a table that a task makes counts as one."""

    method: str
    tasks: int
    trials: int
    done: int
    failed: int
    left: int


class Part(NamedTuple):
    """What trials share: how many of it the study needs, how many are there."""

    name: str
    needed: int
    there: int


class Estimate(NamedTuple):
    """What is left is guessed to take."""

    timed: bool  # by the times of the run; else by a short measurement
    busy: float  # processes that wanted a core while that was made, by core
    span: Span  # of all, on so many workers
    work: Span  # of all jobs one after the other
    chain: tuple[Job, ...]  # that must follow each other and take longest
    by_method: dict[str, Span]
    memory: float | None  # bytes of a process that trains all blocks, at its peak
    fewer: bool  # that was measured with smaller batches than the study's


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The plan of a sweep, what its folder holds of it, and the estimate of the rest.

    Attributes:
        workers: jobs at a time.
        threads: of a worker, on a CPU.
        processes: that train together.
        apart: each job has a machine of its own.
        together: jobs that share one memory, the machine's or a GPU's.
        lost: trials that will not be done, since something that they need has failed.
        waiting: tasks that will be done.
        free: bytes of memory that may be had.
        estimate: None if nothing is left, or nothing could be measured: ``why``.
    """

    inputs: Inputs
    folder: Path
    device: torch.device
    workers: int
    threads: int
    processes: int
    apart: bool
    together: int
    retry_failed: bool
    rows: list[Row]
    shared: list[Part]
    lost: int
    waiting: list[Task]
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
    tasks, context = inputs.tasks, _context(folder, inputs.working, inputs)
    states = {task.id: state_of(context.outputs(task)) for task in tasks}
    left = [task for task in tasks if states[task.id] != "done"]
    failed = {name for name, state in states.items() if state == "failed" and not retry_failed}
    waiting = effort.without_lost(left, failed)
    doable = {task.id for task in waiting}
    wanted = 1 if processes > 1 or (apart and jobs is None) else jobs
    workers = max(1, jobs_at_once(wanted, device, len(waiting)))
    plan = Preview(
        inputs=inputs,
        folder=folder,
        device=device,
        workers=workers,
        threads=max(1, available_cores() // (1 if apart else workers)),
        processes=processes,
        apart=apart,
        # of several GPUs each has its share of the workers
        together=1 if apart else -(-workers // max(1, torch.cuda.device_count())),
        retry_failed=retry_failed,
        rows=_rows(context, tasks, failed),
        shared=_shared(context, tasks, inputs.blocks),
        lost=sum(len(context.outputs(task)) for task in left if task.id not in doable | failed),
        waiting=waiting,
        free=free_memory(device),
    )
    if not waiting:
        return plan
    start = 0.0 if jobs == 0 or processes > 1 else START
    try:
        return replace(plan, estimate=_estimate(plan, context, width, start))
    except (ValueError, RuntimeError) as error:  # the plan can be told all the same
        return replace(plan, why=str(error).partition("\n")[0])


def _context(folder: Path, study: Study, inputs: Inputs) -> Context:
    """A context that has its log without the run's folder."""
    context = Context(folder, study)
    vars(context).update(split=inputs.split, sequences=inputs.split.sequences)
    return context


def _estimate(plan: Preview, context: Context, width: int | None, start: float) -> Estimate:
    """What the waiting tasks take, by the times of the run, else by a short measurement."""
    study, device, blocks = context.study, context.device, plan.inputs.blocks
    measured, timed = _measured(context, blocks)
    sizes, train_length, test_length = effort.sizes_of(plan.inputs.split, study)
    trained = any(method_of(task.method).role != "baseline" for task in plan.waiting)
    compute = study.budget == "compute" and trained
    model = _shape(context, width) if trained and (compute or not timed) else None
    flops = {}
    if compute and model is not None:
        flops = _window_flops(model, round(train_length), study.recipe.objective)
    busy, alone = 0.0, 0.0
    if not timed:
        busy = float(machine(device)["busy"])
        if model is not None:
            held = sum(count_bytes(model)[part] for part in ("total", "optimizer"))
            if held > plan.free:
                have = f"{plan.free / 1e9:.1f} GB may be had"
                raise ValueError(f"a training takes more than {held / 1e9:.1f} GB, {have}")
        asked = tuple(dict.fromkeys(task.method for task in plan.waiting))
        few = _context(plan.folder, replace(study, methods=asked), plan.inputs)
        with _threads(plan.threads if device.type == "cpu" else None):
            measured = effort.measure(few, blocks, seconds=SECONDS, width=width, all_depths=False)
        # the sweep begins with a longer one
        a_round = sum(float(np.median(values)) for values in measured["seconds"].values())
        rounds = study.cost.warmup + study.cost.rounds
        alone = max(a_round, min(study.cost.seconds, rounds * a_round))
    units = effort.units_of(measured, flops, train_length=train_length, test_length=test_length)
    there = _made(context, blocks)
    jobs = effort.jobs_of(study, plan.waiting, sizes, units, there=there, processes=plan.processes)
    if not math.isfinite(sum(job.seconds for job in jobs)):
        raise ValueError("a step takes too long to be timed")
    times = float(plan.together)  # as long, at most, beside others
    if device.type == "cpu":  # by the threads that they lose, as if all had been of use
        times = 1.0 if plan.apart else max(1.0, measured["conditions"]["threads"] / plan.threads)
    slow = [replace(job, seconds=times * job.seconds) for job in jobs]

    def both(seconds: Callable[[Sequence[Job]], float]) -> Span:
        return seconds(jobs), seconds(slow)

    def of(method: str) -> Span:
        return both(lambda each: sum(job.seconds for job in each if job.method == method))

    return Estimate(
        timed=timed,
        busy=busy,
        span=both(lambda each: alone + effort.schedule(each, plan.workers, start=start)),
        work=both(lambda each: sum(job.seconds for job in each)),
        chain=effort.longest_chain(slow),
        by_method={method: of(method) for method in dict.fromkeys(job.method for job in jobs)},
        memory=measured.get("peak_bytes") if trained else None,
        fewer=measured["conditions"]["train_batch"] < min(study.recipe.batch_size, sizes.windows),
    )


def _measured(context: Context, blocks: int) -> tuple[dict[str, Any], bool]:
    """The times of the run, and whether they are there and hold for this study and device."""
    path = context.shared / TIMING
    if not path.exists():
        return {}, False
    measured = json.loads(path.read_text(encoding="utf-8"))
    same = measured["conditions"]["device"] == context.device.type
    return measured, same and effort.covers(measured, context, blocks)


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


def _window_flops(model: Recommender, length: int, objective: str) -> dict[int, float]:
    """FLOPs of a window and its scores by depth; none where the model can't be counted."""
    try:
        products = product_counter(model)(length)
    except UncountableError:
        return {}
    scores = score_flops(model, 1 if objective == "last" else length)
    return {depth: products.total(depth) + scores for depth in range(1, model.depth + 1)}


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
    backbones.check_attention(study.backbone.attention)
    backbones.quantization(study.backbone.quantize)
    backbones.check_weights(study.backbone.source)
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
                found.add(f"features-s{seed}-{objective}")
        if any(context.shared.glob(f"greedy-s{seed}-*.json")):
            found.add(f"removal-s{seed}")
    return found
