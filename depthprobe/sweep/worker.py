"""Inside a worker process: a task becomes records."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from depthprobe.study import Study, base_of
from depthprobe.sweep.context import TIMING, Context
from depthprobe.sweep.methods import METHODS
from depthprobe.sweep.plan import Task
from depthprobe.sweep.records import write_result, write_scores
from depthprobe.sweep.results import Scores
from depthprobe.sweep.timing import timing_of


def _forget(checkpoint: Path) -> None:
    """Delete the checkpoint of a trial that has its record; the last one takes the folder along."""
    checkpoint.unlink(missing_ok=True)
    with suppress(OSError):
        checkpoint.parent.rmdir()


class _Worker:
    """What one process keeps between its tasks."""

    context: Context
    provenance: dict[str, Any]
    writes: bool


def prepare(folder: str, study: Study, origin: dict[str, Any], threads: int) -> None:
    """Make a process of its own ready: quiet, bound to its parent, with so many threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # a worker's own words go to a file: the terminal belongs to the progress
    log = Path(folder, "logs", f"worker-{os.getpid()}.log")
    log.parent.mkdir(exist_ok=True)
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    torch.set_num_threads(threads)
    disable_progress_bar()
    begin(folder, study, origin, log=lambda line: print(line, flush=True))


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on, unseen, beside the next sweep."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def begin(
    folder: str,
    study: Study,
    origin: dict[str, Any],
    *,
    log: Callable[[str], None] = lambda line: None,
    writes: bool = True,
) -> None:
    """Make this process ready for tasks of a run.

    Args:
        origin: the provenance of its records.
        writes: whether it writes them; of several processes that train together one does.
    """
    _Worker.writes = writes
    _Worker.context = Context(Path(folder), study, log=log)
    _Worker.provenance = origin


def work(task: Task) -> float:
    """Do a task and write its records; returns its seconds."""
    context = _Worker.context
    context.log(f"== {task.id}")
    began = time.perf_counter()
    measured = json.loads((context.shared / TIMING).read_text(encoding="utf-8"))
    for result in METHODS[base_of(task.method)](context, task):
        if not _Worker.writes:
            continue
        if isinstance(result, Scores):
            (folder,) = context.outputs(task)
            seconds = time.perf_counter() - began
            write_scores(folder, task, result, provenance=_Worker.provenance, seconds=seconds)
            continue
        write_result(
            context.trial_folder(result.trial),
            result,
            context.test.users,
            taken=context.taken,
            timing=timing_of(result.trial, measured, context.study),
            provenance=_Worker.provenance,
            validation_users=len(context.validation.users),
        )
        _forget(context.checkpoint(result.trial))
    return time.perf_counter() - began
