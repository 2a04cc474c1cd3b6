"""Output on the terminal: safe text, small tables and bars, a sweep's progress.

All commands print through this module, because text from a log, a run or an error may contain
control characters: they are shown and not sent to the terminal.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from depthprobe.errors import one_line, visible
from depthprobe.formatting import fixed, plural, rounded
from depthprobe.runs.processes import Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bar

PIPE_WIDTH = 200  # width without a terminal: wide enough to cut nothing
ROOM = 10_000  # a width that fits every table
WIDEST = 100  # width of running text
SHOWN = "depthprobe.cost.timing"  # its log lines are also messages
SILENCE = 10.0  # after this many silent seconds, print what is being worked on


def open_streams() -> None:
    """Make the standard streams accept any text; a closed one discards it.

    Otherwise the next file to be opened would get its number, and the messages of libraries.
    Characters outside the encoding are escaped.
    """
    for name in ("stdin", "stdout", "stderr"):  # in this order, as each gets the lowest free number
        stream = getattr(sys, name)
        if stream is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8"))
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Flush the standard streams; if that fails, discard the rest without a message from Python."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has gone, or the disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def echo(text: object, stream: TextIO | None = None) -> None:
    """Print lines of text, and flush."""
    print(visible(str(text), keep="\n"), file=stream, flush=True)


class VisibleLines(logging.Formatter):
    """Formats log lines, which may quote unsafe text."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return visible(super().format(record), keep="\n")


def show_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    words: Collection[str] = (),
    title: str | None = None,
) -> None:
    """Print rows to standard output; the columns named in ``words`` are left-aligned.

    On a narrow terminal columns move closer, and texts and headers wrap.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    body = [[visible(cell(value)) for value in row] for row in rows]

    def draw(*, narrow: bool) -> Table:
        heading = Text(visible(title)) if title else None
        table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        table.collapse_padding, table.pad_edge = narrow, not narrow
        for name, *cells in zip(header, *body, strict=True):
            if name in words:
                longest = max(map(cell_len, " ".join([name, *cells]).split()), default=0)
                table.add_column(Text(name), min_width=longest)
            else:
                head = "\n".join(name.replace("_", " ").split()) if narrow else name
                table.add_column(Text(head), justify="right", no_wrap=True)
        for row in body:
            table.add_row(*map(Text, row))
        return table

    screen = console()
    table = draw(narrow=False)
    if Measurement.get(screen, screen.options.update(max_width=ROOM), table).maximum > screen.width:
        table = draw(narrow=True)
    print()
    screen.print(table, crop=False)


def show_facts(rows: dict[str, str]) -> None:
    """Print names and values, one pair per line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
    table.add_column(min_width=12, no_wrap=True)
    for key, value in rows.items():
        table.add_row(key, Text(visible(value)))
    print()
    console().print(table, width=min(console().width, WIDEST))


def say(text: str) -> None:
    """Print a sentence, wrapped to the terminal."""
    shown = visible(text)
    console().print(shown, width=min(console().width, WIDEST), markup=False, highlight=False)


def console() -> Console:
    """A console on standard output: as wide as the terminal, or wide enough to cut nothing."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def bar(share: float, *, width: int = 24) -> str:
    """A bar of up to ``width`` characters, with eighths of a character if the encoding has them."""
    if console().options.ascii_only:
        return "#" * round(width * share)
    full, eighths = divmod(round(8 * width * share), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


def cell(value: Any) -> str:
    """A value in a few characters: counts with thousands separators, 4 significant digits."""
    if value is None:
        return "-"
    if not hasattr(value, "__float__"):
        return str(value)
    if not math.isfinite(value):
        return "-"
    number = float(value)
    return fixed(number, 0) if number.is_integer() or abs(number) >= 1e4 else rounded(number, 4)


def scaled(count: float, unit: str) -> str:
    """A count with a unit and its prefix: ``1.5 GB``, ``12 MFLOP``."""
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0, ""))
    size, letter = next((size, letter) for size, letter in sizes if count >= size)
    return f"{rounded(count / (size or 1))} {letter}{unit}".strip()


# A bar on a terminal, time-stamped lines elsewhere.


class Display(Progress, logging.Handler):
    """Shows the events of a sweep.

    Without a bar each event is a line, flushed at once, so a log file can be followed.
    """

    def __init__(self, stream: TextIO, bar: Bar | None = None) -> None:
        super().__init__(logging.INFO)
        self.stream, self.bar, self.total, self.ended = stream, bar, 0, 0
        self.doing, self.last = "", time.monotonic()
        if bar is not None:
            self.task = bar.add_task("loading", total=None)

    def plan(self, trials: Sequence[str]) -> None:
        """Show the trials that will run; a search adds more later."""
        first, self.total, self.doing = not self.total, self.ended + len(trials), ""
        if self.bar is not None:
            self.bar.update(self.task, total=self.total, completed=self.ended)
        if first:
            self._print(f"{plural(self.total, 'trial')} to run")

    def message(self, text: str) -> None:
        """Show what is being done, beside the bar or as a line."""
        self.doing = one_line(text)
        if self.bar is not None:
            self.bar.update(self.task, description=one_line(text))
        else:
            self._print(one_line(text))

    def break_silence(self, folder: Path) -> None:
        """Print what is being worked on in a run, after some seconds of silence."""
        # before the first message the command may still be refused, in one line
        begun = self.doing or self.total
        if not begun or time.monotonic() - self.last < SILENCE:
            return
        doing = self.doing
        if self.total:  # earlier, the sweep may still be importing
            from depthprobe.runs.store import working

            at_work = [f"{each.task} {one_line(each.line)}".rstrip() for each in working(folder)]
            doing = "; ".join(at_work) or self.doing
        self._print(f"at work: {doing or 'waiting for another sweep of this run'}")

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log line."""
        self.message(record.getMessage())

    def done(self, trial: str, status: str, seconds: float, note: str) -> None:
        """Show that a trial has ended."""
        self.ended += 1
        line = "  ".join(filter(None, (trial, status, f"{seconds:.1f} s", one_line(note))))
        if self.bar is not None:
            self.bar.advance(self.task)
            self._print(line, style="red" if status == "failed" else None)
        else:
            self._print(f"[{self.ended}/{self.total}] {line}")

    def _print(self, text: str, *, style: str | None = None) -> None:
        self.last = time.monotonic()
        if self.bar is None:
            with suppress(OSError):  # the trials continue even if nobody reads the output any more
                echo(f"{datetime.now():%H:%M:%S} {text}", self.stream)
        else:  # trial names and errors may contain brackets, which rich would read as markup
            self.bar.console.print(visible(text), style=style, markup=False, highlight=False)


@contextmanager
def show_progress(stream: TextIO, folder: Path | None = None) -> Iterator[Display]:
    """Show progress on ``stream`` while the block runs.

    Also show what is being worked on in the run's ``folder``: at every step on a terminal,
    elsewhere as a line after ten seconds of silence.
    """
    live = stream.isatty() and os.environ.get("TERM") != "dumb"
    logger = logging.getLogger(SHOWN)
    with _bar(stream, folder) if live else nullcontext() as bar:
        display = Display(stream, bar)
        logger.addHandler(display)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # the terminal would show the same line twice
        over = threading.Event()

        def watch() -> None:
            while not over.wait(SILENCE / 10):
                display.break_silence(cast("Path", folder))

        watcher = threading.Thread(target=watch, daemon=True)
        if folder is not None and not live:
            watcher.start()
        try:
            yield display
        finally:
            over.set()
            if watcher.ident is not None:
                watcher.join()
            logger.propagate = True
            logger.removeHandler(display)


def _bar(stream: TextIO, folder: Path | None) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class BarWithTasks(Bar):
        """A progress bar with the running tasks below it."""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            if folder is None or not any(task.total for task in self.tasks):
                return
            from depthprobe.runs.store import working  # by now the sweep has imported torch

            for each in working(folder):
                line = f"  {each.task}  {one_line(each.line)}"
                yield Text(line, overflow="ellipsis", no_wrap=True)

    columns = (
        *(BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(file=stream)
    return BarWithTasks(*columns, console=console, transient=True, refresh_per_second=2)
