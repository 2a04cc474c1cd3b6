"""The figures of a report: each is a function that takes a run and returns Axes.

Every function takes a run, its folder or the result of :func:`summarise`, and draws into ``ax`` if
given. Summarising takes seconds: for several figures, do it once. On the page each figure has a
caption, which screen readers read too. A run without data for a figure is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from depthprobe.evaluation.statistics import Interval
from depthprobe.formatting import (
    count,
    in_percent,
    plain_percent,
    round_count,
    rounded,
    significant,
    times,
    with_bounds,
)
from depthprobe.methods import INK, base_of, method_info, method_order
from depthprobe.report import drawing, front
from depthprobe.report.block_figures import (
    ablation_changes,
    block_influence,
    settling_depth,
    skip_sensitivity,
    span_map,
)
from depthprobe.report.budgets import options_by_budget, predicted_damage
from depthprobe.report.controls import selections
from depthprobe.report.drawing import FIGURES, MUTED, Look, figure, need, scaled, without_bar
from depthprobe.report.numbers import (
    FULL,
    POPULARITY,
    Point,
    Source,
    Summary,
    as_summary,
    summarise,
)
from depthprobe.report.search import search_steps
from depthprobe.report.tables import timed
from depthprobe.report.title_figures import accuracy_vs_title_depth, title_spread
from depthprobe.study import is_candidate, ranges

__all__ = [
    "FIGURES",
    "ablation_changes",
    "accuracy_vs_cost",
    "accuracy_vs_depth",
    "accuracy_vs_title_depth",
    "block_influence",
    "kept_side_by_side",
    "kept_vs_depth",
    "options_by_budget",
    "predicted_damage",
    "search_steps",
    "selections",
    "settling_depth",
    "skip_sensitivity",
    "span_map",
    "speed_vs_depth",
    "summarise",
    "title_spread",
]

Curves = dict[str, list[tuple[Point, Interval]]]  # by method, shallow to deep

# --- what is drawn ---------------------------------------------------------------------------


def shown_methods(summary: Summary) -> list[str]:
    """The methods that figures show, in the order of reports.

    Variants of a shown method are left out, since they have a table of their own.
    """
    methods = {point.method for point in summary.points}
    shown = (name for name in methods if name == base_of(name) or base_of(name) not in methods)
    return sorted(shown, key=method_order)


def curves(summary: Summary, metric: str, *, kept: bool = False) -> Curves:
    """The accuracy of each method over depth; with ``kept`` as a share of the teacher's."""
    found: Curves = {}
    for method in shown_methods(summary):
        info = method_info(method)
        if info.role not in ("baseline", "teacher") and not (info.by_block or info.items_only):
            for point in (p for p in summary.of(method) if not p.levers):  # only depth changed
                value = (point.ratio if kept else point.accuracy).get((FULL, metric))
                if value is not None:
                    found.setdefault(method, []).append((point, value))
    return found


def all_points(drawn: Curves) -> list[tuple[Point, Interval]]:
    """The points of all curves."""
    return [pair for pairs in drawn.values() for pair in pairs]


def mean(point: Point, metric: str) -> float:
    """The mean of a metric that the point has."""
    return point.accuracy[FULL, metric].value


def _depth_axis(ax: Axes, summary: Summary, depths: Iterable[int]) -> None:
    """The axis of depths, from 1, or 0 if that is drawn, to the full backbone."""
    ax.set_xlim(min([1, *depths]) - 0.6, summary.blocks + 0.6)
    drawing.block_axis(ax.xaxis, "depth (blocks kept)", 12)


def _draw_curves(ax: Axes, summary: Summary, drawn: Curves, scale: float = 1) -> None:
    """Draw each method's points with their intervals over depth."""
    for index, (name, pairs) in enumerate(drawn.items()):
        look, depths = method_info(name), [point.depth for point, _ in pairs]
        places = drawing.beside(depths, index, len(drawn))
        values = [scaled(value, scale) for _, value in pairs]
        show = with_bounds if scale == 1 else in_percent
        tips = [f"{point.name}: {show(value)}" for point, value in pairs]
        drawing.draw_series(ax, places, values, look, tips=tips, linestyle=look.line, zorder=4)
    _depth_axis(ax, summary, (point.depth for point, _ in all_points(drawn)))


# --- accuracy against depth: as it is, and as a share of the teacher's -----------------------


@figure("depth")
def kept_vs_depth(
    ax: Axes,
    summary: Summary,
    *,
    metric: str | None = None,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
) -> str:
    """Share of the teacher's accuracy against depth, with the margin; very low shares are cut off.

    Bars are confidence intervals of the paired ratio, so differences between users cancel.
    ``limits`` are those of the scale, in per cent; by default :func:`kept_limits` of this run.
    """
    metric, floor = metric or summary.headline, 1 - summary.margin
    drawn = curves(summary, metric, kept=True)
    study = summary.run.study
    offered = [
        (point, share) for point, share in all_points(drawn) if is_candidate(study, point.method)
    ]
    need(offered, summary, "a teacher and a shallower model")
    ax.axhline(100, color=INK, linewidth=1.1, label="teacher")
    least = plain_percent(floor)
    label = f"margin: {least}"
    ax.axhline(100 * floor, color=MUTED, linewidth=1.1, linestyle="--", label=label)
    _draw_curves(ax, summary, drawn, 100)
    ax.set_ylim(limits or kept_limits(summary, metric=metric))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10]))
    drawing.percent_axis(ax.yaxis)
    cut = _below_scale(ax, all_points(drawn), 100)
    drawing.finish(ax, title or f"Share of the teacher's {metric} kept")

    rows = summary.sufficiency.rows if summary.sufficiency else ()
    within, shown = (
        ranges(sorted(depths)).replace("-", "–").replace(",", ", ") or "none"
        for depths in (
            {point.depth for point, share in offered if share.value >= floor},
            {row.depth for row in rows if row.shown},
        )
    )
    best, most = max(offered, key=lambda pair: pair[1].value)
    return (
        f"Depths whose mean keeps {least} of the teacher's {metric}: {within}. Depths "
        f"for which this is shown with confidence: {shown}. Of the candidates, {best.name} keeps "
        f"the most: {in_percent(most)}.{cut}{without_bar(share for _, share in offered)}"
    )


LOWEST_KEPT = 0.85  # lowest share to which an untrained model may stretch the scale


def kept_limits(*summaries: Summary, metric: str | None = None) -> tuple[float, float]:
    """The limits of the scale for shares of the teachers' accuracy, in per cent."""
    pairs = [p for s in summaries for p in all_points(curves(s, metric or s.headline, kept=True))]
    # read-outs fall to nearly zero, so only those close to the teacher may widen the scale
    reach = [scaled(s) for p, s in pairs if p.info.role == "trained" or s.low > LOWEST_KEPT]
    low, high = drawing.limits(reach, 100.0, *(100 * (1 - one.margin) for one in summaries))
    return low - 1.5, high + 1.5


def kept_side_by_side(runs: Sequence[Source]) -> list[Axes]:
    """:func:`kept_vs_depth` of several runs in one figure, on one scale; one Axes per run.

    Each panel has the name of the run's folder; every run is compared with its own teacher.
    """
    summaries = [as_summary(run) for run in runs]
    limits = kept_limits(*summaries)
    with drawing.figure_style():
        size = (drawing.SIZE[0] * len(summaries), drawing.SIZE[1])
        panels = Figure(figsize=size, layout="constrained")
        axes: list[Axes] = list(panels.subplots(1, len(summaries), squeeze=False)[0])
        for ax, summary in zip(axes, summaries, strict=True):
            kept_vs_depth(summary, limits=limits, title=summary.run.path.name, ax=ax)
        axes[0].set_ylabel(f"share of the teacher's {summaries[0].headline}")
    return axes


@figure(
    "depth",
    accuracy_vs_depth_ndcg10={"metric": "NDCG@10"},
    accuracy_vs_depth_hr10={"metric": "HR@10"},
)
def accuracy_vs_depth(ax: Axes, summary: Summary, *, metric: str | None = None) -> str:
    """Accuracy of every method against depth, the teacher and the baselines as bands.

    Points are means over users and seeds; bars and bands are confidence intervals.
    """
    metric = metric or summary.headline
    drawn, teacher = curves(summary, metric), summary.teacher
    need(drawn, summary, "a method at some depth")
    levels = [p for p in summary.points if p.info.role in ("baseline", "teacher")]
    for point in levels:
        drawing.draw_level(ax, point.value(metric), point.info)
    _draw_curves(ax, summary, drawn)
    measured = [(p, value) for p in levels if (value := p.value(metric))] + all_points(drawn)
    cut = _cut_off(ax, measured)
    drawing.finish(ax, f"{metric} against depth")

    said = [f"{metric} against depth."]
    if teacher is not None and (value := teacher.value(metric)) is not None:
        said.append(f"The teacher ({teacher.depth} blocks) reaches {with_bounds(value)}.")
    depth = half = summary.blocks // 2
    points = [point for point, _ in all_points(drawn)]
    trained = [point for point in points if point.info.role == "trained" and point.depth <= half]
    if trained:
        best = max(trained, key=lambda point: mean(point, metric))
        depth = best.depth
        said.append(
            f"The best trained model of at most {half} blocks is {best.name}: "
            f"{with_bounds(best.accuracy[FULL, metric])}."
        )
    others = [point for point in points if point.depth == depth]
    probes = [point for point in others if point.info.role == "probe" and point.on_offer]
    controls = [point for point in others if point.info.role == "control"]
    for point in controls + sorted(probes, key=lambda point: mean(point, metric))[-1:]:
        name = point.name[0].upper() + point.name[1:]
        said.append(f"{name} reaches {with_bounds(point.accuracy[FULL, metric])}.")
    return " ".join(said) + cut + without_bar(value for _, value in all_points(drawn))


def _cut_off(ax: Axes, measured: Sequence[tuple[Point, Interval]]) -> str:
    """Fit the scale to the models that matter; returns a sentence on the points below it.

    Popularity and probes fall to nearly zero, and a scale with them would hide the differences
    between the others. They matter only if there are no other models.
    """
    others = {p.look.role for p, _ in measured} - {"baseline", "teacher", "probe"}
    reach = [
        value
        for p, value in measured
        if not others or (p.method != POPULARITY and p.look.role != "probe")
    ]
    drawing.own_range(ax, reach)
    return _below_scale(ax, measured)


def _below_scale(ax: Axes, measured: Sequence[tuple[Point, Interval]], scale: float = 1) -> str:
    """Remove the bars of points below the scale; returns a sentence that names these points."""
    bottom, below = ax.get_ylim()[0], dict[str, list[int]]()
    drawing.drop_bars(ax, bottom)
    for point, value in measured:
        if scale * value.value < bottom:
            below.setdefault(point.look.label, []).append(point.depth)
    depths = {
        name: ranges(sorted({*found})).replace("-", "\u2013") for name, found in below.items()
    }
    popular = method_info(POPULARITY).label  # has no depth
    words = [name if name == popular else f"{name} {found}" for name, found in depths.items()]
    said = re.sub(",(?! )", ", ", ", ".join(words))
    return f" Below the scale: {said}." if said else ""


# --- accuracy against what it costs, and how much faster a shallower model is ----------------

COSTS = {
    "bytes": ("size", "bytes of the weights"),
    "parameters": ("parameters", "parameters in all"),
    "latency": ("latency", "milliseconds for one user alone"),
    "inference": ("time a user in batches", "milliseconds a user, {} together"),
    "training": ("training time", "seconds of training, the teacher's included"),
}
# for models with levers besides depth: fewest levers first, then by name
LEVER_MARKERS = ("s", "D", "^", "v", "P", "X", "<", ">", "p", "h")


@figure(
    "pareto",
    accuracy_vs_size={"cost": front.SIZE},
    accuracy_vs_latency={"cost": "latency"},
    accuracy_vs_inference_time={"cost": "inference"},
    accuracy_vs_training_time={"cost": "training"},
)
def accuracy_vs_cost(
    ax: Axes, summary: Summary, *, cost: str = front.SIZE, metric: str | None = None
) -> str:
    """Share of the teacher's accuracy against a cost: every model and lever, with the Pareto front.

    ``cost`` is "size" (bytes, or parameters if bytes were not counted), "parameters", "latency"
    (one user), "inference" (per user, in batches) or "training". Vertical bars are confidence
    intervals, horizontal bars the quartiles of the timing rounds. A hollow marker is a model with a
    lever besides depth; a thin line joins it with the same model without the lever. Models of the
    front are labelled with depth and levers. Without a teacher the accuracy itself is shown.
    """
    metric, cost = metric or summary.headline, front.cost_named(summary, cost)
    (name, label), points = COSTS[cost], front.priced(summary, cost, metric)
    need(len(points) > 1, summary, f"the {name} of two models")
    kept = summary.teacher is not None
    values = [
        (point, scaled(value, 100 if kept else 1))
        for point in front.offered(summary, metric)
        if (value := front.reached(summary, point, metric)) is not None
    ]
    prices = {point.trials: front.price(summary, point, cost) for point in points}
    drawn = [(point, value) for point, value in values if point.trials in prices]
    places = {point.trials: (prices[point.trials].value, value.value) for point, value in drawn}
    _draw_priced(ax, drawn, prices, cost)
    for point in points:
        without = front.without_last(summary, point)
        if without is not None and without.trials in places:
            ends = zip(places[without.trials], places[point.trials], strict=True)
            ax.plot(*ends, color=point.look.colour, linewidth=0.7, alpha=0.55, zorder=1)
    best = front.pareto_front(summary, cost, metric)
    ax.plot(
        *zip(*(places[point.trials] for point in best), strict=True), drawstyle="steps-post",
        color=INK, linewidth=1, alpha=0.4, zorder=1,
        label="Pareto front" if len(best) > 1 else "_alone",
    )  # fmt: skip
    costs = [each.value for each in prices.values()]
    if max(costs) >= 4 * min(costs):
        ax.set_xscale("log")
        ax.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
        drawing.log_ticks(ax.xaxis, round_count, wide=max(costs) >= 100 * min(costs))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: round_count(value)))
    cut = _cut_off(ax, values)
    _name_front(ax, best, [places[point.trials] for point in best])
    ax.set_xlabel(label.format(front.batch_of(summary)))
    if kept:
        drawing.percent_axis(ax.yaxis)
    drawing.finish(ax, f"{metric} {'kept, ' if kept else ''}against {name}")
    what = f"Share of the teacher's {metric}" if kept else metric
    return (
        f"{what} against {name}. On the means, no other model is both cheaper and more accurate "
        f"than these: {'; '.join(point.name for point in best)}."
        f"{front.cheapest_words(summary, cost, metric)}{cut}"
        f"{without_bar(value for _, value in drawn)}"
    )


LETTER, LINE = 0.0155, 0.05  # of 8-point labels, as shares of the axes' width and height


def _name_front(ax: Axes, front: Sequence[Point], places: Sequence[tuple[float, float]]) -> None:
    """Label each point of a front with depth and levers, above labels that it would cover."""
    taken: list[tuple[float, float, float]] = []  # left, right, bottom
    for point, place in zip(front, places, strict=True):
        words = ", ".join((*[str(point.depth)] * (point.depth > 0), *point.levers))
        x, y = ax.transAxes.inverted().transform(ax.transData.transform(place))
        if y < 0:  # below the scale
            continue
        width = LETTER * len(words)
        # no other point lies above and left of a point of the front, but the axis may
        left, bottom = (x - 0.015 - width if x > width else x + 0.01), y + 0.02
        while any(left < b and left + width > a and abs(bottom - c) < LINE for a, b, c in taken):
            bottom += LINE
        if words:
            taken.append((left, left + width, bottom))
            paper = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6}
            ax.text(left, bottom, words, transform=ax.transAxes, fontsize=8, bbox=paper, zorder=8)


def _draw_priced(
    ax: Axes,
    drawn: Sequence[tuple[Point, Interval]],
    prices: Mapping[tuple[str, ...], Interval],
    cost: str,
) -> None:
    """Draw a series per method and levers; the legend names methods and levers separately."""
    series: dict[tuple[str, tuple[str, ...]], list[tuple[Point, Interval]]] = {}
    for point, value in drawn:
        series.setdefault((point.plain, point.levers), []).append((point, value))
    pulled = sorted({levers for _, levers in series if levers}, key=lambda own: (len(own), own))
    markers = dict(zip(pulled, itertools.cycle(LEVER_MARKERS), strict=False))
    timed, named = cost in ("latency", "inference"), set[str]()
    unit = {"latency": "ms", "inference": "ms a user", "training": "s"}.get(cost, cost)
    for (method, levers), own in series.items():
        look, hollow, own_prices = method_info(method), {}, [prices[p.trials] for p, _ in own]
        if levers:
            look, hollow = replace(look, marker=markers[levers]), {"markerfacecolor": "white"}
        numbers = [(significant if timed else count)(each.value) for each in own_prices]
        tips = [
            f"{point.name}: {with_bounds(value, 1 if value.value > 2 else 4)}, {number} {unit}"
            for (point, value), number in zip(own, numbers, strict=True)
        ]
        drawing.draw_series(
            ax, [each.value for each in own_prices], [value for _, value in own], look, tips=tips,
            xerr=drawing.bars(own_prices) if timed else None, linestyle="none",
            label="_again" if method in named else look.label, **hollow,
        )  # fmt: skip
        named.add(method)
    for levers, marker in markers.items():  # as a series without points, which legends list last
        options: dict[str, Any] = {"color": MUTED, "markerfacecolor": "white", "linestyle": ""}
        ax.errorbar([], [], marker=marker, label=", ".join(levers), **options)


KINDS = {
    "inference": Look("to serve", "#0069a8", "s"),
    "training": Look("to train", "#c2500a", "o"),
}


@figure("cost")
def speed_vs_depth(ax: Axes, summary: Summary) -> str:
    """How many times faster than at full depth a model is served and trained, by depth.

    Bars are 95 % intervals of the median over paired rounds. The dotted line assumes that blocks
    take all the time; points lie below it because embeddings, head and scoring take time too.
    """
    speeds: Mapping[str, dict[int, Interval]] = {
        kind: {depth: point.speed[kind] for depth, point in timed(summary, kind).items()}
        for kind in KINDS
    }
    depths = [depth for own in speeds.values() for depth in own]
    need(depths, summary, "times of a depth and the teacher")
    blocks, first, said = summary.blocks, min(depths), []
    for index, (kind, look) in enumerate(KINDS.items()):
        if own := speeds[kind]:
            tips = [f"depth {d}, {look.label}: {times(speed)}" for d, speed in own.items()]
            places = drawing.beside(own, index, 2, 0.16)
            drawing.draw_series(ax, places, [*own.values()], look, tips=tips)
            depth, speed = next(iter(own.items()))
            said.append(
                f"At depth {depth} a model is {times(speed)} as fast {look.label} as at "
                f"full depth; blocks alone would give {significant(blocks / depth)}\u00d7."
            )
    ideal = np.linspace(first, blocks, 100)
    ax.plot(ideal, blocks / ideal, ":", color=MUTED, linewidth=1.1, label="blocks alone")
    ax.axhline(1, color=INK, linewidth=0.9)
    every_speed = [speed for own in speeds.values() for speed in own.values()]
    low, high = drawing.limits(every_speed, blocks / first)
    ax.set_yscale("log")
    ax.set_ylim(min(0.85, 0.95 * low) if low > 0 else 0.5, 1.15 * high)
    drawing.log_ticks(ax.yaxis, lambda value: f"{rounded(value)}\u00d7")
    _depth_axis(ax, summary, depths)
    drawing.finish(ax, "Times faster than at full depth")
    return " ".join(said)
