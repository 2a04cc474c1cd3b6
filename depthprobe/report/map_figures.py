"""Every contiguous run of blocks at once: how alike the states at its ends, what it costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from depthprobe.report.blocks import change_of
from depthprobe.report.drawing import Array, need, new_axes
from depthprobe.report.scores import scores_of
from depthprobe.report.style import figure_style, in_percent, significant
from depthprobe.report.summary import HEADLINE, Point, RunLike, Summary, as_summary

FEWEST = 3  # cells: fewer are no map
NUMBERS = 8  # blocks: up to so many a cell has room for its number
# from a tint on: white is where nothing was measured
PALE = ListedColormap(colormaps["Blues"](np.linspace(0.1, 1, 256)).tolist())
TITLES = {
    "damage": f"Loss of {HEADLINE} without blocks a to b",
    "angular-distance": "Angular distance over blocks a to b",
    "cka": "Similarity (CKA) around blocks a to b",
}


def span_map(
    run: RunLike | Summary | str | Path, *, score: str = "damage", ax: Axes | None = None
) -> Axes:
    """A score of every contiguous run of blocks: from block a (row) to block b (column).

    "damage" is the share of NDCG@10 lost when the run is left out, "angular-distance" and "cka"
    compare the states before and after it. Means over seeds; pale is little change.
    """
    summary = as_summary(run)
    cells = span_cells(summary, score)
    need(cells, summary, "a teacher and span" if score == "damage" else "similarity")
    size = max(end for _, end in cells)
    grid = np.full((size, size), np.nan)
    for (start, end), value in cells.items():
        grid[start, end - 1] = value
    scale = 100 if score == "damage" else 1
    with figure_style():
        ax = ax or new_axes(right=0.97)
        shown = scale * grid
        low, high = (0.0, float(np.nanmax(shown))) if score != "cka" else (np.nanmin(shown), 1.0)
        # one early block costs all: the root keeps the others apart
        norm = PowerNorm(0.5 if score == "damage" else 1, vmin=low, vmax=max(high, low + 1e-9))
        colours = PALE.reversed() if score == "cka" else PALE
        ax.grid(visible=False)
        # a mesh and no picture: sharp on paper at any size
        places = np.arange(size)
        cells_shown = np.ma.masked_invalid(np.clip(shown, low, None))
        mesh = ax.pcolormesh(
            places, places, cells_shown, cmap=colours, norm=norm, shading="nearest",
            edgecolors="white", linewidth=0.3,
        )  # fmt: skip
        ax.set_aspect("equal")
        ax.invert_yaxis()
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=13, integer=True, min_n_ticks=1))
        ax.set_xlabel("last block, b")
        ax.set_ylabel("first block, a")
        ax.set_title(TITLES[score])
        figure = ax.figure
        bar = figure.colorbar(mesh, ax=ax, shrink=0.85, pad=0.03)
        bar.outline.set_visible(False)
        unit = " %" if score == "damage" else ""
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}{unit}"))
        if size <= NUMBERS:
            _write(ax, shown, norm, score)
    return ax


def _write(ax: Axes, shown: Array, norm: PowerNorm, score: str) -> None:
    for (row, column), value in np.ndenumerate(shown):
        if np.isfinite(value):
            dark = float(norm(max(value, norm.vmin or 0.0)))
            dark = 1 - dark if score == "cka" else dark
            text = f"{value:.0f}" if score == "damage" else f"{value:.2f}"
            colour = "white" if dark > 0.55 else "black"
            ax.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def span_cells(summary: Summary, score: str) -> dict[tuple[int, int], float]:
    """The score by run of blocks [start, end), a mean over seeds; empty where it was not taken."""
    if score == "damage":
        return {
            span: -change.value
            for span, point in _left_out(summary).items()
            if (change := change_of(point)) is not None
        }
    frame = scores_of(summary, score)
    if frame.empty:
        return {}
    means = frame.groupby(["start", "end"], as_index=False)["value"].mean()
    columns = (means[name].tolist() for name in ("start", "end", "value"))
    return {
        (int(start), int(end)): float(value) for start, end, value in zip(*columns, strict=True)
    }


def _left_out(summary: Summary) -> dict[tuple[int, int], Point]:
    """Single blocks and runs of blocks that were left out, by [start, end)."""
    found = {}
    for point in summary.of("skip", "span"):
        first, _, last = point.removed.partition("-")
        if first.isdigit() and (last or first).isdigit():
            found[int(first), int(last or first) + 1] = point
    return found


def span_reading(summary: Summary, score: str) -> str:
    """What the map shows: the longest run that costs little, or the most alike ends."""
    cells = span_cells(summary, score)
    runs = {span: value for span, value in cells.items() if span[1] - span[0] > 1}
    if len(runs) < FEWEST:
        return ""
    if score == "damage":
        return _damage_reading(summary, runs)
    turned = -1 if score == "cka" else 1
    start, end = min(runs, key=lambda span: turned * runs[span])
    value = significant(runs[start, end], 2)
    if score == "cka":
        name = _name(start, end)
        return (
            f"Of runs of two blocks or more, the states around {name} are most alike: CKA {value}."
        )
    return (
        f"Of runs of two blocks or more, {_name(start, end)} turn the state least: angular "
        f"distance {value}, where 0 is not at all and 0.5 a right angle."
    )


def _damage_reading(summary: Summary, runs: dict[tuple[int, int], float]) -> str:
    small = [span for span, loss in runs.items() if loss <= summary.margin]
    margin = f"{100 * summary.margin:g} %"
    if not small:
        start, end = min(runs, key=lambda span: runs[span])
        text = f"Every run of two blocks or more costs more than {margin} on the mean; least costs"
    else:
        start, end = max(small, key=lambda span: (span[1] - span[0], -runs[span]))
        text = f"The longest run whose loss is within {margin} on the mean is"
    change = change_of(_left_out(summary)[start, end])
    said = in_percent(change) if change else ""
    return (
        f"{text} {_name(start, end)}: {said} against the teacher. It was picked out of "
        f"{len(runs)}, so it may look better than it is."
    )


def _name(start: int, end: int) -> str:
    return f"blocks {start} to {end - 1}"
