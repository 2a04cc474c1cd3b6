"""Trained shallower models against plain fine-tuning at the same depth: what each way adds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from depthprobe.evaluation.statistics import Interval, interval, resampled_means
from depthprobe.report.style import NONE, accuracy, bounds, method_style, percent, significant
from depthprobe.report.summary import FULL, HEADLINE, LEVEL, Point, RunLike, Summary, as_summary
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
    pairs = _pairs(summary)
    changes = _changes(summary, pairs)
    rows, numbers, last = [], [], None
    for (point, plain), found in zip(pairs, changes, strict=True):
        if found is None:
            continue
        if last is not plain:
            rows.append(_row(summary, plain, None, group=True))
            numbers.append(_numbers(summary, plain, None))
        last = plain
        rows.append(_row(summary, point, found, group=False))
        numbers.append(_numbers(summary, point, found))
    if not rows:
        return None
    return Table("ablation", COLUMNS, 2, tuple(rows), pd.DataFrame(numbers))


_Change = tuple[int, Interval, Interval]  # seeds, difference, ratio


def _pairs(summary: Summary) -> list[tuple[Point, Point]]:
    """Each trained point beside the fine-tuned one of its depth, by depth."""
    plain = {point.depth: point for point in summary.of(PLAIN)}
    others = [p for p in summary.points if base_of(p.method) in TRAINED and p.method != PLAIN]
    return [
        (point, plain[depth]) for depth in sorted(plain) for point in others if point.depth == depth
    ]


def _changes(summary: Summary, pairs: Sequence[tuple[Point, Point]]) -> list[_Change | None]:
    """Paired change of each pair; those with the same seeds share their draws."""
    found: list[_Change | None] = [None] * len(pairs)
    common = [tuple(s for s in point.seeds if s in plain.seeds) for point, plain in pairs]
    for seeds in filter(None, dict.fromkeys(common)):
        places = [place for place, own in enumerate(common) if own == seeds]
        names = list(dict.fromkeys(p.of_seeds(seeds) for place in places for p in pairs[place]))
        names = [trials for trials in names if summary.ranks.has(trials, FULL)]
        arms = summary.ranks.values(FULL, HEADLINE, names) if names else []
        if not arms or arms[0].shape[1] == 1:  # one user says nothing about others
            continue
        resamples = int(summary.run.study.protocol.resamples)
        drawn = resampled_means(arms, resamples=resamples, seed=0)
        draws = np.concatenate([both for both, _ in drawn])  # (R, arms)
        means = [float(arm.mean()) for arm in arms]
        for place in places:
            trials = [point.of_seeds(seeds) for point in pairs[place]]
            if any(own not in names for own in trials):
                continue
            own, plain = (names.index(own) for own in trials)
            if means[plain] == 0:
                continue
            with np.errstate(divide="ignore", invalid="ignore"):
                shares = draws[:, own] / draws[:, plain]
            change = draws[:, own] - draws[:, plain]
            found[place] = (
                len(seeds),
                interval(means[own] - means[plain], change, level=LEVEL),
                interval(means[own] / means[plain], shares, level=LEVEL),
            )
    return found


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
