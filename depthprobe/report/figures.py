"""The figures of a report: one function each, every point with its interval, one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from depthprobe.evaluation.statistics import Interval
from depthprobe.files import complete_file
from depthprobe.report.labels import label_points, label_right
from depthprobe.report.readings import (
    READ_ONLY,
    cost_reading,
    curves,
    depth_reading,
    kept_curves,
    kept_reading,
    mean,
    pareto_front,
    priced,
    skip_changes,
    skip_reading,
)
from depthprobe.report.style import INK, MUTED, count, figure_style, method_style, significant
from depthprobe.report.summary import FULL, HEADLINE, Point, RunLike, Summary, as_summary
from depthprobe.study import base_of

Array = NDArray[np.float64]
SIZE = (4.7, 3.7)  # inches; small, so that the text stays readable on a phone
LOWEST_KEPT = 85.0  # per cent of the teacher: what an early exit may stretch the scale to
COSTS = {
    "parameters": ("parameters", "parameters in all"),
    "inference": ("inference time", "milliseconds a batch, encoding and scoring"),
    "training": ("training time", "milliseconds a training step"),
}


def accuracy_vs_depth(
    run: RunLike | Summary, *, metric: str = HEADLINE, ax: Axes | None = None
) -> Axes:
    """Accuracy of every method against depth, the teacher and the baselines as bands.

    Points are means over users and seeds; bars and bands are 95 % bootstrap intervals.
    """
    summary = as_summary(run)
    with figure_style():
        ax = ax or _new_axes(right=0.78)
        ends: list[tuple[float | None, float, str]] = []
        for point in summary.of("popularity", "sasrec", "full"):
            if (value := point.value(metric)) is not None:
                _band(ax, point, value)
                ends.append((None, value.value, point.method))
        drawn = curves(summary, metric)
        for index, (method, points) in enumerate(drawn.items()):
            # neighbours step aside a little, or their intervals would cover each other
            aside = 0.09 * (index - (len(drawn) - 1) / 2)
            x, y = _curve(ax, points, summary.teacher, metric=metric, aside=aside)
            ends.append((x, y, method))
        _depth_axis(ax, summary, [p.depth for points in drawn.values() for p in points])
        ax.set_ylim(bottom=0)
        ax.set_title(f"{metric} against depth")
        styles = [(x, y, method_style(method)) for x, y, method in ends]
        label_right(ax, [(x, y, style.label, style.colour) for x, y, style in styles])
    return ax


def kept_vs_depth(
    run: RunLike | Summary, *, metric: str = HEADLINE, ax: Axes | None = None
) -> Axes:
    """Share of the teacher's accuracy against depth, with the margin; the scale is cut below.

    Bars are 95 % intervals of the paired ratio, which leave out what users have in common.
    """
    summary = as_summary(run)
    with figure_style():
        ax = ax or _new_axes(right=0.78)
        drawn = kept_curves(summary, metric)
        ratios = {m: [100 * _three(p.ratio[FULL, metric]) for p in ps] for m, ps in drawn.items()}
        trained = [r for m, rows in ratios.items() if m not in READ_ONLY for r in rows]
        every = np.array(trained or [row for rows in ratios.values() for row in rows])
        floor = 100 * (1 - summary.margin)
        # early exits fall to nothing: only what is still in reach may widen the scale
        reach = [row[1] for rows in ratios.values() for row in rows if row[1] > LOWEST_KEPT]
        low = min([every[:, 1].min(), floor, *reach]) - 1.5
        high = max(every[:, 2].max(), 100.0) + 1.5
        ends: list[tuple[float | None, float, str, str]] = [
            (None, 100.0, "teacher", INK), (None, floor, f"margin {floor:g} %", MUTED)
        ]  # fmt: skip
        ax.axhline(100, color=INK, linewidth=1.1, label="teacher")
        ax.axhline(floor, color=MUTED, linewidth=1.1, linestyle="--", label="margin")
        for index, (method, points) in enumerate(drawn.items()):
            style, rows = method_style(method), np.array(ratios[method])
            x = np.array([p.depth for p in points]) + 0.09 * (index - (len(drawn) - 1) / 2)
            bars = np.clip([rows[:, 0] - rows[:, 1], rows[:, 2] - rows[:, 0]], 0, None)
            ax.errorbar(
                x, rows[:, 0], yerr=bars, color=style.colour, marker=style.marker,
                linestyle=style.line, elinewidth=1, zorder=4, label=style.label,
            )  # fmt: skip
            if low < rows[-1, 0] < high:
                ends.append((float(x[-1]), float(rows[-1, 0]), style.label, style.colour))
        _depth_axis(ax, summary, [p.depth for points in drawn.values() for p in points])
        ax.set_ylim(low, high)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
        ax.set_title(f"Share of the teacher's {metric} kept")
        label_right(ax, ends)
    return ax


def accuracy_vs_cost(
    run: RunLike | Summary,
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
        ax = ax or _new_axes(right=0.97, bottom=0.31)
        points = priced(summary, cost, metric)
        for method in dict.fromkeys(p.method for p in points):
            style = method_style(method)
            chosen = [p for p in points if p.method == method]
            x, y = _places(chosen, cost, metric)
            ax.errorbar(
                x, y, xerr=_quartiles(chosen, cost), yerr=_bars(chosen, metric), linestyle="none",
                color=style.colour, marker=style.marker, elinewidth=0.9, label=style.label,
            )  # fmt: skip
        front = pareto_front(points, cost, metric)
        ax.plot(
            *_places(front, cost, metric), drawstyle="steps-post", color=INK, linewidth=1,
            alpha=0.4, zorder=1, label="Pareto front",
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
        texts = [(p.cost(cost) or 0.0, mean(p, metric), str(p.depth)) for p in named]
        label_points(ax, texts, avoid=[(at, i.low, i.high) for at, i in zip(x, spans, strict=True)])
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.45, -0.19), ncols=3, fontsize=8.5,
            handletextpad=0.4, columnspacing=1.1, borderaxespad=0,
        )  # fmt: skip
    return ax


def skip_sensitivity(
    run: RunLike | Summary, *, metric: str = HEADLINE, ax: Axes | None = None
) -> Axes:
    """Change of the teacher's accuracy when one block alone is left out, with 95 % intervals."""
    summary = as_summary(run)
    with figure_style():
        ax = ax or _new_axes(right=0.97)
        found = skip_changes(summary, metric)
        blocks = np.array([int(point.removed) for point, _ in found])
        change = 100 * np.array([interval.value for _, interval in found])
        style = method_style("skip")
        ax.bar(blocks, change, width=0.62, color=style.colour, alpha=0.28, zorder=2)
        ax.errorbar(
            blocks, change, yerr=100 * _arms([interval for _, interval in found]), zorder=3,
            color=style.colour, marker=style.marker, linestyle="none", elinewidth=1.2, label="skip",
        )  # fmt: skip
        ax.axhline(0, color=MUTED, linewidth=0.9)
        ax.grid(visible=False, axis="x")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g} %" if v else "0"))
        ax.set_xlabel("block left out (0-based)")
        ax.set_title(f"Change of {metric} without one block")
    return ax


@dataclass(frozen=True)
class FigureEntry:
    """A figure of the page: where it stands, how it is drawn, what it shows."""

    name: str
    section: str
    draw: Callable[[Summary], Axes]
    reading: Callable[[Summary], str]  # caption and spoken label; empty means there is no data
    wide: bool = False


FIGURES = (
    FigureEntry("kept_vs_depth", "depth", kept_vs_depth, kept_reading),
    FigureEntry(
        "accuracy_vs_depth_ndcg10", "depth",
        partial(accuracy_vs_depth, metric="NDCG@10"), partial(depth_reading, metric="NDCG@10"),
    ),
    FigureEntry(
        "accuracy_vs_depth_hr10", "depth",
        partial(accuracy_vs_depth, metric="HR@10"), partial(depth_reading, metric="HR@10"),
    ),
    FigureEntry(
        "accuracy_vs_parameters", "pareto",
        partial(accuracy_vs_cost, cost="parameters"), partial(cost_reading, cost="parameters"),
    ),
    FigureEntry(
        "accuracy_vs_inference_time", "pareto",
        partial(accuracy_vs_cost, cost="inference"), partial(cost_reading, cost="inference"),
    ),
    FigureEntry(
        "accuracy_vs_training_time", "pareto",
        partial(accuracy_vs_cost, cost="training"), partial(cost_reading, cost="training"),
    ),
    FigureEntry("skip_sensitivity", "blocks", skip_sensitivity, skip_reading),
)  # fmt: skip


def save_figure(ax: Axes, stem: Path) -> Path:
    """Write STEM.svg and STEM.png (150 dpi), each whole or not at all; returns the SVG's path."""
    figure = cast("Figure", ax.get_figure())
    vector, pixels = stem.with_suffix(".svg"), stem.with_suffix(".png")
    with figure_style():
        with complete_file(vector) as temporary:
            # without a date the same run gives the same bytes
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        with complete_file(pixels) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    return vector


def _new_axes(*, right: float, bottom: float = 0.14) -> Axes:
    figure = Figure(figsize=SIZE)
    figure.subplots_adjust(left=0.125, right=right, top=0.9, bottom=bottom)
    return figure.add_subplot()


def _band(ax: Axes, point: Point, value: Interval) -> None:
    style = method_style(point.method)
    ax.axhspan(value.low, value.high, color=style.colour, alpha=0.1, linewidth=0, zorder=1)
    ax.axhline(
        value.value, color=style.colour, linestyle=style.line, linewidth=1.1, zorder=2,
        label=style.label,
    )  # fmt: skip
    if point.method == "full":
        ax.plot([point.depth], [value.value], style.marker, color=style.colour, zorder=5)


def _curve(
    ax: Axes, points: Sequence[Point], teacher: Point | None, *, metric: str, aside: float
) -> tuple[float, float]:
    """Draw a method's points and the line through its best at each depth; returns its end."""
    style = method_style(points[0].method)
    x = np.array([p.depth for p in points]) + aside
    y = np.array([mean(p, metric) for p in points])
    ax.errorbar(
        x, y, yerr=_bars(points, metric), color=style.colour, marker=style.marker,
        linestyle="none", elinewidth=1, zorder=4, label=style.label,
    )  # fmt: skip
    best = {p.depth: max(mean(q, metric) for q in points if q.depth == p.depth) for p in points}
    line = [(depth + aside, value) for depth, value in best.items()]
    end = line[-1]
    # at full depth both are the teacher itself
    if (
        base_of(points[0].method) in {"early-exit", "finetune"}
        and teacher is not None
        and teacher.value(metric) is not None
    ):
        line.append((float(teacher.depth), mean(teacher, metric)))
    ax.plot(
        *zip(*line, strict=True), color=style.colour, linestyle=style.line, alpha=0.75, zorder=3
    )
    return end


def _depth_axis(ax: Axes, summary: Summary, drawn: Sequence[int]) -> None:
    first = min([1, *drawn])
    deepest = summary.blocks or max([1, *drawn])
    ax.set_xlim(first - 0.6, deepest + 0.6)
    if deepest <= 16:
        ax.xaxis.set_major_locator(FixedLocator(range(first, deepest + 1)))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    ax.set_xlabel("depth (blocks kept)")


def _three(interval: Interval) -> Array:
    return np.array([interval.value, interval.low, interval.high])


def _places(points: Sequence[Point], cost: str, metric: str) -> tuple[Array, Array]:
    x = np.array([p.cost(cost) for p in points], dtype=np.float64)
    return x, np.array([mean(p, metric) for p in points], dtype=np.float64)


def _bars(points: Sequence[Point], metric: str) -> Array:
    return _arms([p.accuracy[FULL, metric] for p in points])


def _arms(intervals: Sequence[Interval]) -> Array:
    """Lengths below and above the value, shape (2, n), as matplotlib wants them."""
    arms = np.array([(i.value - i.low, i.high - i.value) for i in intervals], dtype=np.float64)
    return np.clip(arms.reshape(-1, 2).T, 0, None)


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
        steps = (1, 2, 5) if high / low < 1000 else (1,)
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
