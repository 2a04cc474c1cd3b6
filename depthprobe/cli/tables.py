"""A DataFrame as a small table on the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

PIPE_WIDTH = 200  # columns where nobody has a terminal: wide enough to cut nothing


def show_frame(frame: pd.DataFrame, *, title: str | None = None) -> None:
    """Print the frame to standard output, numbers right-aligned, missing values as a dash."""
    from pandas.api.types import is_numeric_dtype
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for name in frame.columns:
        numeric = is_numeric_dtype(frame[name])
        table.add_column(Text(str(name)), justify="right" if numeric else "left")
    for row in frame.itertuples(index=False, name=None):
        table.add_row(*(Text(cell(value)) for value in row))
    console.print(table)


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
