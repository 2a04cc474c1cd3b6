"""What the figures show, in a sentence each: their captions, and what a screen reader says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from depthprobe.evaluation.statistics import Interval
from depthprobe.report.blocks import change_of
from depthprobe.report.style import (
    accuracy,
    bounds,
    in_percent,
    method_order,
    method_style,
)
from depthprobe.report.summary import BY_BLOCK, CONTROLS, FULL, HEADLINE, SHOWN_ONLY, Point, Summary
from depthprobe.study import PROBES, base_of, ranges
from depthprobe.sweep.plan import BASELINES

# Not drawn as a curve over depth: baselines, the teacher, probes with many kept sets at a depth.
NOT_CURVES = BY_BLOCK | {*BASELINES, "full"}
MOST_VARIANTS = 8  # of one method that are told apart in a figure
# Without training: may be far below the teacher.
READ_ONLY = frozenset(PROBES) | CONTROLS


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
        method_style(p.method).label + ("" if p.method in BASELINES else f" {p.depth}")
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
