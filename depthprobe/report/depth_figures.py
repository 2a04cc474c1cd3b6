"""What the figures show, in a sentence each: their captions, and what a screen reader says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from depthprobe.evaluation.statistics import Interval
from depthprobe.methods import base_of, method_order, names
from depthprobe.report.drawing import (
    SIZE,
    Array,
    arms,
    bars,
    depth_axis,
    label_points,
    label_right,
    legend_below,
    need,
    new_axes,
    three,
)
from depthprobe.report.numbers import (
    BY_BLOCK,
    CONTROLS,
    FULL,
    HEADLINE,
    SHOWN_ONLY,
    Point,
    RunLike,
    Summary,
    as_summary,
)
from depthprobe.report.style import (
    INK,
    MUTED,
    accuracy,
    bounds,
    count,
    figure_style,
    in_percent,
    method_style,
    significant,
    times,
)
from depthprobe.report.tables import SERVING, TRAINING, change_of, timed
from depthprobe.study import ranges

# Not drawn as a curve over depth: baselines, the teacher, probes with many kept sets at a depth.
NOT_CURVES = BY_BLOCK | {*names("baseline"), "full"}
MOST_VARIANTS = 8  # of one method that are told apart in a figure
# Without training: may be far below the teacher.
READ_ONLY = frozenset(names("probe")) | CONTROLS


def curves(summary: Summary, metric: str) -> dict[str, list[Point]]:
    """Measured points of each method that has a curve over depth, in the order of depth."""
    found: dict[str, list[Point]] = {}
    names = drawn_as(summary)
    for method in sorted(set(names) - NOT_CURVES, key=method_order):
        points = [p for p in summary.of(method) if p.value(metric) is not None]
        if points:
            found.setdefault(names[method], []).extend(points)
    return {name: sorted(points, key=lambda p: p.depth) for name, points in found.items()}


def drawn_as(summary: Summary) -> dict[str, str]:
    """The methods that figures show, by the name that they show them under.

    Variants of a method that is there itself are not among them: those have a table of their own.
    More variants of another than can be told apart go under their method's name, all together.
    """
    methods = {p.method for p in summary.points}
    shown = {name for name in methods if name == base_of(name) or base_of(name) not in methods}
    variants = Counter(base_of(name) for name in shown if name != base_of(name))
    return {
        name: base_of(name) if variants[base_of(name)] > MOST_VARIANTS else name for name in shown
    }


def priced(summary: Summary, cost: str, metric: str = HEADLINE) -> list[Point]:
    """Points with both an accuracy and a cost; popularity and most probes are not on offer."""
    drawn = drawn_as(summary).keys() - {"popularity", *SHOWN_ONLY}
    return [
        p
        for p in summary.points
        if p.method in drawn and p.cost(cost) and p.value(metric) is not None
    ]


def mean(point: Point, metric: str) -> float:
    """The mean of a metric that the point is known to have."""
    return float(point.accuracy[FULL, metric].value)


def pareto_front(points: Iterable[Point], cost: str, metric: str = HEADLINE) -> list[Point]:
    """Points that no other one beats: all cheaper ones are less accurate. Cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost(cost) or 0, -mean(p, metric))):
        if not front or mean(point, metric) > mean(front[-1], metric):
            front.append(point)
    return front


def skip_changes(
    summary: Summary, metric: str = HEADLINE, *, method: str = "skip"
) -> list[tuple[Point, Interval]]:
    """Relative change against the teacher for each block left out alone, by block.

    ``method`` may be "drop-attention" or "drop-mlp": then it is that part of the block alone.
    """
    found = []
    for point in summary.of(method):
        change = change_of(point, metric)
        if change is not None and point.removed.isdigit():
            found.append((point, change))
    return sorted(found, key=lambda pair: int(pair[0].removed))


def depth_reading(summary: Summary, metric: str) -> str:
    """What accuracy against depth shows; empty without a curve."""
    drawn = curves(summary, metric)
    if not drawn:
        return ""
    said = []
    teacher = summary.teacher
    if teacher is not None and (value := teacher.value(metric)) is not None:
        said.append(f"the teacher ({teacher.depth} blocks) reaches {_with_bounds(value)}")
    half = (summary.blocks or max(p.depth for p in summary.points)) // 2
    trained = [
        point
        for method, points in drawn.items()
        if base_of(method) not in READ_ONLY
        for point in points
        if point.depth <= half
    ]
    depth = half
    if trained:
        best = max(trained, key=lambda p: mean(p, metric))
        depth, name = best.depth, method_style(best.method).label
        value = best.accuracy[FULL, metric]
        said.append(
            f"the best of {half} blocks or fewer is {name} at {depth}, {_with_bounds(value)}"
        )
    for control in ("early-exit", "random-init"):
        for point in drawn.get(control, []):
            if point.depth == depth:
                name = method_style(control).label
                value = point.accuracy[FULL, metric]
                said.append(f"{name} at {depth} reaches {_with_bounds(value)}")
    return f"{metric}: {'; '.join(said)}." if said else f"{metric} by depth."


def kept_curves(summary: Summary, metric: str = HEADLINE) -> dict[str, list[Point]]:
    """The curves over depth that can be compared with the teacher."""
    compared = {
        method: [p for p in points if (FULL, metric) in p.ratio]
        for method, points in curves(summary, metric).items()
    }
    return {method: points for method, points in compared.items() if points}


def kept_reading(summary: Summary, metric: str = HEADLINE) -> str:
    """Which trained points are within the margin as they look, and as they are shown to be."""
    drawn = kept_curves(summary, metric)
    offered = [method for method in drawn if base_of(method) not in CONTROLS | SHOWN_ONLY]
    points = [p for method in offered for p in drawn[method]]
    if not points:
        return ""
    floor = 1 - summary.margin
    above = sorted({p.depth for p in points if p.ratio[FULL, metric].value >= floor})
    shown = sorted(
        {row.depth for row in summary.sufficiency.rows if row.shown} if summary.sufficiency else ()
    )
    depths, proven = (ranges(found).replace("-", "–") or "none" for found in (above, shown))
    best = max(points, key=lambda p: p.ratio[FULL, metric].value)
    ratio = best.ratio[FULL, metric]
    return (
        f"Depths whose mean keeps {100 * floor:g} % of the teacher's {metric}: {depths}; shown "
        f"with confidence: {proven}. Of what is drawn, {method_style(best.method).label} at depth "
        f"{best.depth} keeps the most: {in_percent(ratio)}."
    )


def cost_reading(summary: Summary, cost: str, metric: str = HEADLINE) -> str:
    """Which points are on the Pareto front; empty for less than two points."""
    points = priced(summary, cost, metric)
    if len(points) < 2:
        return ""
    name = "parameters" if cost == "parameters" else f"{cost} time"
    front = ", ".join(
        method_style(p.method).label + ("" if p.method in names("baseline") else f" {p.depth}")
        for p in pareto_front(points, cost, metric)
    )
    return f"{metric} against {name}. On the means, beaten by no other in both: {front}."


def skip_reading(summary: Summary, metric: str = HEADLINE) -> str:
    """Which block matters most, and for how many no change was seen; empty without data."""
    changes = skip_changes(summary, metric)
    if not changes:
        return ""
    point, worst = min(changes, key=lambda pair: pair[1].value)
    digits = 1 if abs(worst.value) >= 0.01 else 2
    unclear = sum(change.low <= 0 <= change.high for _, change in changes)
    change = f"{100 * worst.value:+.{digits}f} % {bounds(worst, scale=100, digits=digits)}"
    others = (
        f"for {unclear} of {len(changes)} blocks the interval of the change holds zero"
        if unclear
        else "no interval of a change holds zero"
    )
    return f"Left out alone, block {point.removed} costs the most: {metric} {change}; {others}."


def _with_bounds(value: Interval) -> str:
    return f"{accuracy(value.value)} {bounds(value, digits=4)}"


# Accuracy against depth: as it is, and as a share of the teacher's.

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


# Accuracy against what it costs, and how much faster a shallower model is.

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
