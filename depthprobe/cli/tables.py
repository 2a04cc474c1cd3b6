"""Small tables and bars on the terminal."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 200  # columns where there is no terminal: wide enough to cut nothing


def show_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    words: Collection[str] = (),
    title: str | None = None,
) -> None:
    """Print rows to standard output; the columns named in ``words`` are left-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading = Text(title) if title else None
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for name in header:
        table.add_column(Text(name), justify="left" if name in words else "right")
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    print()
    console().print(table)


def show_facts(rows: dict[str, str]) -> None:
    """Print what a thing is called and what it is, one a line."""
    print()
    width = max(12, *map(len, rows))
    for key, value in rows.items():
        print(f"  {key:{width}}  {value}")


def console() -> Console:
    """Standard output: a terminal in its own width, anything else wide enough to cut nothing."""
    from rich.console import Console

    own = Console()
    return own if own.is_terminal else Console(width=PIPE_WIDTH)


def bar(share: float, *, width: int = 24) -> str:
    """A bar of up to ``width`` characters, drawn in eighths of one where the output can show it."""
    if console().options.ascii_only:
        return "#" * round(width * share)
    full, eighths = divmod(round(8 * width * share), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()


def cell(value: object) -> str:
    """A value in a few characters: counts with thousands separators, 4 significant digits."""
    if value is None:
        return "-"
    if isinstance(value, str | bool):
        return str(value)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value)
    if math.isnan(number):
        return "-"
    if number.is_integer() and abs(number) < 1e15:
        return f"{int(number):,}"
    return f"{number:,.0f}" if abs(number) >= 1e4 else f"{number:.4g}"


def scaled(count: float, unit: str) -> str:
    """A count with the unit's thousands: ``1.5 GB``, ``12 MFLOP``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}{unit}"
    return f"{count:.3g} {unit}".strip()
