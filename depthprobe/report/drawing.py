"""What the figures share: axes, intervals as bars, the scale of depths, files at paper size."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from numpy.typing import NDArray

from depthprobe.evaluation.statistics import Interval
from depthprobe.files import complete_file
from depthprobe.report.style import figure_style
from depthprobe.report.summary import FULL, Point, Summary
from depthprobe.study import BadInput

Array = NDArray[np.float64]
SIZE = (4.7, 3.7)  # inches; small, so that the text stays readable on a phone
LABEL_HEIGHT = 34.0  # points: the numbers of an axis and its label
# without a date the same run gives the same bytes
FORMATS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "png": {"dpi": 150},
    "pdf": {"metadata": {"CreationDate": None}},
}


def new_axes(
    *, right: float, bottom: float = 0.14, left: float = 0.125, size: tuple[float, float] = SIZE
) -> Axes:
    """Axes of a figure of their own, with room for names on the right."""
    figure = Figure(figsize=size)
    figure.subplots_adjust(left=left, right=right, top=1 - 0.37 / size[1], bottom=bottom)
    return figure.add_subplot()


def legend_below(ax: Axes, *, columns: int) -> None:
    """A legend under the label of the depths or costs, as far below it in axes of any height."""
    height = ax.get_window_extent().height * 72 / ax.figure.dpi
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.45, -LABEL_HEIGHT / height), ncols=columns,
        fontsize=8.5, handletextpad=0.4, columnspacing=1.1, borderaxespad=0,
    )  # fmt: skip


def signed(change: float) -> str:
    """A tick of a change in per cent, with a true minus."""
    return f"{change:+g} %".replace("-", "\u2212") if change else "0"


def need(found: object, summary: Summary, what: str) -> None:
    """Refuse to draw what a run has no data for.

    Raises:
        BadInput: that names the run and what it lacks.
    """
    if not found:
        raise BadInput("run", summary.run.path, f"one with {what}")


def save_figure(ax: Axes, stem: Path) -> str:
    """Write STEM.svg, STEM.png (150 dpi) and STEM.pdf, each whole or not at all.

    Returns:
        The text of the SVG.
    """
    made = {suffix: rendered(ax, suffix) for suffix in FORMATS}
    for suffix, content in made.items():
        with complete_file(stem.with_suffix(f".{suffix}")) as temporary:
            temporary.write_bytes(content)
    return made["svg"].decode()


def rendered(ax: Axes, suffix: str) -> bytes:
    """The figure of some axes as a file: "svg", "png" or "pdf"."""
    figure, file = cast("Figure", ax.get_figure(root=True)), BytesIO()
    with figure_style():
        figure.savefig(file, format=suffix, **FORMATS[suffix])
    return file.getvalue()


def depth_axis(ax: Axes, summary: Summary, drawn: Sequence[int]) -> None:
    """The scale from the shallowest depth that is drawn, or 1, to the whole backbone."""
    first = min([1, *drawn])
    deepest = summary.blocks or max([1, *drawn])
    ax.set_xlim(first - 0.6, deepest + 0.6)
    if deepest <= 16:
        ax.xaxis.set_major_locator(FixedLocator(range(first, deepest + 1)))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    ax.set_xlabel("depth (blocks kept)")


def three(interval: Interval) -> Array:
    """Value, low and high, (3,)."""
    return np.array([interval.value, interval.low, interval.high])


def bars(points: Sequence[Point], metric: str) -> Array:
    """Lengths of the points' intervals below and above their means, (2, n)."""
    return arms([p.accuracy[FULL, metric] for p in points])


def arms(intervals: Sequence[Interval]) -> Array:
    """Lengths below and above the value, shape (2, n), as matplotlib wants them."""
    arms = np.array([(i.value - i.low, i.high - i.value) for i in intervals], dtype=np.float64)
    # of one round or one user nothing is known: no bar then, and not an endless one
    return np.clip(np.where(np.isfinite(arms), arms, 0).reshape(-1, 2).T, 0, None)
