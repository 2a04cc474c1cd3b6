"""Who loses when blocks go, and what is recommended then: what one average over users hides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from depthprobe.evaluation.slices import ALL, FEWEST
from depthprobe.evaluation.statistics import Interval, interval, resampled_means
from depthprobe.report.points import Array
from depthprobe.report.style import NONE, accuracy, bounds, method_style, percent, significant
from depthprobe.report.summary import (
    CONTROLS,
    FULL,
    HEADLINE,
    LEVEL,
    Point,
    RunLike,
    Summary,
    as_summary,
)
from depthprobe.report.tables import Cell, Row, Table
from depthprobe.study import TRAINED, base_of
from depthprobe.sweep.measured import OF_LISTS
from depthprobe.sweep.plan import BASELINES

DIGITS = {"coverage@10": 1, "gini@10": 3, "popularity@10": 2}
DEPTHS = 3  # beside the answer: more columns are no longer read
Change = tuple[Interval, float]  # paired difference, and its share of the teacher's mean
Arms = tuple[list[int], list[Array]]  # places of points, and their metric with the teacher's last


def slice_table(run: RunLike | Summary) -> Table | None:
    """Paired change of NDCG@10 against the teacher, by slice; None without slices or models.

    Of the answer, and of the best trained model at a few depths, over the seeds that each shares
    with the teacher. Intervals are over the users of a slice and over seeds, one comparison at a
    time; slices of less than 30 users, or without any hit, have none.
    """
    summary = as_summary(run)
    teacher, points = summary.teacher, _chosen(summary)
    labels = getattr(summary.run, "slices", pd.DataFrame())
    if teacher is None or not points or len(labels) != summary.ranks.users(teacher.trials):
        return None
    arms, resamples = _arms(summary, points), int(summary.run.study.protocol.resamples)
    own = summary.ranks.values(FULL, HEADLINE, [teacher.trials])[0].mean(axis=0)  # (U,)
    rows, numbers, last = [], [], None
    for name, inside in _slices(labels):
        users, family = int(inside.sum()), name.partition(":")[0]
        mean = float(own[inside].mean())
        changes = _changes(arms, inside, resamples=resamples) if users >= FEWEST else {}
        found = [changes.get(place) for place in range(len(points))]
        cells = [Cell(_words(name)), Cell(f"{users:,}"), Cell(accuracy(mean))]
        cells += map(_change, found)
        rows.append(Row(tuple(cells), group=family != last, state=""))
        last = family
        numbers += [_numbers(name, users, mean, *pair) for pair in zip(points, found, strict=True)]
    columns = ("group", "users", "teacher", *map(_label, points))
    return Table("slices", columns, 1, tuple(rows), pd.DataFrame(numbers))


def lists_table(run: RunLike | Summary) -> Table | None:
    """Coverage, Gini index and popularity of what is recommended; None where it was not counted.

    Of the baselines, the teacher and the models of :func:`slice_table`; means over seeds, with the
    lowest and the highest below.
    """
    summary = as_summary(run)
    found = _of_lists(summary)
    shown = (*summary.of(*BASELINES, "full"), *_chosen(summary))
    rows, numbers = [], []
    for point in sorted(shown, key=summary.points.index):
        values = {
            name: [found[trial, name] for trial in point.trials if (trial, name) in found]
            for name in OF_LISTS
        }
        if not any(values.values()):
            continue
        depth = NONE if point.method in BASELINES else str(point.depth)
        cells = [Cell(method_style(point.method).label), Cell(depth)]
        cells += [_seeds(name, values[name]) for name in OF_LISTS]
        state = "teacher" if point.method == "full" else ""
        rows.append(Row(tuple(cells), state=state))
        means = {name: float(np.mean(own)) if own else math.nan for name, own in values.items()}
        numbers.append({"method": point.method, "depth": point.depth, **means})
    if not rows:
        return None
    columns = ("model", "depth", "coverage", "Gini index", "popularity")
    return Table("lists", columns, 1, tuple(rows), pd.DataFrame(numbers))


def _chosen(summary: Summary) -> tuple[Point, ...]:
    """The answer, and the best trained model at a few depths, shallow to deep.

    Of the depths at which most methods were trained: the shallowest, a middle one, the deepest.
    """
    best: dict[int, Point] = {}
    tried: Counter[int] = Counter()
    for point in summary.points:
        value, base = point.value(HEADLINE), base_of(point.method)
        if value is None or base not in TRAINED or base in CONTROLS:
            continue
        if not 0 < point.depth < (summary.blocks or 0):
            continue
        tried[point.depth] += 1
        other = best.get(point.depth)
        if other is None or value.value > other.accuracy[FULL, HEADLINE].value:
            best[point.depth] = point
    depths = [depth for depth in sorted(best) if tried[depth] == max(tried.values())]
    places = np.linspace(0, len(depths) - 1, min(DEPTHS, len(depths))).round().astype(int)
    points = [best[depths[place]] for place in places.tolist()]
    found = summary.sufficiency
    if found is not None and found.method is not None and found.depth is not None:
        answer = summary.candidates[found.method, found.depth]
        points = [point for point in points if point.depth != answer.depth] + [answer]
    return tuple(sorted(points, key=lambda point: (point.depth, point.method)))


def _slices(labels: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """All users, then each slice of each family in its order: name, and who is inside, (U,)."""
    yield ALL, np.ones(len(labels), bool)
    for family in labels.columns.drop("user"):
        values = labels[family]
        for label in values.cat.categories:
            yield f"{family}:{label}", (values == label).to_numpy(bool)


def _arms(summary: Summary, points: Sequence[Point]) -> list[Arms]:
    """Points that share their seeds with the teacher stand against the same reference."""
    teacher = summary.teacher
    assert teacher is not None  # noqa: S101
    seeds: dict[tuple[int, ...], list[int]] = {}
    for place, point in enumerate(points):
        common = tuple(seed for seed in point.seeds if seed in teacher.seeds)
        seeds.setdefault(common, []).append(place)
    found = []
    for common, places in seeds.items():
        arms = [p.of_seeds(common) for p in (*(points[place] for place in places), teacher)]
        if common and all(summary.ranks.has(arm, FULL) for arm in arms):
            found.append((places, summary.ranks.values(FULL, HEADLINE, arms)))
    return found


def _changes(groups: Sequence[Arms], inside: np.ndarray, *, resamples: int) -> dict[int, Change]:
    """Paired changes within a slice, by the point's place; all share their draws."""
    found = {}
    for places, arms in groups:
        own = [np.ascontiguousarray(arm[:, inside]) for arm in arms]
        drawn = resampled_means(own, resamples=resamples, seed=0)
        draws = np.concatenate([both for both, _ in drawn])  # (R, points + 1)
        reference = float(own[-1].mean())
        for index, place in enumerate(places):
            if not (own[index].any() or own[-1].any()):
                continue  # no hit in either arm: draws are all 0, and sure of nothing
            value = float(own[index].mean()) - reference
            change = interval(value, draws[:, index] - draws[:, -1], level=LEVEL)
            found[place] = change, value / reference if reference else math.nan
    return found


def _of_lists(summary: Summary) -> dict[tuple[str, str], float]:
    """What was counted of recommended items, by trial and metric."""
    metrics = summary.run.metrics
    if metrics.empty:
        return {}
    chosen = metrics[metrics["metric"].isin(OF_LISTS)]
    columns = (chosen[name] for name in ("trial", "metric", "value"))
    return {
        (str(trial), str(name)): float(value) for trial, name, value in zip(*columns, strict=True)
    }


def _words(name: str) -> str:
    family, _, label = name.partition(":")
    if name == ALL:
        return "all"
    if family == "history":
        return f"history of {label} item{'' if label == '1' else 's'}"
    return f"{label} target" if family == "target" else f"{family} {label}"


def _label(point: Point) -> str:
    return f"{method_style(point.method).label} {point.depth}"


def _change(found: Change | None) -> Cell:
    if found is None:
        return Cell(NONE)
    change, share = found
    relative = f", {'+' if share >= 0 else ''}{percent(share)}" if math.isfinite(share) else ""
    return Cell(f"{change.value:+.4f}", f"{bounds(change, digits=4)}{relative}")


def _numbers(
    name: str, users: int, mean: float, point: Point, found: Change | None
) -> dict[str, object]:
    """Every digit of a cell."""
    change, share = found or (Interval(math.nan, math.nan, math.nan), math.nan)
    return {
        "slice": name, "users": users, "method": point.method, "depth": point.depth,
        "teacher": mean, "difference": change.value, "difference low": change.low,
        "difference high": change.high, "relative": share,
    }  # fmt: skip


def _seeds(name: str, values: Sequence[float]) -> Cell:
    """A mean over seeds, and between what it lies."""
    if not values:
        return Cell(NONE)
    mean, share = float(np.mean(values)), name.startswith("coverage")
    ends = Interval(mean, min(values), max(values))
    note = bounds(ends, scale=100 if share else 1, digits=DIGITS[name])
    return Cell(percent(mean) if share else significant(mean), note if len(values) > 1 else "")
