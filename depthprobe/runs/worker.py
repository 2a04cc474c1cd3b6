"""Inside a worker process: a task becomes records."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from transformers.utils.logging import disable_progress_bar

from depthprobe.methods import Task, method_of
from depthprobe.runs.context import LOGS, TIMING, Context
from depthprobe.runs.estimate import timing_of
from depthprobe.runs.records import Provenance, Scores, is_done, write_result, write_scores
from depthprobe.study import Study

logger = logging.getLogger(__name__)


def _forget(checkpoint: Path) -> None:
    """Delete the checkpoint of a trial that has its record; the last one takes the folder along."""
    checkpoint.unlink(missing_ok=True)
    with suppress(OSError):
        checkpoint.parent.rmdir()


class Counter(Protocol):
    """A number that processes share."""

    value: int

    def get_lock(self) -> AbstractContextManager[Any]:
        """Alone with the number."""


class _Worker:
    """What one process keeps between its tasks."""

    context: Context
    provenance: Provenance
    writes: bool


def prepare(started: Counter, folder: str, study: Study, origin: Provenance) -> None:
    """Make a process of its own ready: quiet, bound to its parent, with its share of the machine.

    Args:
        started: how many workers have begun before; the next one takes the next GPU.
        origin: the provenance of its records.
    """
    with started.get_lock():
        _take_gpu(started.value)
        started.value += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # what is said between two tasks, none should hear: the terminal belongs to the progress
    sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(origin.threads)
    disable_progress_bar()
    begin(folder, study, origin)


def _take_gpu(place: int) -> None:
    """Of several GPUs one a worker, before anything of CUDA's begins."""
    if torch.cuda.device_count() > 1:  # asks the driver, and begins nothing
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        every = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = every[place % len(every)]


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on, unseen, beside the next sweep."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def begin(
    folder: str,
    study: Study,
    origin: Provenance,
    *,
    writes: bool = True,
) -> None:
    """Make this process ready for tasks of a run.

    Args:
        origin: the provenance of its records.
        writes: whether it writes them; of several processes that train together one does.
    """
    _Worker.writes = writes
    _Worker.context = Context(Path(folder), study)
    _Worker.provenance = origin


@contextmanager
def _logged_to(file: TextIO) -> Iterator[None]:
    """The package's log lines go to the file, from the one process that writes."""
    package = logging.getLogger("depthprobe")
    handler = logging.StreamHandler(file) if _Worker.writes else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def work(task: Task) -> float:
    """Do a task and write its records; returns its seconds. The task's log is a file of its own.

    In a process of its own, warnings and whatever else is printed go there, too.
    """
    log = _Worker.context.folder / LOGS / f"{task.id}.log"
    log.parent.mkdir(exist_ok=True)
    with (
        log.open("a", buffering=1, encoding="utf-8") as file,
        _logged_to(file),
        ExitStack() as stack,
    ):
        if multiprocessing.parent_process() is not None:
            stack.enter_context(redirect_stdout(file))
            stack.enter_context(redirect_stderr(file))
        logger.info("begun by process %d on %s", os.getpid(), platform.node())
        try:
            seconds = _work(task)
        except Exception:
            traceback.print_exc(file=file)
            raise
        logger.info("done in %.1f s", seconds)
        return seconds


def _work(task: Task) -> float:
    context = _Worker.context
    began = time.perf_counter()
    measured = json.loads((context.shared / TIMING).read_text(encoding="utf-8"))
    for result in method_of(task.method).runner()(context, task):
        if not _Worker.writes:
            continue
        if isinstance(result, Scores):
            (folder,) = context.outputs(task)
            seconds = time.perf_counter() - began
            write_scores(folder, task, result, provenance=_Worker.provenance, seconds=seconds)
            continue
        folder = context.trial_folder(result.trial)
        if is_done(folder):  # of a task that was cut short between two of its trials
            continue
        write_result(
            folder,
            result,
            context.test.users,
            popularity=context.taken,
            timing=timing_of(result.trial, measured, context.study),
            provenance=_Worker.provenance,
            validation_users=len(context.validation.users),
        )
        _forget(context.checkpoint(result.trial))
    return time.perf_counter() - began
