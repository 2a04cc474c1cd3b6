"""A sweep's progress: a live bar on a terminal, time-stamped lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from depthprobe.runs.progress import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bar
    from rich.table import Table


class Lines:
    """One line an event, flushed at once, so that a log file can be followed."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.total, self.ended = stream, 0, 0

    def plan(self, trials: Sequence[str]) -> None:
        """Say how many trials there are."""
        self.total = len(trials)
        self._print(count(trials))

    def message(self, text: str) -> None:
        """Say what is being done."""
        self._print(text)

    def done(self, trial: str, status: str, seconds: float, note: str) -> None:
        """Say how a trial ended."""
        self.ended += 1
        self._print(f"[{self.ended}/{self.total}] {outcome(trial, status, seconds, note)}")

    def _print(self, text: str) -> None:
        print(f"{datetime.now():%H:%M:%S} {text}", file=self.stream, flush=True)


class Live:
    """A bar over the trials with what is being done beside it; ended trials scroll above."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar
        self.task = bar.add_task("loading", total=None)

    def plan(self, trials: Sequence[str]) -> None:
        """Set the length of the bar."""
        self.bar.update(self.task, total=len(trials), completed=0)
        self._print(count(trials))

    def message(self, text: str) -> None:
        """Write beside the bar what is being done."""
        self.bar.update(self.task, description=" ".join(text.split()))

    def done(self, trial: str, status: str, seconds: float, note: str) -> None:
        """Move the bar, and leave a line."""
        self.bar.advance(self.task)
        style = "red" if status == "failed" else None
        self._print(outcome(trial, status, seconds, note), style=style)

    def _print(self, text: str, *, style: str | None = None) -> None:
        # a trial's name or an error may hold brackets, which rich would read as markup
        self.bar.console.print(text, style=style, markup=False, highlight=False)


def count(trials: Sequence[str]) -> str:
    """The plan in one line."""
    return f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'} to run"


def outcome(trial: str, status: str, seconds: float, note: str) -> str:
    """A trial's end in one line."""
    line = f"{trial}  {status}  {seconds:.1f} s"
    return f"{line}  {' '.join(note.split())}" if note else line


def at_work(folder: Path) -> Table:
    """What is worked on in a run right now, here or elsewhere: a line a task."""
    from rich.table import Table
    from rich.text import Text

    # by now the sweep itself has imported this, and torch
    from depthprobe.runs.status import working

    table = Table.grid(padding=(0, 2))
    for each in working(folder):
        table.add_row(Text(f"  {each.task}"), Text(each.line, overflow="ellipsis", no_wrap=True))
    return table


@contextmanager
def watch(stream: TextIO, folder: Path | None = None) -> Iterator[Progress]:
    """Progress written to ``stream`` for as long as the block runs.

    On a terminal also what is worked on in the run's ``folder``, step by step.
    """
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield Lines(stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    class WithWork(Bar):
        """A bar, and below it what is worked on."""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            if folder is not None and any(task.total for task in self.tasks):
                yield at_work(folder)

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(file=stream)
    with WithWork(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        yield Live(bar)
