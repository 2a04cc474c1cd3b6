"""The Pareto front over all levers: models that no other model beats in accuracy and cost.

A lever is a way to make a model smaller: fewer blocks, narrower blocks, blocks that run twice, or
fewer bits per weight. Levers can be combined: do their losses add up?
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from depthprobe.evaluation.statistics import Interval, interaction_interval, ratio_interval
from depthprobe.formatting import (
    count,
    duration,
    in_percent,
    percent,
    plain_percent,
    significant,
    with_bounds,
)
from depthprobe.methods import method_order
from depthprobe.report.numbers import (
    FULL,
    POPULARITY,
    TEACHER,
    Point,
    Source,
    Summary,
    as_summary,
)
from depthprobe.report.tables import (
    DEPTH,
    NOTHING,
    Column,
    Table,
    Values,
    make_table,
    milliseconds,
    plain,
    values_of,
)

SIZE = "size"  # bytes, or parameters if a run has not counted bytes
AXES = (SIZE, "latency", "inference", "training")


def cost_named(summary: Summary, cost: str) -> str:
    """The cost; for "size" bytes, if every model on offer has them counted, else parameters."""
    if cost != SIZE:
        return cost
    return "bytes" if all(point.bytes for point in offered(summary)) else "parameters"


def price(summary: Summary, point: Point, cost: str) -> Interval:
    """The cost of a point; times have quartiles, and times of batches are per user."""
    if cost not in point.time or cost == "training":
        number = point.cost(cost_named(summary, cost)) or 0.0
        return Interval(number, number, number)
    users = batch_of(summary) if cost == "inference" else 1
    time = point.time[cost]
    return Interval(time.value / users, time.low / users, time.high / users)


def batch_of(summary: Summary) -> int:
    """How many users were served together when times were measured."""
    return int((summary.run.manifest.timing or {}).get("batch", 1))


def offered(summary: Summary, metric: str | None = None) -> list[Point]:
    """Points with a known accuracy that could be served, so without popularity and most probes."""
    return [
        point
        for point in sorted(summary.points, key=_order)
        if point.on_offer
        and point.method != POPULARITY
        and reached(summary, point, metric) is not None
    ]


def _order(point: Point) -> tuple[tuple[int, str], int, int]:
    return method_order(point.plain), point.depth, len(point.levers)


def priced(summary: Summary, cost: str, metric: str | None = None) -> list[Point]:
    """The points on offer with a known cost."""
    kind = cost_named(summary, cost)
    return [point for point in offered(summary, metric) if point.cost(kind)]


def reached(summary: Summary, point: Point, metric: str | None = None) -> Interval | None:
    """The share of the teacher's accuracy; without a teacher the accuracy itself."""
    if summary.teacher is None:
        return point.value(metric or summary.headline)
    return summary.share(point, metric)


def pareto_front(summary: Summary, cost: str, metric: str | None = None) -> list[Point]:
    """Points that no other point beats: all cheaper ones are less accurate. Cheapest first."""
    kind = cost_named(summary, cost)
    found = [
        (price(summary, point, kind).value, -value.value, point)
        for point in priced(summary, kind, metric)
        if (value := reached(summary, point, metric)) is not None
    ]
    front, least = list[Point](), math.inf
    for _, lost, point in sorted(found, key=lambda each: each[:2]):
        if lost < least:
            front.append(point)
            least = lost
    return front


def without_last(summary: Summary, point: Point) -> Point | None:
    """The same model without its last lever: width, loops or quantisation."""
    if point.of:
        return summary.source(point)
    own = (p for p in summary.points if (p.method, p.kept) == (point.plain, point.kept))
    return next(own, None) if point.levers else None


def levers(summary: Summary, point: Point) -> int:
    """How many levers a model uses; fewer blocks count as one."""
    return (0 < point.depth < summary.blocks) + len(point.levers)


def cheapest_words(summary: Summary, cost: str, metric: str | None = None) -> str:
    """A sentence on the cheapest models within the margin, with one lever and with several."""
    teacher, kind = summary.teacher, cost_named(summary, cost)
    if teacher is None or not (full := price(summary, teacher, kind).value):
        return ""
    near = [
        point
        for point in priced(summary, kind, metric)
        if price(summary, point, kind).value < full
        and (share := summary.share(point, metric)) is not None
        and share.value >= 1 - summary.margin
        and (point.look.candidate or point.plain == TEACHER)
    ]
    said = []
    for what, least, most in (("one lever", 1, 1), ("several", 2, 9)):
        own = [point for point in near if least <= levers(summary, point) <= most]
        if own:
            best = min(own, key=lambda point: price(summary, point, kind).value)
            part = percent(price(summary, best, kind).value / full, 0)
            said.append(f"the cheapest with {what} is {best.name} ({part} of the teacher's)")
    if not said:
        return ""
    margin = plain_percent(summary.margin)
    return f" Of the models whose mean loses at most {margin}, {', '.join(said)}."


# --- every model, by what it costs -----------------------------------------------------------


def front_table(run: Source) -> Table | None:
    """Every model on offer with its accuracy, its costs, and the fronts it is on.

    None for fewer than two models. ``of source`` is the share of the same model's accuracy before
    it was quantised.
    """
    summary = as_summary(run)
    points = offered(summary)
    if len(points) < 2:
        return None
    fronts = {cost: {p.trials for p in pareto_front(summary, cost)} for cost in AXES}
    teacher, rows = summary.teacher, list[Values]()
    for point in points:
        source, row = summary.source(point), values_of(point)
        row |= {
            "levers": ", ".join(point.levers),
            "bytes": point.bytes,
            "training seconds": point.training,
            "of source": (source and summary.against(point, source)) or NOTHING,
            "user ms": price(summary, point, "inference").value or None,
            "label": point.look.label,
            "front": ", ".join(cost for cost in AXES if point.trials in fronts[cost]),
        }
        rows.append(row)
    size = cost_named(summary, SIZE)
    full = teacher.cost(size) if teacher else None

    def sized(row: Values) -> str:
        own = row["bytes"] if size == "bytes" else row.get("parameters total")
        part = f"\n{percent(own / full, 0)}" if own and full and row["method"] != TEACHER else ""
        return count(own) + part

    columns: list[Column] = [("method", "label", plain), DEPTH]
    if any(point.levers for point in points):
        columns.append(("levers", lambda row: row["levers"] or None, plain))
    columns.append((summary.headline, summary.headline, with_bounds))
    if teacher is not None:
        columns.append(("of the teacher's", f"{summary.headline} of teacher", in_percent))
    if any(point.of for point in points):
        columns.append(("of its source's", "of source", in_percent))
    columns.append((size, sized, plain))
    if any("latency" in point.time for point in points):
        columns.append(milliseconds("one user, ms", "latency"))
    if any("inference" in point.time for point in points):
        columns.append((f"of {batch_of(summary)}, ms a user", "user ms", significant))
    if any(point.training for point in points):
        columns.append(("training", "training seconds", duration))
    columns.append(("on the front of", lambda row: row["front"] or None, plain))
    return make_table("front", rows, columns, group="label")


# --- do the losses add up? -------------------------------------------------------------------


class Interaction(NamedTuple):
    """Two levers combined, mostly one with depth; losses are shares of the teacher's accuracy."""

    lever: str
    model: Point  # the model without the lever
    seeds: int
    alone: Interval  # its loss
    other: Interval  # the lever's loss at full depth
    both: Interval
    more: Interval  # the loss of both together, less the sum of the two losses


def interactions(summary: Summary) -> list[Interaction]:
    """The interaction for each model with a lever whose four arms share a seed."""
    return [] if summary.teacher is None else list(_interactions(summary, summary.teacher))


def _interactions(summary: Summary, teacher: Point) -> Iterator[Interaction]:
    for both in sorted(summary.points, key=lambda point: (point.levers[-1:], _order(point))):
        if not both.levers:
            continue
        model, alone = without_last(summary, both), _alone(summary, both, teacher)
        if model is None or alone is None or alone is both or model is teacher:
            continue
        arms = (model, alone, both, teacher)
        seeds = [s for s in teacher.seeds if all(s in point.seeds for point in arms)]
        trials = [point.of_seeds(seeds) for point in arms]
        if not seeds or not all(summary.ranks.has(arm) for arm in trials):
            continue
        values = summary.ranks.values(FULL, summary.headline, trials)
        if not values[-1].any():
            continue
        shares = (ratio_interval(arm, values[-1], level=summary.level) for arm in values[:3])
        own, other, joint = (Interval(1 - s.value, 1 - s.high, 1 - s.low) for s in shares)
        more = interaction_interval(*values, level=summary.level)
        yield Interaction(both.levers[-1], model, len(seeds), own, other, joint, more)


def _alone(summary: Summary, both: Point, teacher: Point) -> Point | None:
    """The full-depth model with the last lever of ``both``, and no other lever."""
    own = summary.quantized(teacher) if both.of else summary.of(both.method)
    named = (p for p in own if p.levers == both.levers[-1:] and p.depth == summary.blocks)
    return next(named, None)


def interaction_table(run: Source) -> Table | None:
    """What two levers lose separately and together, in shares of the teacher's accuracy.

    Paired by user and seed; one comparison at a time. None if no model has all four arms.
    """
    rows = [
        {
            "lever": found.lever, "method": found.model.method, "depth": found.model.depth,
            "model": found.model.name, "seeds": found.seeds, "alone": found.alone,
            "lever alone": found.other, "both": found.both, "more than the sum": found.more,
        }
        for found in interactions(as_summary(run))
    ]  # fmt: skip
    columns: list[Column] = [
        ("lever", "lever", plain), ("model", "model", plain),
        *((head, name, in_percent) for head, name in HEADS),
        ("more than the sum", "more than the sum", partial(in_percent, sign=True)),
    ]  # fmt: skip
    return make_table("interaction", rows, columns, words=2, group="lever")


HEADS = (
    ("the model loses", "alone"), ("the lever alone", "lever alone"), ("both", "both"),
)  # fmt: skip


def interaction_words(run: Source) -> str:
    """A sentence per lever: do its loss and that of the other lever, mostly depth, add up?"""
    summary, said = as_summary(run), []
    found = interactions(summary)
    for lever in dict.fromkeys(each.lever for each in found):
        own = [each for each in found if each.lever == lever]
        shown = [each for each in own if each.more.low > 0 or each.more.high < 0]
        most = max(shown or own, key=lambda each: abs(each.more.value))
        more = most.more
        if all(each.more == each.other == Interval(0, 0, 0) for each in own):
            said.append(f"{lever} changes no test user's {summary.headline}.")
            continue
        if not shown:
            rest = f", the most of {len(own)} models" * (len(own) > 1)
            said.append(
                f"No interaction of {lever} is shown: with {most.model.name} the joint loss "
                f"differs from the sum by {_points(more, sign=True)}{rest}."
            )
            continue
        less = more if more.value > 0 else Interval(-more.value, -more.high, -more.low)
        which = "more" if more.value > 0 else "less"
        rest = f" {len(shown)} of {len(own)} such intervals leave out 0." * (len(own) > 1)
        said.append(
            f"{lever} costs {which} on {most.model.name} than on the teacher: by {_points(less)}."
            f"{rest}"
        )
    return " ".join(said)


def _points(more: Interval, *, sign: bool = False) -> str:
    """Percentage points of the teacher's accuracy."""
    hundredths = Interval(100 * more.value, 100 * more.low, 100 * more.high)
    return f"{with_bounds(hundredths, 2, sign=sign)} points"
