"""Accuracy against depth: as it is, and as a share of the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from depthprobe.evaluation.statistics import Interval
from depthprobe.report.drawing import SIZE, Array, arms, bars, depth_axis, new_axes, three
from depthprobe.report.labels import label_right
from depthprobe.report.readings import READ_ONLY, curves, kept_curves, mean
from depthprobe.report.style import INK, MUTED, figure_style, method_style
from depthprobe.report.summary import FULL, HEADLINE, Point, RunLike, Summary, as_summary
from depthprobe.study import base_of

LOWEST_KEPT = 85.0  # per cent of the teacher: what an early exit may stretch the scale to


def accuracy_vs_depth(
    run: RunLike | Summary | str | Path, *, metric: str = HEADLINE, ax: Axes | None = None
) -> Axes:
    """Accuracy of every method against depth, the teacher and the baselines as bands.

    Points are means over users and seeds; bars and bands are 95 % bootstrap intervals.
    """
    summary = as_summary(run)
    with figure_style():
        ax = ax or new_axes(right=0.78)
        ends: list[tuple[float | None, float, str]] = []
        for point in summary.of("popularity", "sasrec", "full"):
            if (value := point.value(metric)) is not None:
                _band(ax, point, value)
                ends.append((None, value.value, point.method))
        drawn = curves(summary, metric)
        for index, (method, points) in enumerate(drawn.items()):
            # neighbours step aside a little, or their intervals would cover each other
            aside = 0.09 * (index - (len(drawn) - 1) / 2)
            x, y = _curve(ax, method, points, summary.teacher, metric=metric, aside=aside)
            ends.append((x, y, method))
        depth_axis(ax, summary, [p.depth for points in drawn.values() for p in points])
        ax.set_ylim(bottom=0)
        ax.set_title(f"{metric} against depth")
        styles = [(x, y, method_style(method)) for x, y, method in ends]
        label_right(ax, [(x, y, style.label, style.colour) for x, y, style in styles])
    return ax


def kept_vs_depth(
    run: RunLike | Summary | str | Path,
    *,
    metric: str = HEADLINE,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Share of the teacher's accuracy against depth, with the margin; the scale is cut below.

    Bars are 95 % intervals of the paired ratio, which leave out what users have in common.
    ``limits`` are of the scale, in per cent; by default :func:`kept_limits` of this run.
    """
    summary = as_summary(run)
    with figure_style():
        ax = ax or new_axes(right=0.78, left=0.14)
        drawn = kept_curves(summary, metric)
        floor = 100 * (1 - summary.margin)
        low, high = limits or kept_limits(summary, metric)
        ends: list[tuple[float | None, float, str, str]] = [
            (None, 100.0, "teacher", INK), (None, floor, f"margin {floor:g} %", MUTED)
        ]  # fmt: skip
        ax.axhline(100, color=INK, linewidth=1.1, label="teacher")
        ax.axhline(floor, color=MUTED, linewidth=1.1, linestyle="--", label="margin")
        for index, (method, points) in enumerate(drawn.items()):
            style = method_style(method)
            rows = np.array([100 * three(p.ratio[FULL, metric]) for p in points])
            x = _beside(points) + 0.09 * (index - (len(drawn) - 1) / 2)
            ax.errorbar(
                x, rows[:, 0], yerr=100 * arms([p.ratio[FULL, metric] for p in points]),
                color=style.colour, marker=style.marker, elinewidth=1, zorder=4, label=style.label,
                linestyle=style.line if len({p.depth for p in points}) == len(points) else "none",
            )  # fmt: skip
            if low < rows[-1, 0] < high:
                ends.append((float(x[-1]), float(rows[-1, 0]), style.label, style.colour))
        depth_axis(ax, summary, [p.depth for points in drawn.values() for p in points])
        ax.set_ylim(low, high)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
        ax.set_title(title or f"Share of the teacher's {metric} kept")
        label_right(ax, ends)
    return ax


def kept_limits(summary: Summary, metric: str = HEADLINE) -> tuple[float, float]:
    """From where to where shares of the teacher's accuracy are drawn, in per cent."""
    drawn = kept_curves(summary, metric)
    ratios = {m: [100 * three(p.ratio[FULL, metric]) for p in ps] for m, ps in drawn.items()}
    rows = [row for found in ratios.values() for row in found]
    trained = [row for m, found in ratios.items() if m not in READ_ONLY for row in found]
    floor = 100 * (1 - summary.margin)
    # read-outs fall to nothing: only what is still in reach may widen the scale
    reach = [row for row in rows if row[1] > LOWEST_KEPT]
    low = min([floor, *(row[1] for row in (*trained, *reach))]) - 1.5
    return float(low), float(max([100.0, *(row[2] for row in (*trained, *reach))]) + 1.5)


def kept_side_by_side(runs: Sequence[RunLike | Summary | str | Path]) -> list[Axes]:
    """:func:`kept_vs_depth` of several runs in one figure, on one scale; an Axes a run.

    Each is titled with the name of its folder; every run is compared with its own teacher.
    """
    summaries = [as_summary(run) for run in runs]
    limits = common_limits(summaries)
    width = SIZE[0] * len(summaries)
    with figure_style():
        figure = Figure(figsize=(width, SIZE[1]))
        figure.subplots_adjust(
            left=0.165 * SIZE[0] / width, right=1 - 0.22 * SIZE[0] / width, top=0.9, bottom=0.14,
            wspace=0.53,
        )  # fmt: skip
        axes: list[Axes] = list(figure.subplots(1, len(summaries), squeeze=False)[0])
        for ax, summary in zip(axes, summaries, strict=True):
            kept_vs_depth(summary, limits=limits, title=summary.run.path.name, ax=ax)
        axes[0].set_ylabel(f"share of the teacher's {HEADLINE}")
    return axes


def common_limits(summaries: Sequence[Summary]) -> tuple[float, float]:
    """The widest of the runs' :func:`kept_limits`."""
    found = [kept_limits(summary) for summary in summaries]
    return min(low for low, _ in found), max(high for _, high in found)


def _band(ax: Axes, point: Point, value: Interval) -> None:
    style = method_style(point.method)
    ax.axhspan(value.low, value.high, color=style.colour, alpha=0.1, linewidth=0, zorder=1)
    ax.axhline(
        value.value, color=style.colour, linestyle=style.line, linewidth=1.1, zorder=2,
        label=style.label,
    )  # fmt: skip
    if point.method == "full":
        ax.plot([point.depth], [value.value], style.marker, color=style.colour, zorder=5)


def _beside(points: Sequence[Point]) -> Array:
    """The depths of points, (P,); those of one depth beside each other around it."""
    depths = np.array([p.depth for p in points], dtype=float)
    for depth in np.unique(depths):
        same = depths == depth
        if same.sum() > 1:
            depths[same] += np.linspace(-0.32, 0.32, same.sum())
    return depths


def _curve(
    ax: Axes,
    name: str,
    points: Sequence[Point],
    teacher: Point | None,
    *,
    metric: str,
    aside: float,
) -> tuple[float, float]:
    """Draw a method's points and the line through its best at each depth; returns its end."""
    style = method_style(name)
    x = _beside(points) + aside
    y = np.array([mean(p, metric) for p in points])
    ax.errorbar(
        x, y, yerr=bars(points, metric), color=style.colour, marker=style.marker,
        linestyle="none", elinewidth=1, zorder=4, label=style.label,
    )  # fmt: skip
    best = {p.depth: max(mean(q, metric) for q in points if q.depth == p.depth) for p in points}
    line = [(depth + aside, value) for depth, value in best.items()]
    end = line[-1]
    # at full depth both are the teacher itself
    if (
        base_of(name) in {"early-exit", "finetune"}
        and teacher is not None
        and teacher.value(metric) is not None
    ):
        line.append((float(teacher.depth), mean(teacher, metric)))
    ax.plot(
        *zip(*line, strict=True), color=style.colour, linestyle=style.line, alpha=0.75, zorder=3
    )
    return end
