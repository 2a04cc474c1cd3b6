"""A sweep's progress: a live bar on a terminal, time-stamped lines elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bar

SHOWN = "depthprobe.cost.timing"  # whose log lines are messages, too


class Display(logging.Handler):
    """Shows the events of a sweep: a :class:`depthprobe.runs.scheduler.Progress`.

    Without a bar each event is a line, flushed at once, so that a log file can be followed.
    """

    def __init__(self, stream: TextIO, bar: Bar | None = None) -> None:
        super().__init__(logging.INFO)
        self.stream, self.bar, self.total, self.ended = stream, bar, 0, 0
        if bar is not None:
            self.task = bar.add_task("loading", total=None)

    def plan(self, trials: Sequence[str]) -> None:
        """The trials that will run now."""
        self.total = len(trials)
        if self.bar is not None:
            self.bar.update(self.task, total=self.total, completed=0)
        self._print(f"{self.total} {'trial' if self.total == 1 else 'trials'} to run")

    def message(self, text: str) -> None:
        """What is being done right now: beside the bar, or a line."""
        if self.bar is not None:
            self.bar.update(self.task, description=" ".join(text.split()))
        else:
            self._print(text)

    def emit(self, record: logging.LogRecord) -> None:
        """A log line."""
        self.message(record.getMessage())

    def done(self, trial: str, status: str, seconds: float, note: str) -> None:
        """A trial ended."""
        self.ended += 1
        line = "  ".join(filter(None, (trial, status, f"{seconds:.1f} s", " ".join(note.split()))))
        if self.bar is not None:
            self.bar.advance(self.task)
            self._print(line, style="red" if status == "failed" else None)
        else:
            self._print(f"[{self.ended}/{self.total}] {line}")

    def _print(self, text: str, *, style: str | None = None) -> None:
        if self.bar is None:
            print(f"{datetime.now():%H:%M:%S} {text}", file=self.stream, flush=True)
        else:  # a trial's name or an error may hold brackets, which rich would read as markup
            self.bar.console.print(text, style=style, markup=False, highlight=False)


@contextmanager
def show_progress(stream: TextIO, folder: Path | None = None) -> Iterator[Display]:
    """Progress on ``stream`` for as long as the block runs.

    On a terminal also what is worked on in the run's ``folder``, step by step.
    """
    live = stream.isatty() and os.environ.get("TERM") != "dumb"
    logger = logging.getLogger(SHOWN)
    level = logger.level
    with _bar(stream, folder) if live else nullcontext() as bar:
        display = Display(stream, bar)
        logger.addHandler(display)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # the terminal would show the same line twice
        try:
            yield display
        finally:
            logger.propagate = True
            logger.removeHandler(display)
            logger.setLevel(level)


def _bar(stream: TextIO, folder: Path | None) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Table
    from rich.text import Text

    class BarWithTasks(Bar):
        """A bar, and below it what is worked on."""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            if folder is None or not any(task.total for task in self.tasks):
                return
            from depthprobe.runs.store import working  # by now the sweep has imported torch

            table = Table.grid(padding=(0, 2))
            for each in working(folder):
                line = Text(each.line, overflow="ellipsis", no_wrap=True)
                table.add_row(Text(f"  {each.task}"), line)
            yield table

    columns = (
        *(BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(file=stream)
    return BarWithTasks(*columns, console=console, transient=True, refresh_per_second=2)
