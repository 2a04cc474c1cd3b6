"""Trackers of a training: TensorBoard, Weights & Biases, MLflow and whatever accelerate knows.

A tracker that fails is left out with a warning, and the training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from depthprobe.errors import BadInput, nearest

logger = logging.getLogger(__name__)

# takes a step and its values by name; called only in the first process
Track = Callable[[int, Mapping[str, float]], None]

# the trackers' options for the name of a run within its project
RUN = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "clearml": "task_name"}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not know, or whose package is not installed."""
    built_in = {str(kind) for kind in LoggerType}
    available = {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise BadInput("tracking.to", name, nearest(name, sorted(LOGGER_TYPE_TO_CLASS)))
        # a tracker registered as a class needs no package
        if name in built_in and name not in available:
            raise BadInput("tracking.to", name, "a tracker whose package is installed")


@contextmanager
def tracked(
    names: Sequence[str], *, folder: Path, project: str, run: str, settings: Mapping[str, str | int]
) -> Iterator[Track]:
    """The function that sends a training's values to the trackers; they start with the first value.

    ``project`` is what the runs of a study have in common, ``settings`` is recorded once.
    """
    working, started = list(names), dict[str, GeneralTracker]()

    def each(action: Callable[[str], None]) -> None:
        for name in list(working):
            try:
                action(name)
            except Exception as error:  # any error: a tracker must not lose a training
                working.remove(name)
                text = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("tracking by %s stopped: %s", name, text)

    def track(step: int, values: Mapping[str, float]) -> None:
        def log(name: str) -> None:
            if name not in started:
                started[name] = _start(name, folder, project, run)
                started[name].store_init_configuration(dict(settings))
            started[name].log(dict(values), step=step)

        each(log)

    try:
        yield track
    finally:
        working[:] = started  # also close failed trackers, or the next run would write into theirs
        each(lambda name: started[name].finish())


def _start(name: str, folder: Path, project: str, run: str) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:  # TensorBoard's runs are folders side by side
        folder.mkdir(parents=True, exist_ok=True)
        tracker = kind(run, str(folder))
    else:
        tracker = kind(project, **({RUN[name]: run} if name in RUN else {}))
    if hasattr(tracker, "start"):  # earlier versions of accelerate have already started it
        tracker.start()
    return tracker
