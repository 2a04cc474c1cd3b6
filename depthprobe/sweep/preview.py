"""What a sweep would do, found out as the sweep would find it out; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from depthprobe.cost.memory import free_memory
from depthprobe.data.splits import Split, make_split
from depthprobe.models.backbones import pretrained_config
from depthprobe.models.checkpoints import check_weights
from depthprobe.models.devices import resolve_device
from depthprobe.models.item_tables import TEXT, item_texts, make_table
from depthprobe.models.precision import check_attention, quantization
from depthprobe.models.revision import backbone_revision, pinned, pinned_now
from depthprobe.models.sources import EMBEDDED, folder_of, is_folder
from depthprobe.study import METHODS, Study, base_of
from depthprobe.sweep import provenance
from depthprobe.sweep.context import LEARNED, Context
from depthprobe.sweep.estimate import Crowd, Estimate, estimate_of, find_rates, shared_by
from depthprobe.sweep.forecast import Job, without_lost
from depthprobe.sweep.layout import (
    check_same_inputs,
    continued,
    manifest_before,
    new_manifest,
    new_slices,
    read_log,
)
from depthprobe.sweep.pieces import sizes_of
from depthprobe.sweep.plan import Task, plan
from depthprobe.sweep.rates import Found, workload_of
from depthprobe.sweep.records import is_done, is_failed
from depthprobe.sweep.runner import MOST_JOBS
from depthprobe.sweep.shared_parts import Part, made, shared_parts


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
    """Plan a sweep into a folder as :func:`depthprobe.sweep.runner.run_sweep` would.

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
    inputs = _read(study, folder, device)
    tasks, blocks, context = inputs.tasks, inputs.blocks, Context(folder, inputs.study)
    left = [task for task in tasks if not all(map(is_done, context.outputs(task)))]
    failed = set() if retry_failed else {task.id for task in left if _failed(context, task)}
    kept = without_lost([Job(task.id, 0.0, task.needs) for task in left], failed)
    doable = {job.id for job in kept}
    waiting = [task for task in left if task.id in doable]
    wanted = 1 if processes > 1 or (apart and jobs is None) else jobs
    workers = max(1, _workers(wanted, device, len(waiting)))
    threads = max(1, provenance.available_cores() // (1 if apart else workers))
    found = estimate = None
    if waiting:
        sizes, items = sizes_of(inputs.split, inputs.study), inputs.split.sequences.n_items
        workload = workload_of(inputs.study, inputs.config, sizes, items=items, width=inputs.width)
        found = find_rates(context, waiting, sizes, workload, threads=threads, say=say)
        crowd = Crowd(
            workers=workers,
            threads=threads,
            processes=processes,
            here=jobs == 0 or processes > 1,
            apart=apart,
        )
        estimate = estimate_of(context, waiting, sizes, found, crowd, there=made(context, blocks))
    return Preview(
        study=inputs.study,
        folder=folder,
        begun=inputs.begun,
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
        shared=shared_parts(context, tasks, blocks),
        lost=sum(len(context.outputs(task)) for task in left if task.id not in doable | failed),
        retry_failed=retry_failed,
        found=found,
        estimate=estimate,
        free=free_memory(device),
    )


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What a sweep reads before it writes anything."""

    study: Study  # with the methods that the run has, and the commit of its backbone
    begun: bool
    tasks: list[Task]
    split: Split
    config: PreTrainedConfig  # of the decoder
    blocks: int
    width: int | None  # of an item table that all trials share


def _read(study: Study, folder: Path, device: torch.device) -> _Inputs:
    """Read and check what :func:`depthprobe.sweep.runner.run_sweep` does, in its order."""
    asked, study = study, continued(folder, study)
    before = manifest_before(folder)
    recorded = None if before is None else before["backbone"]["revision"]
    study = replace(study, backbone=pinned_now(pinned(study.backbone, recorded)))
    config = pretrained_config(study.backbone).get_text_config(decoder=True)
    blocks = int(config.num_hidden_layers)
    tasks = plan(asked, blocks)
    split = make_split(read_log(study, folder), study.protocol)
    new_slices(study, split, before)
    table = _table(study, split, device)
    _check_backbone(study)
    if before is not None:
        manifest = new_manifest(study, split, table, device, None)
        if study.item_table == TEXT:  # it is made of the titles and the backbone
            manifest["item_table"] = before["item_table"]
        check_same_inputs(folder, before, manifest, backbone_revision(study.backbone))
    width = None if table is None else int(table.shape[1])
    return _Inputs(
        study=study,
        begun=before is not None,
        tasks=tasks,
        split=split,
        config=config,
        blocks=blocks,
        width=int(config.hidden_size) if study.item_table == TEXT else width,
    )


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


def _workers(asked: int | None, device: torch.device, tasks: int) -> int:
    """How many tasks the sweep would run at the same time."""
    if asked is not None:
        return min(asked, tasks)
    if device.type == "cpu":
        return min(provenance.available_cores(), MOST_JOBS, tasks)
    return min(max(1, torch.cuda.device_count()), tasks)


def _failed(context: Context, task: Task) -> bool:
    outputs = context.outputs(task)
    return any(map(is_failed, outputs)) and not all(map(is_done, outputs))


def _rows(context: Context, tasks: Sequence[Task], failed: set[str]) -> list[Row]:
    rows = []
    for method in dict.fromkeys(task.method for task in tasks):
        own = [task for task in tasks if task.method == method]
        outputs = [(task.id in failed, path) for task in own for path in context.outputs(task)]
        done = sum(is_done(path) for _, path in outputs)
        bad = sum(lost and not is_done(path) for lost, path in outputs)
        told = bad or sum(is_failed(path) for _, path in outputs)
        left = len(outputs) - done - bad
        rows.append(Row(method, len(own), len(outputs), done, told, left))
    return sorted(rows, key=lambda row: METHODS.index(base_of(row.method)))
