"""Trained shallower models against plain fine-tuning at the same depth: what each way adds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from depthprobe.evaluation.statistics import Interval, bootstrap_difference, bootstrap_ratio
from depthprobe.report.style import NONE, accuracy, bounds, method_style, percent, significant
from depthprobe.report.summary import HEADLINE, Point, RunLike, Summary, as_summary
from depthprobe.report.tables import Cell, Row, Table
from depthprobe.study import TRAINED, base_of

PLAIN = "finetune"
COLUMNS = (
    "depth",
    "method",
    "seeds",
    HEADLINE,
    "change",
    "relative",
    "training, s",
    "with teacher",
)


def ablation_table(run: RunLike | Summary) -> Table | None:
    """Paired change of NDCG@10 against fine-tuning, by depth; None without two to compare.

    Over the seeds that both have. Seconds are means over seeds, without and with those that the
    teacher took, whose training and features all students share.
    """
    summary = as_summary(run)
    rows, numbers, last = [], [], None
    for depth in sorted({point.depth for point in summary.points}):
        plain = next((p for p in summary.of(PLAIN) if p.depth == depth), None)
        others = [
            p
            for p in summary.points
            if p.depth == depth and base_of(p.method) in TRAINED and p.method != PLAIN
        ]
        if plain is None:
            continue
        for point in others:
            compared = _compared(summary, point, plain)
            if compared is None:
                continue
            if last != depth:
                rows.append(_row(summary, plain, None, group=True))
                numbers.append(_numbers(summary, plain, None))
            last = depth
            rows.append(_row(summary, point, compared, group=False))
            numbers.append(_numbers(summary, point, compared))
    if not rows:
        return None
    return Table("ablation", COLUMNS, 2, tuple(rows), pd.DataFrame(numbers))


_Change = tuple[int, Interval, Interval]  # seeds, difference, ratio


def _compared(summary: Summary, point: Point, plain: Point) -> _Change | None:
    arms = summary.paired(point, plain)
    if arms is None or not arms[1].any():
        return None
    resamples = int(summary.run.study.protocol.resamples)
    difference = bootstrap_difference(*arms, resamples=resamples)
    return len(arms[0]), difference, bootstrap_ratio(*arms, resamples=resamples)


def _row(summary: Summary, point: Point, compared: _Change | None, *, group: bool) -> Row:
    value = point.value(HEADLINE)
    seconds, teacher = _seconds(summary, point)
    cells = [
        Cell(str(point.depth)),
        Cell(method_style(point.method).label),
        Cell(str(compared[0] if compared else len(point.seeds))),
        Cell(accuracy(value.value), bounds(value, digits=4)) if value else Cell(NONE),
    ]
    if compared is None:
        cells += [Cell("0"), Cell(NONE)]
    else:
        _, change, ratio = compared
        relative = Interval(ratio.value - 1, ratio.low - 1, ratio.high - 1)
        sign = "+" if relative.value >= 0 else ""
        cells += [
            Cell(f"{change.value:+.4f}", bounds(change, digits=4)),
            Cell(f"{sign}{percent(relative.value)}", bounds(relative, scale=100, digits=1)),
        ]
    cells += [Cell(significant(seconds)), Cell(significant(seconds + teacher))]
    return Row(tuple(cells), group=group)


def _numbers(summary: Summary, point: Point, compared: _Change | None) -> dict[str, object]:
    """Every digit of a row."""
    seconds, teacher = _seconds(summary, point)
    value = point.value(HEADLINE)
    out: dict[str, object] = {"depth": point.depth, "method": point.method}
    out |= {"seeds": compared[0] if compared else len(point.seeds), "users": point.users}
    out[HEADLINE] = value.value if value else math.nan
    if compared is not None:
        for name, found in zip(("difference", "ratio"), compared[1:], strict=True):
            out |= {name: found.value, f"{name} low": found.low, f"{name} high": found.high}
    return out | {"training seconds": seconds, "teacher seconds": teacher}


def _seconds(summary: Summary, point: Point) -> tuple[float, float]:
    """Mean seconds of the point's trainings, and of what its teacher took before."""
    trials = summary.run.trials
    own = trials[trials["trial"].isin(point.trials)]
    return _mean(own, "training_seconds"), _mean(own, "training_teacher_seconds")


def _mean(trials: pd.DataFrame, column: str) -> float:
    values: Sequence[float] = trials[column].dropna().tolist() if column in trials else []
    return sum(values) / len(values) if values else math.nan
