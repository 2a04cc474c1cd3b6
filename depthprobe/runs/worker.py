"""Inside a worker process: run a task, and write its records."""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np
import pandas as pd
import torch
from transformers.utils.logging import disable_progress_bar

from depthprobe.cost.size import bytes_of, release_memory, served_bytes
from depthprobe.evaluation.metrics import LISTS, exposure, list_metrics, metrics_from_ranks
from depthprobe.methods import METHODS, Method, Task, method_of, register
from depthprobe.models.build import save_trained
from depthprobe.models.recommender import Recommender
from depthprobe.probing.replace import save_replacement
from depthprobe.runs.context import Context, Result, Scores
from depthprobe.runs.processes import ProcessGroup
from depthprobe.runs.records import (
    FULL,
    LOGS,
    PROBES,
    TIMING,
    Costs,
    Provenance,
    Rounds,
    TrainingCosts,
    Validation,
    is_done,
    record_of,
    write_scores,
    write_trial,
)
from depthprobe.runs.scheduler import Outcome, describe
from depthprobe.runs.timing import read_timing, timing_of
from depthprobe.study import Study, settings_of
from depthprobe.training.loop import DivergedError

logger = logging.getLogger(__name__)


class _Worker:
    """What one process keeps between its tasks."""

    context: Context
    provenance: Provenance
    group: ProcessGroup


def prepare(
    started: Any, folder: Path, study: Study, provenance: Provenance, others: Sequence[Method]
) -> None:
    """Prepare a worker process: quiet, bound to its parent, with its share of the machine.

    Args:
        started: how many workers started before; each takes the next GPU.
        others: methods that were registered in the parent.
    """
    with started.get_lock():
        place, started.value = started.value, started.value + 1
    count = torch.cuda.device_count()  # asks the driver without initialising CUDA
    if count > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        every = named.split(",") if named else [str(n) for n in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = every[place % len(every)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # discard output between tasks: the terminal belongs to the progress bar
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(provenance.threads)
    disable_progress_bar()
    for method in others:
        if method.name not in METHODS:  # unless importing its module has registered it here
            register(method)
    begin(folder, study, provenance)


def _end_with_parent() -> None:
    """End with the parent: otherwise a worker trains on, unseen, after its parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def begin(
    folder: Path, study: Study, provenance: Provenance, group: ProcessGroup | None = None
) -> None:
    """Prepare this process, or its group, for tasks of a run; the first of a group writes."""
    _Worker.context, _Worker.provenance = Context(folder, study), provenance
    _Worker.group = group or ProcessGroup()


def work(task: Task) -> Outcome:
    """Run a task and write its records; a fault ends only this task. Each task has a log file.

    In a worker process, warnings and all other output go there too.
    """
    context, group, began = _Worker.context, _Worker.group, time.perf_counter()
    log = context.folder / LOGS / f"{task.id}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a", buffering=1, encoding="utf-8") as file, _logged_to(file):
        logger.info("begun by process %d on %s", os.getpid(), platform.node())
        try:
            for result in method_of(task.method).runner()(context, task):
                if group.writes:
                    _write(task, result, time.perf_counter() - began)
        except Exception as error:  # any error: the other tasks go on
            traceback.print_exc(file=file)
            # all processes of a group see a training diverge; after any other error in one of
            # them, the others would wait for it for ever
            if group.processes > 1 and not isinstance(error, DivergedError):
                raise
            return Outcome(task, describe(error), 0.0)  # as text: not every error can be pickled
        seconds = time.perf_counter() - began
        release_memory()
        logger.info("done in %.1f s", seconds)
        return Outcome(task, None, seconds)


@contextmanager
def _logged_to(file: TextIO) -> Iterator[None]:
    """Send the package's log lines to the file, from the process that writes."""
    package = logging.getLogger("depthprobe")
    handler = logging.StreamHandler(file) if _Worker.group.writes else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    before = package.level, package.propagate
    package.setLevel(logging.INFO)
    package.propagate = False  # to the file only: the terminal belongs to the progress bar
    package.addHandler(handler)
    try:
        with ExitStack() as stack:
            if multiprocessing.parent_process() is not None:
                stack.enter_context(redirect_stdout(file))
                stack.enter_context(redirect_stderr(file))
            yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before[0])
        package.propagate = before[1]


def _served(result: Result) -> dict[str, int]:
    """Bytes of the weights that a trial serves, by part; empty if it has no weights of its own."""
    if result.bytes is not None:
        return result.bytes
    study, method = _Worker.context.study, method_of(result.trial.method)
    half = settings_of(study, result.trial.method).recipe.precision == "bfloat16"
    if result.model is not None:
        return served_bytes(result.model, bfloat16=half)
    manifest = _Worker.context.manifest
    if manifest is None or method.role == "baseline" or study.backbone.quantize != "none":
        return {}
    dtype = "float32" if method.items_only else manifest.backbone.dtype or "float32"
    return bytes_of(result.parameters, dtype, bfloat16=half)


def _write(task: Task, result: Result | Scores, seconds: float) -> None:
    """Write each result of a task, complete or not at all."""
    context, provenance = _Worker.context, _Worker.provenance
    if isinstance(result, Scores):
        folder = context.folder / PROBES / task.id
        write_scores(folder, task, result.frame, provenance=provenance, seconds=seconds)
        return
    trial, model, fit = result.trial, result.model, result.fit
    folder, popularity = context.trial_folder(trial), context.popularity
    if is_done(folder):  # the task was cut short between two of its trials
        return
    ranks = {name: values for name, values in result.ranks.items() if name != LISTS}
    metrics = {protocol: metrics_from_ranks(values) for protocol, values in ranks.items()}
    lists = result.ranks.get(LISTS, np.zeros((0, 0), np.int32))
    counts = exposure(lists, len(popularity.popularity))  # (I,)
    metrics[FULL] |= list_metrics(counts, popularity)
    timing = timing_of(trial, read_timing(context.shared / TIMING), context.study)
    costs = Costs(
        parameters=result.parameters,
        bytes=_served(result),
        flops_user=result.flops,
        prompt=model.prompt_mode if isinstance(model, Recommender) else None,
        timing=msgspec.convert(timing, dict[str, Rounds] | None),
    )
    record = record_of(trial, provenance, metrics={"test": metrics}, costs=costs)
    score = result.validation if fit is None else fit.best_score
    if score is not None:
        record.validation = Validation(ndcg=float(score), users=len(context.validation.users))
    if fit is not None:
        training = asdict(fit) | {
            "seconds": round(fit.seconds, 3),
            "teacher_seconds": round(result.teacher_seconds, 3),
            "flops": result.training_flops,
            "validation": fit.scores,
        }
        costs.training = msgspec.convert(training, TrainingCosts)

    def save(place: Path) -> None:
        if model is not None:
            save_trained(model, place)
        if result.replacement is not None:
            save_replacement(result.replacement, place)

    users = context.test.users.astype(np.int32)
    tables = [
        pd.DataFrame({"user": users, "protocol": protocol, "rank": values})
        for protocol, values in ranks.items()
    ]
    shown = np.flatnonzero(counts)
    items = {"item": (shown + 1).astype(np.int32), "lists": counts[shown].astype(np.int32)}
    every = pd.concat(tables, ignore_index=True)
    write_trial(folder, record, users=every, items=pd.DataFrame(items), save=save)
    checkpoint = context.checkpoint(trial)
    for file in checkpoint.parent.glob(f"{trial.id}.*"):  # one a learning rate
        file.unlink(missing_ok=True)
    with suppress(OSError):  # the last one removes the folder
        checkpoint.parent.rmdir()
