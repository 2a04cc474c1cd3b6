"""The figure of a log: lengths of histories, popularity of items, interactions over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from depthprobe.data.splits import Split, make_split
from depthprobe.data.statistics import length_bins, popularity, top_shares
from depthprobe.data.storage import Sequences
from depthprobe.errors import BadInput
from depthprobe.files import complete_file
from depthprobe.formatting import part_percent, round_count
from depthprobe.methods import INK
from depthprobe.report.drawing import MUTED, figure_style, rendered
from depthprobe.study import Protocol

BARS, HELD_OUT = "#0069a8", "#c2500a"
PANEL = (3.9, 3.3)  # inches
TIME_BINS = 48


def data_figure(sequences: Sequences, protocol: Protocol | None = None) -> Figure:
    """Users by history length, interactions by item rank and, for a log with times, over time.

    Over time, held-out interactions have their own colour, and lines mark where validation and test
    of a temporal split begin. Without a ``protocol`` the split is the default one; a log that it
    can't split is drawn without a split.

    Raises:
        BadInput: if the log can't be split as the protocol says.
    """
    try:
        split = make_split(sequences, protocol or Protocol())
    except BadInput:
        if protocol is not None:
            raise
        split = None
    panels = 2 if sequences.times is None else 3
    with figure_style():
        layout = ConstrainedLayoutEngine(wspace=0.06)
        figure = Figure(figsize=(panels * PANEL[0], PANEL[1]), layout=layout)
        axes = figure.subplots(1, panels)
        _lengths(axes[0], np.diff(sequences.offsets))
        _popularity(axes[1], popularity(sequences))
        if sequences.times is not None:
            _times(axes[2], np.asarray(sequences.times), split)
    return figure


def save_data_figure(sequences: Sequences, path: Path, *, protocol: Protocol | None = None) -> Path:
    """Draw the figure into a .png (150 dpi), .svg or .pdf file, complete or not at all."""
    made = rendered(data_figure(sequences, protocol), path.suffix.lower().lstrip("."))
    with complete_file(path) as temporary:
        temporary.write_bytes(made)
    return path


def _lengths(ax: Axes, lengths: np.ndarray) -> None:
    bins = length_bins(lengths)
    edges = np.array([bins[0][0] - 0.5, *(high + 0.5 for _, high, _ in bins)])
    users = [users for _, _, users in bins]
    ax.bar(edges[:-1], users, np.diff(edges), align="edge", color=BARS, edgecolor="white")
    ax.set_xscale("log")
    step = -(-len(bins) // 8)  # more numbers would touch
    ax.xaxis.set_major_locator(FixedLocator([high for _, high, _ in bins][::step]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:,.0f}")
    _counts(ax)
    ax.set_xlabel("interactions of a user, up to")
    ax.set_title("Users by length of history")


def _popularity(ax: Axes, taken: np.ndarray) -> None:
    falling = np.sort(taken)[::-1]
    rank = np.arange(1, len(falling) + 1)
    # draw only ranks that a log scale can separate; all would make a file of megabytes
    shown = np.unique(np.geomspace(1, len(rank), 400).round().astype(np.int64)) - 1
    ax.plot(rank[shown], falling[shown], color=BARS, linewidth=2)
    ax.set_xscale("log")
    if np.floor(np.log10(falling[0])) > np.ceil(np.log10(falling[-1])):
        ax.set_yscale("log")
    else:  # a log scale would have at most one number
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: round_count(value)))
        axis.set_minor_formatter(NullFormatter())
    tenth = next(share for top, _, share in top_shares(taken) if top == 10)
    ax.text(
        0.04, 0.06, f"the top 10 % of items\ntake {part_percent(tenth)} of interactions",
        transform=ax.transAxes, color=MUTED,
    )  # fmt: skip
    ax.set_xlabel("rank of the item")
    ax.set_title("Interactions of each item")


def _times(ax: Axes, times: np.ndarray, split: Split | None) -> None:
    edges = np.linspace(times.min(), times.max() + 1, TIME_BINS + 1)
    days = edges.astype("datetime64[s]")
    trains = np.ones(len(times), dtype=bool) if split is None else split.trained
    every, trained = (np.histogram(part, edges)[0] for part in (times, times[trains]))
    ax.stairs(trained, days, fill=True, color=BARS, label="training")
    ax.stairs(every, days, baseline=trained, fill=True, color=HELD_OUT, label="held out")
    ax.set_ylim(0, 1.12 * every.max())  # room for the words above
    if split is not None and "test_begins" in split.statistics:
        # one to each side, since the two may lie close together
        marks = ((split.validation, "validation ", "right"), (split.test, " test", "left"))
        for targets, text, side in marks:
            begins = times[targets.targets].min().astype("datetime64[s]")
            ax.axvline(begins, color=INK, linewidth=1.1, linestyle="--")
            words: dict[str, Any] = {"ha": side, "va": "top", "color": MUTED}
            ax.text(begins, 0.98, text, transform=ax.get_xaxis_transform(), **words)
    locator = AutoDateLocator(minticks=3, maxticks=6)  # type: ignore[no-untyped-call]
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    _counts(ax)
    if split is not None:
        # on the left, since matplotlib puts the year or day on the right
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2, handlelength=1.2)
    ax.set_title("Interactions over time")


def _counts(ax: Axes) -> None:
    ax.grid(visible=False, axis="x")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: round_count(value)))
