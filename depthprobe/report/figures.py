"""The figures of a report: each a function on a run that returns its Axes, and one table of them.

Every function takes a run, its folder or its :func:`summarise`, and draws into ``ax`` where one is
given. A run's numbers take seconds to compute: for several figures, summarise it once. Beside each
figure stands what its caption says, which is also what a screen reader reads; empty without data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from depthprobe.evaluation.statistics import Interval
from depthprobe.methods import base_of, method_order
from depthprobe.report import style
from depthprobe.report.block_figures import (
    ablation_changes,
    ablation_reading,
    block_influence,
    influence_reading,
    settling_depth,
    settling_reading,
    skip_reading,
    skip_sensitivity,
    span_map,
    span_reading,
)
from depthprobe.report.numbers import (
    FULL,
    POPULARITY,
    Point,
    Source,
    Summary,
    as_summary,
    summarise,
)
from depthprobe.report.style import INK, MUTED, method_info, need
from depthprobe.report.tables import timed
from depthprobe.study import ranges

__all__ = [
    "FIGURES",
    "FigureEntry",
    "ablation_changes",
    "accuracy_vs_cost",
    "accuracy_vs_depth",
    "block_influence",
    "kept_side_by_side",
    "kept_vs_depth",
    "settling_depth",
    "skip_sensitivity",
    "span_map",
    "speed_vs_depth",
    "summarise",
]

Curves = dict[str, list[Point]]  # by method, shallow to deep

# --- what is drawn ---------------------------------------------------------------------------


def shown_methods(summary: Summary) -> list[str]:
    """The methods that figures show, in the order of reports.

    Variants of a method that is there itself are not among them: those have a table of their own.
    """
    methods = {point.method for point in summary.points}
    shown = (name for name in methods if name == base_of(name) or base_of(name) not in methods)
    return sorted(shown, key=method_order)


def curves(summary: Summary, metric: str, *, kept: bool = False) -> Curves:
    """Measured points of each method with a curve over depth; ``kept``: beside the teacher's."""
    found: Curves = {}
    for method in shown_methods(summary):
        info = method_info(method)
        points = [
            point
            for point in summary.of(method)
            if (FULL, metric) in (point.ratio if kept else point.accuracy)
        ]
        if points and info.role not in ("baseline", "teacher") and not info.by_block:
            found[method] = points
    return found


def every(drawn: Mapping[str, Sequence[Point]]) -> list[Point]:
    """The points of all curves."""
    return [point for points in drawn.values() for point in points]


def mean(point: Point, metric: str) -> float:
    """The mean of a metric that the point is known to have."""
    return point.accuracy[FULL, metric].value


def _depth_axis(ax: Axes, summary: Summary, points: Sequence[Point]) -> None:
    """From the shallowest depth that is drawn, or 1, to the full backbone."""
    depths = [1, *(point.depth for point in points)]
    ax.set_xlim(min(depths) - 0.6, summary.blocks + 0.6)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    ax.set_xlabel("depth (blocks kept)")


def _draw_curves(ax: Axes, drawn: Curves, interval_of: Callable[[Point], Interval]) -> None:
    """Each method's points with their intervals."""
    for index, (name, points) in enumerate(drawn.items()):
        look, depths = method_info(name), [point.depth for point in points]
        style.draw_series(
            ax, style.beside(depths, index, len(drawn)), [interval_of(point) for point in points],
            look, linestyle=look.line, zorder=4,
        )  # fmt: skip


# --- accuracy against depth: as it is, and as a share of the teacher's -----------------------


def accuracy_vs_depth(run: Source, *, metric: str | None = None, ax: Axes | None = None) -> Axes:
    """Accuracy of every method against depth, the teacher and the baselines as bands.

    Points are means over users and seeds; bars and bands are 95 % bootstrap intervals.
    """
    summary = as_summary(run)
    metric = metric or summary.headline
    with style.drawing(ax) as ax:
        for point in summary.points:
            value, look = point.value(metric), point.info
            if look.role in ("baseline", "teacher") and value is not None:
                low, high = style.limits([value])
                ax.axhspan(low, high, color=look.colour, alpha=0.1, linewidth=0, zorder=1)
                ax.axhline(
                    value.value, color=look.colour, linestyle=look.line, linewidth=1.1, zorder=2,
                    label=look.label,
                )  # fmt: skip
        drawn = curves(summary, metric)
        _draw_curves(ax, drawn, lambda point: point.accuracy[FULL, metric])
        _depth_axis(ax, summary, every(drawn))
        ax.set_ylim(bottom=0)
        ax.set_title(f"{metric} against depth")
        style.legend(ax)
    return ax


def depth_reading(summary: Summary, metric: str) -> str:
    """What accuracy against depth shows."""
    points, teacher = every(curves(summary, metric)), summary.teacher
    if not points:
        return ""
    said = [f"{metric} against depth."]
    if teacher is not None and (value := teacher.value(metric)) is not None:
        said.append(f"The teacher ({teacher.depth} blocks) reaches {style.with_bounds(value)}.")
    depth = half = summary.blocks // 2
    trained = [point for point in points if point.info.role == "trained" and point.depth <= half]
    if trained:
        best = max(trained, key=lambda point: mean(point, metric))
        depth = best.depth
        said.append(
            f"The best trained model of at most {half} blocks is {best.name}: "
            f"{style.with_bounds(best.accuracy[FULL, metric])}."
        )
    others = [p for p in points if p.depth == depth and p.info.role != "trained"]
    controls = [point for point in others if point.info.role == "control"]
    probes = [point for point in others if point.info.candidate]
    if probes:
        controls.append(max(probes, key=lambda point: mean(point, metric)))
    for point in controls:
        name = point.name[0].upper() + point.name[1:]
        said.append(f"{name} reaches {style.with_bounds(point.accuracy[FULL, metric])}.")
    return " ".join(said) + style.without_bar(p.accuracy[FULL, metric] for p in points)


def kept_vs_depth(
    run: Source,
    *,
    metric: str | None = None,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Share of the teacher's accuracy against depth, with the margin; the scale is cut below.

    Bars are 95 % intervals of the paired ratio, which leave out what users have in common.
    ``limits`` are of the scale, in per cent; by default :func:`kept_limits` of this run.
    """
    summary = as_summary(run)
    metric = metric or summary.headline
    with style.drawing(ax) as ax:
        drawn, floor = curves(summary, metric, kept=True), 100 * (1 - summary.margin)
        ax.axhline(100, color=INK, linewidth=1.1, label="teacher")
        ax.axhline(floor, color=MUTED, linewidth=1.1, linestyle="--", label=f"margin: {floor:g} %")
        _draw_curves(ax, drawn, lambda point: style.scaled(point.ratio[FULL, metric]))
        _depth_axis(ax, summary, every(drawn))
        ax.set_ylim(limits or kept_limits(summary, metric=metric))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10]))
        style.percent_axis(ax)
        ax.set_title(title or f"Share of the teacher's {metric} kept")
        style.legend(ax)
    return ax


LOWEST_KEPT = 0.85  # of the teacher: what an untrained model may stretch the scale to


def kept_limits(*summaries: Summary, metric: str | None = None) -> tuple[float, float]:
    """From where to where shares of the teachers' accuracy are drawn, in per cent."""
    shares = [
        (point.info.role == "trained", point.ratio[FULL, metric or one.headline])
        for one in summaries
        for point in every(curves(one, metric or one.headline, kept=True))
    ]
    # read-outs fall to nothing: only what is still in reach may widen the scale
    reach = [style.scaled(s) for trained, s in shares if trained or s.low > LOWEST_KEPT]
    low, high = style.limits(reach, 100.0, *(100 * (1 - one.margin) for one in summaries))
    return low - 1.5, high + 1.5


def kept_reading(summary: Summary, metric: str | None = None) -> str:
    """Which depths are within the margin on the mean, and which are shown to be."""
    metric = metric or summary.headline
    points = [p for p in every(curves(summary, metric, kept=True)) if p.info.candidate]
    if not points:
        return ""
    floor = 1 - summary.margin
    within = {p.depth for p in points if p.ratio[FULL, metric].value >= floor}
    rows = summary.sufficiency.rows if summary.sufficiency else ()
    depths, shown = (
        ranges(sorted(found)).replace("-", "–").replace(",", ", ") or "none"
        for found in (within, {row.depth for row in rows if row.shown})
    )
    best = max(points, key=lambda point: point.ratio[FULL, metric].value)
    return (
        f"Depths whose mean keeps {100 * floor:g} % of the teacher's {metric}: {depths}. Depths "
        f"for which this is shown with confidence: {shown}. The most is kept by {best.name}: "
        f"{style.in_percent(best.ratio[FULL, metric])}."
        f"{style.without_bar(point.ratio[FULL, metric] for point in points)}"
    )


def kept_side_by_side(runs: Sequence[Source]) -> list[Axes]:
    """:func:`kept_vs_depth` of several runs in one figure, on one scale; an Axes a run.

    Each is titled with the name of its folder; every run is compared with its own teacher.
    """
    summaries = [as_summary(run) for run in runs]
    limits = kept_limits(*summaries)
    with style.figure_style():
        size = (style.SIZE[0] * len(summaries), style.SIZE[1])
        figure = Figure(figsize=size, layout="constrained")
        axes: list[Axes] = list(figure.subplots(1, len(summaries), squeeze=False)[0])
        for ax, summary in zip(axes, summaries, strict=True):
            kept_vs_depth(summary, limits=limits, title=summary.run.path.name, ax=ax)
        axes[0].set_ylabel(f"share of the teacher's {summaries[0].headline}")
    return axes


# --- accuracy against what it costs, and how much faster a shallower model is ----------------

COSTS = {
    "parameters": ("parameters", "parameters in all"),
    "inference": ("inference time", "milliseconds a batch, encoding and scoring"),
    "training": ("training time", "milliseconds a training step"),
}
KINDS = {
    "inference": style.Look("to serve", "#0069a8", "s"),
    "training": style.Look("to train", "#c2500a", "o"),
}


def priced(summary: Summary, cost: str, metric: str | None = None) -> list[Point]:
    """Points with an accuracy and a cost; popularity and most probes are not on offer."""
    shown = set(shown_methods(summary)) - {POPULARITY}
    return [
        point
        for point in summary.points
        if point.method in shown
        and (point.info.candidate or point.info.role != "probe")
        and point.cost(cost)
        and point.value(metric or summary.headline) is not None
    ]


def pareto_front(points: Iterable[Point], cost: str, metric: str) -> list[Point]:
    """Points that no other one beats: all cheaper ones are less accurate. Cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost(cost) or 0, -mean(p, metric))):
        if not front or mean(point, metric) > mean(front[-1], metric):
            front.append(point)
    return front


def accuracy_vs_cost(
    run: Source, *, cost: str = "parameters", metric: str | None = None, ax: Axes | None = None
) -> Axes:
    """Accuracy against "parameters", "inference" or "training" time, with the Pareto front.

    Vertical bars are 95 % intervals of accuracy, horizontal bars the quartiles of the timing
    rounds. A number beside a point of the front is its depth.
    """
    summary = as_summary(run)
    title, label = COSTS[cost]
    metric = metric or summary.headline
    points = priced(summary, cost, metric)
    need(points, summary, f"{title} of a model")
    with style.drawing(ax) as ax:
        for method in dict.fromkeys(point.method for point in points):
            own = [point for point in points if point.method == method]
            times = [point.time[cost] for point in own if cost in point.time]
            style.draw_series(
                ax, [point.cost(cost) or 0 for point in own],
                [point.accuracy[FULL, metric] for point in own], method_info(method),
                xerr=style.bars(times) if times else None, linestyle="none",
            )  # fmt: skip
        front = pareto_front(points, cost, metric)
        ax.plot(
            [point.cost(cost) or 0 for point in front], [mean(point, metric) for point in front],
            drawstyle="steps-post", color=INK, linewidth=1, alpha=0.4, zorder=1,
            label="Pareto front" if len(front) > 1 else "_alone",
        )  # fmt: skip
        for point in front:  # above and left of a point of the front there is no other point
            if point.depth:
                ax.annotate(
                    str(point.depth), (point.cost(cost) or 0, mean(point, metric)), (-5, 4),
                    textcoords="offset points", ha="right", fontsize=8,
                )  # fmt: skip
        costs = [point.cost(cost) or 0 for point in points]
        if max(costs) >= 4 * min(costs):
            ax.set_xscale("log")
            ax.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
            style.log_ticks(ax.xaxis, style.round_count, wide=max(costs) >= 100 * min(costs))
        else:
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: style.round_count(value)))
        # no bars to compare with zero: the scale follows the points, or they would lie on a line
        low, high = style.limits(point.accuracy[FULL, metric] for point in points)
        gap = 0.15 * (high - low) or 0.5
        ax.set_ylim(max(0.0, low - gap), high + gap)
        ax.set_xlabel(label)
        ax.set_title(f"{metric} against {title}")
        style.legend(ax)
    return ax


def cost_reading(summary: Summary, cost: str, metric: str | None = None) -> str:
    """Which points are on the Pareto front; empty for less than two points."""
    metric = metric or summary.headline
    points = priced(summary, cost, metric)
    if len(points) < 2:
        return ""
    front = ", ".join(point.name for point in pareto_front(points, cost, metric))
    return (
        f"{metric} against {COSTS[cost][0]}. On the means, no other model is both cheaper and more "
        f"accurate than these: {front}."
        f"{style.without_bar(point.accuracy[FULL, metric] for point in points)}"
    )


def speed_vs_depth(run: Source, *, ax: Axes | None = None) -> Axes:
    """How many times faster than at full depth a model is served and trained, by depth.

    Bars are 95 % intervals of the median over paired rounds. The dotted line is what it would be
    if time were blocks alone; what stays below it is spent on embeddings, head and scoring.
    """
    summary = as_summary(run)
    points = {kind: timed(summary, kind) for kind in KINDS}
    need(every(points), summary, "times of a depth and the teacher")
    with style.drawing(ax) as ax:
        blocks, first = summary.blocks, min(point.depth for point in every(points))
        for index, (kind, look) in enumerate(KINDS.items()):
            if points[kind]:
                places = style.beside([point.depth for point in points[kind]], index, 2, 0.16)
                style.draw_series(ax, places, [p.speed[kind] for p in points[kind]], look)
        ideal = np.linspace(first, blocks, 100)
        ax.plot(ideal, blocks / ideal, ":", color=MUTED, linewidth=1.1, label="blocks alone")
        ax.axhline(1, color=INK, linewidth=0.9)
        speeds = [point.speed[kind] for kind, own in points.items() for point in own]
        low, high = style.limits(speeds, blocks / first)
        ax.set_yscale("log")
        ax.set_ylim(min(0.85, 0.95 * low) if low > 0 else 0.5, 1.15 * high)
        style.log_ticks(ax.yaxis, lambda value: f"{value:g}\u00d7")
        _depth_axis(ax, summary, every(points))
        ax.set_title("Times faster than at full depth")
        style.legend(ax)
    return ax


def speed_reading(summary: Summary) -> str:
    """How much faster the shallowest depth is."""
    points = {kind: timed(summary, kind) for kind in KINDS}
    said = []
    for kind, look in KINDS.items():
        if points[kind]:
            first = points[kind][0]
            said.append(
                f"At depth {first.depth} a model is {' '.join(style.times(first.speed[kind]))} as "
                f"fast {look.label} as at full depth; blocks alone would give "
                f"{style.significant(summary.blocks / first.depth)}\u00d7."
            )
    return " ".join(said)


# --- the figures of the page -----------------------------------------------------------------


class FigureEntry(NamedTuple):
    """A figure of the page: where it stands, how it is drawn, what it shows.

    ``reading`` is caption and spoken label, empty where there is no data; both functions take the
    run's summary and what was ``chosen``.
    """

    name: str
    section: str
    draw: Callable[..., Axes]
    reading: Callable[..., str]
    chosen: Mapping[str, str] = MappingProxyType({})


FIGURES = (
    FigureEntry("kept_vs_depth", "depth", kept_vs_depth, kept_reading),
    *(
        FigureEntry(f"accuracy_vs_depth_{name}", "depth", accuracy_vs_depth, depth_reading, chosen)
        for name, chosen in (("ndcg10", {"metric": "NDCG@10"}), ("hr10", {"metric": "HR@10"}))
    ),
    *(
        FigureEntry(
            f"accuracy_vs_{name.replace(' ', '_')}", "pareto", accuracy_vs_cost, cost_reading,
            {"cost": cost},
        )
        for cost, (name, _) in COSTS.items()
    ),
    FigureEntry("skip_sensitivity", "blocks", skip_sensitivity, skip_reading),
    FigureEntry("block_influence", "blocks", block_influence, influence_reading),
    FigureEntry("span_damage", "maps", span_map, span_reading, {"score": "damage"}),
    FigureEntry("angular_distance", "maps", span_map, span_reading, {"score": "angular-distance"}),
    FigureEntry("cka", "maps", span_map, span_reading, {"score": "cka"}),
    FigureEntry("settling_depth", "hurt", settling_depth, settling_reading),
    FigureEntry("ablation_changes", "ablation", ablation_changes, ablation_reading),
    FigureEntry("speed_vs_depth", "cost", speed_vs_depth, speed_reading),
)  # fmt: skip
