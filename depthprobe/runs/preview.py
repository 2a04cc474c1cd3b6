"""What a sweep would do, found out as the sweep would find it out; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from depthprobe.cost.memory import free_memory
from depthprobe.data.splits import Split
from depthprobe.methods import Task, method_order
from depthprobe.models.backbones import (
    EMBEDDED,
    backbone_revision,
    check_weights,
    folder_of,
    is_folder,
    resolve_device,
)
from depthprobe.models.item_tables import TEXT, item_texts, make_table
from depthprobe.models.precision import check_attention, quantization
from depthprobe.runs import provenance
from depthprobe.runs.context import LEARNED, Context
from depthprobe.runs.estimate import Crowd, Estimate, estimate_of, find_rates, shared_by
from depthprobe.runs.forecast import Job, without_lost
from depthprobe.runs.layout import Inputs, check_same_inputs, new_manifest, read_inputs
from depthprobe.runs.pieces import sizes_of
from depthprobe.runs.rates import Found, workload_of
from depthprobe.runs.records import state_of
from depthprobe.runs.shared_parts import Part, made, shared_parts
from depthprobe.runs.sweep import jobs_at_once
from depthprobe.study import Study


@dataclass(frozen=True)
class Row:
    """Tasks of a method, and their trials; a table that a task makes counts as one."""

    method: str
    tasks: int
    trials: int
    done: int
    failed: int
    left: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The plan of a sweep, what its folder holds of it, and what the rest is guessed to take.

    Attributes:
        begun: whether the folder is a run.
        lost: trials that will not be done, since something that they need has failed.
        estimate: None if nothing is left, or nothing could be told: ``found.why``.
        threads: of a worker, on a CPU.
        processes: that train together.
        apart: each job has a machine of its own.
        together: jobs that share one memory, the machine's or a GPU's.
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
    rows: list[Row]
    shared: list[Part]
    lost: int
    retry_failed: bool
    found: Found | None
    estimate: Estimate | None
    free: int


def preview(
    study: Study,
    folder: Path,
    *,
    jobs: int | None = None,
    retry_failed: bool = False,
    processes: int = 1,
    apart: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Preview:
    """Plan a sweep into a folder as :func:`depthprobe.runs.sweep.run_sweep` would.

    Weights are not loaded: that some are missing shows when the sweep begins. What is not on this
    machine of a public log or a Hugging Face id's configuration is fetched into its cache.

    Args:
        processes: that train together, under a launcher.
        apart: the jobs, by default one, run on machines of their own that are like this one.
        say: is told before something that takes a while.

    Raises:
        BadInput: where the sweep would refuse to begin.
    """
    device = resolve_device(study.device)
    inputs = read_inputs(study, folder)
    width = _check(inputs, folder, device)
    tasks, blocks, context = inputs.tasks, inputs.blocks, Context(folder, inputs.working)
    states = {task.id: state_of(context.outputs(task)) for task in tasks}
    left = [task for task in tasks if states[task.id] != "done"]
    failed = {name for name, state in states.items() if state == "failed" and not retry_failed}
    there = made(context, blocks)
    kept = without_lost([Job(task.id, 0.0, task.needs) for task in left], failed)
    doable = {job.id for job in kept}
    waiting = [task for task in left if task.id in doable]
    wanted = 1 if processes > 1 or (apart and jobs is None) else jobs
    workers = max(1, jobs_at_once(wanted, device, len(waiting)))
    threads = max(1, provenance.available_cores() // (1 if apart else workers))
    found = estimate = None
    if waiting:
        sizes, items = sizes_of(inputs.split, context.study), inputs.split.sequences.n_items
        workload = workload_of(context.study, inputs.config, sizes, items=items, width=width)
        found = find_rates(context, waiting, sizes, workload, threads=threads, say=say)
        crowd = Crowd(
            workers=workers,
            threads=threads,
            processes=processes,
            here=jobs == 0 or processes > 1,
            apart=apart,
        )
        estimate = estimate_of(context, waiting, sizes, found, crowd, there=there)
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
        together=1 if apart else shared_by(device, workers),
        rows=_rows(context, tasks, failed),
        shared=shared_parts(context, tasks, blocks, there=there),
        lost=sum(len(context.outputs(task)) for task in left if task.id not in doable | failed),
        retry_failed=retry_failed,
        found=found,
        estimate=estimate,
        free=free_memory(device),
    )


def _check(inputs: Inputs, folder: Path, device: torch.device) -> int | None:
    """Refuse what the sweep would; returns the width of an item table that all trials share."""
    study, before = inputs.working, inputs.before
    table = _table(study, inputs.split, device)
    _check_backbone(study)
    if before is not None:
        manifest = new_manifest(study, inputs.split, table, before.backbone, device, None)
        if study.item_table == TEXT:  # it is made of the titles and the backbone
            manifest.item_table = before.item_table
        check_same_inputs(folder, before, manifest, backbone_revision(study.backbone))
    if study.item_table == TEXT:
        return int(inputs.config.hidden_size)
    return None if table is None else int(table.shape[1])


def _check_backbone(study: Study) -> None:
    """What can be refused of a backbone without loading it."""
    check_attention(study.backbone.attention)
    quantization(study.backbone.quantize)
    source = study.backbone.source
    if source != EMBEDDED and is_folder(source):
        check_weights(folder_of(source))


def _table(study: Study, split: Split, device: torch.device) -> Tensor | None:
    """The item table of a file, read and checked; one of titles is not made here."""
    if study.item_table in ("sasrec", LEARNED):
        return None
    ids, titles = split.sequences.item_ids.tolist(), split.sequences.titles
    if study.item_table == TEXT:
        item_texts(ids, titles)
        return None
    return make_table(study.item_table, study.backbone, ids, titles, device=device)


def _rows(context: Context, tasks: Sequence[Task], failed: set[str]) -> list[Row]:
    rows = []
    for method in dict.fromkeys(task.method for task in tasks):
        own = [task for task in tasks if task.method == method]
        found = [
            (task.id in failed, state_of([path])) for task in own for path in context.outputs(task)
        ]
        done = sum(state == "done" for _, state in found)
        bad = sum(lost and state != "done" for lost, state in found)
        told = bad or sum(state == "failed" for _, state in found)
        rows.append(Row(method, len(own), len(found), done, told, len(found) - done - bad))
    return sorted(rows, key=lambda row: method_order(row.method))
