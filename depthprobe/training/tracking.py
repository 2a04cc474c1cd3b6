"""Trainings told to accelerate's trackers: TensorBoard, Weights & Biases, MLflow and the like.

A tracker is a guest: one that fails is left out, with a line in the log, and the training goes on.
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

# is told a training's step, and by name what was measured there; in the first process alone
Track = Callable[[int, Mapping[str, float]], None]

# what a tracker calls the name of a run inside its project, where runs have names
RUN = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}


def nobody(step: int, values: Mapping[str, float]) -> None:
    """Tell nobody."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not know, or whose package is not installed.

    Raises:
        BadInput: for the first of them.
    """
    built_in = {str(kind) for kind in LoggerType}
    available = {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise BadInput("tracking.to", name, nearest(name, sorted(LOGGER_TYPE_TO_CLASS)))
        # one that was registered as a class needs no package to be found
        if name in built_in and name not in available:
            raise BadInput("tracking.to", name, "a tracker whose package is installed")


@contextmanager
def tracked(
    names: Sequence[str],
    *,
    folder: Path,
    project: str,
    run: str,
    settings: Mapping[str, str | int],
) -> Iterator[Track]:
    """What a training inside tells its numbers to.

    Args:
        names: of the trackers; they begin when they are first told something.
        folder: where those that write files write them.
        project: what the runs of a study have in common.
        run: the name of this one.
        settings: what is recorded of it, once.
    """
    if not names:
        yield nobody
        return
    guests = _Guests(names, lambda name: _start(name, folder, project, run), settings)
    try:
        yield guests.tell
    finally:
        guests.leave()


class _Guests:
    """Trackers of a training, each until it fails."""

    def __init__(
        self,
        names: Sequence[str],
        start: Callable[[str], GeneralTracker],
        settings: Mapping[str, str | int],
    ) -> None:
        self._names, self._start, self._settings = list(names), start, settings
        self._trackers: dict[str, GeneralTracker] = {}

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        """Hand values on."""
        # not before: accelerate's state, which trackers read, begins with the training
        self._each(lambda name: self._tracker(name).log(dict(values), step=step))

    def leave(self) -> None:
        """End those that have begun, also one that failed: the next run would else be in its."""
        self._names = list(self._trackers)
        self._each(lambda name: self._trackers[name].finish())

    def _tracker(self, name: str) -> GeneralTracker:
        if name not in self._trackers:
            self._trackers[name] = self._start(name)
            self._trackers[name].store_init_configuration(dict(self._settings))
        return self._trackers[name]

    def _each(self, action: Callable[[str], None]) -> None:
        for name in list(self._names):
            try:
                action(name)
            except Exception as error:  # whatever it was: no reason to lose a training
                self._names.remove(name)
                text = " ".join(str(error).split())
                logger.warning(
                    "not tracked by %s any more: %s: %s", name, type(error).__name__, text
                )


def _start(name: str, folder: Path, project: str, run: str) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    named = {RUN[name]: run} if name in RUN else {}
    if name == "dvclive":  # knows neither projects nor runs: a folder each
        tracker = kind(dir=str(folder / run))
    elif kind.requires_logging_directory:  # runs are folders there, side by side
        folder.mkdir(parents=True, exist_ok=True)
        tracker = kind(run, str(folder))
    else:
        tracker = kind(project, **named)
    if hasattr(tracker, "start"):  # earlier versions of accelerate have begun by now
        tracker.start()
    return tracker
