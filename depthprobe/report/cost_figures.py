"""Accuracy against what it costs, and how much faster a shallower model is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from depthprobe.report.costs import SERVING, TRAINING, timed
from depthprobe.report.drawing import (
    SIZE,
    Array,
    arms,
    bars,
    depth_axis,
    legend_below,
    need,
    new_axes,
)
from depthprobe.report.labels import label_points, label_right
from depthprobe.report.readings import drawn_as, mean, pareto_front, priced
from depthprobe.report.style import (
    INK,
    MUTED,
    count,
    figure_style,
    method_style,
    significant,
    times,
)
from depthprobe.report.summary import FULL, HEADLINE, Point, RunLike, Summary, as_summary

COSTS = {
    "parameters": ("parameters", "parameters in all"),
    "inference": ("inference time", "milliseconds a batch, encoding and scoring"),
    "training": ("training time", "milliseconds a training step"),
}
LEGEND_COLUMNS = 3
MOST_NUMBERS = 16  # depths beside points: more than that cover each other
KINDS = {SERVING: ("to serve", "#0069a8", "s"), TRAINING: ("to train", "#c2500a", "o")}


def accuracy_vs_cost(
    run: RunLike | Summary | str | Path,
    *,
    cost: str = "parameters",
    metric: str = HEADLINE,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against "parameters", "inference" or "training" time, with the Pareto front.

    Vertical bars are 95 % intervals of accuracy, horizontal bars the quartiles of the timing
    rounds. A number beside a point is its depth.
    """
    summary = as_summary(run)
    with figure_style():
        points = priced(summary, cost, metric)
        need(points, summary, f"{COSTS[cost][0]} of a model")
        names = drawn_as(summary)
        methods = list(dict.fromkeys(names[p.method] for p in points))
        rows = -(-(len(methods) + 1) // LEGEND_COLUMNS)
        height, below = SIZE[1] + 0.17 * max(0, rows - 2), 0.52 + 0.19 * rows  # inches
        ax = ax or new_axes(right=0.97, bottom=below / height, size=(SIZE[0], height))
        for method in methods:
            style = method_style(method)
            chosen = [p for p in points if names[p.method] == method]
            x, y = _places(chosen, cost, metric)
            ax.errorbar(
                x, y, xerr=_quartiles(chosen, cost), yerr=bars(chosen, metric), linestyle="none",
                color=style.colour, marker=style.marker, elinewidth=0.9, label=style.label,
            )  # fmt: skip
        front = pareto_front(points, cost, metric)
        ax.plot(
            *_places(front, cost, metric), drawstyle="steps-post", color=INK, linewidth=1,
            alpha=0.4, zorder=1, label="Pareto front" if len(front) > 1 else "_alone",
        )  # fmt: skip
        x, _ = _places(points, cost, metric)
        _cost_axis(ax, x)
        spans = [p.accuracy[FULL, metric] for p in points]
        low, high = min(span.low for span in spans), max(span.high for span in spans)
        # no bars to compare with zero: the scale follows the points, or they would lie on a line
        ax.set_ylim(max(0.0, low - 0.15 * (high - low)), high + 0.15 * (high - low) or 1.0)
        title, label = COSTS[cost]
        ax.set_xlabel(label)
        ax.set_title(f"{metric} against {title}")
        # every early exit would be a row of numbers; the front and the trained ones are the offer
        named = [p for p in points if p.depth and (p in front or p.method != "early-exit")]
        if len(named) > MOST_NUMBERS:
            named = [p for p in points if p.depth and (p in front or p.method == "full")]
        texts = [(p.cost(cost) or 0.0, mean(p, metric), str(p.depth)) for p in named]
        label_points(ax, texts, avoid=[(at, i.low, i.high) for at, i in zip(x, spans, strict=True)])
        legend_below(ax, columns=LEGEND_COLUMNS)
    return ax


def speed_vs_depth(run: RunLike | Summary | str | Path, *, ax: Axes | None = None) -> Axes:
    """How many times faster than at full depth a model is served and trained, by depth.

    Bars are 95 % intervals of the median over paired rounds. The dotted line is what it would be
    if time were blocks alone; what stays below it is spent on embeddings, head and scoring.
    """
    summary = as_summary(run)
    need(any(timed(summary, kind) for kind in KINDS), summary, "times of a depth and the teacher")
    with figure_style():
        ax = ax or new_axes(right=0.8)
        blocks = summary.blocks or 1
        ends: list[tuple[float | None, float, str, str]] = []
        for index, (kind, (label, colour, marker)) in enumerate(KINDS.items()):
            points = timed(summary, kind)
            if not points:
                continue
            speeds = [point.speed[kind] for point in points]
            x = np.array([point.depth for point in points]) + 0.08 * (2 * index - 1)
            y = np.array([speed.value for speed in speeds])
            ax.errorbar(
                x, y, yerr=arms(speeds), color=colour, marker=marker, elinewidth=1, label=label
            )
            ends.append((float(x[-1]), float(y[-1]), label, colour))
        depths = sorted({point.depth for kind in KINDS for point in timed(summary, kind)})
        ideal = np.linspace(depths[0], blocks, 100)
        ax.plot(ideal, blocks / ideal, ":", color=MUTED, linewidth=1.1, label="blocks alone")
        ends.append((float(blocks), 1.0, "blocks alone", MUTED))
        ax.axhline(1, color=INK, linewidth=0.9)
        ax.set_yscale("log")
        ends_of = [p.speed[k] for k in KINDS for p in timed(summary, k)]
        reached = [end for i in ends_of for end in (i.low, i.value, i.high)]
        shown = [end for end in reached if np.isfinite(end) and end > 0]
        top = 1.15 * max(blocks / depths[0], *shown)
        ticks = [t for t in (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if t <= top]
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}\u00d7"))
        ax.set_ylim(min(0.85, 0.95 * min(shown)), top)
        depth_axis(ax, summary, depths)
        ax.set_title("Times faster than at full depth")
        label_right(ax, ends)
    return ax


def speed_reading(summary: Summary) -> str:
    """How much faster the shallowest depth is; empty without times."""
    said = []
    for kind, (label, _, _) in KINDS.items():
        points = timed(summary, kind)
        if points:
            first = points[0]
            speed, depth = first.speed[kind], first.depth
            said.append(
                f"{' '.join(times(speed))} as fast {label} at depth {depth}, "
                f"where blocks alone would give "
                f"{significant((summary.blocks or 1) / depth)}\u00d7"
            )
    return f"Against full depth: {'; '.join(said)}." if said else ""


def _places(points: Sequence[Point], cost: str, metric: str) -> tuple[Array, Array]:
    x = np.array([p.cost(cost) for p in points], dtype=np.float64)
    return x, np.array([mean(p, metric) for p in points], dtype=np.float64)


def _quartiles(points: Sequence[Point], cost: str) -> Array | None:
    if cost == "parameters":
        return None
    spreads = [p.time[cost] for p in points]
    return np.array([(s.median - s.low, s.high - s.median) for s in spreads]).T


def _cost_axis(ax: Axes, x: Array) -> None:
    """Logarithmic ticks at 1, 2, 5 where costs span a factor of four or more, else linear."""
    if len(x) and x.max() >= 4 * x.min():
        ax.set_xscale("log")
        low, high = x.min() / 1.25, x.max() * 1.25
        decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        steps = (1,) if high / low >= 1000 else (1, 2, 5) if high / low >= 12 else (1, 2, 3, 5, 7)
        ticks = [step * 10.0**d for d in decades for step in steps]
        ax.xaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(low, high)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    if value >= 1e4:
        return count(value).replace(".00", "").replace(".0 ", " ")
    return f"{value:,.0f}" if value >= 10 else significant(value, 2).rstrip("0").rstrip(".")
