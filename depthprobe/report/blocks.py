"""The teacher with some of its blocks left out, without training: every one, in a table."""

from __future__ import annotations

import pandas as pd

from depthprobe.evaluation.statistics import Interval
from depthprobe.report.style import NONE, bounds, method_style, percent
from depthprobe.report.summary import BY_BLOCK, FULL, HEADLINE, Point, RunLike, Summary, as_summary
from depthprobe.report.tables import Cell, Row, Table, metric_cell, three


def left_out_table(run: RunLike | Summary) -> Table | None:
    """Accuracy without some blocks, and its paired change; None where none was left out.

    Single blocks, contiguous runs, every n-th, and attention or MLP alone, over all seeds.
    """
    summary = as_summary(run)
    points = [p for p in summary.points if p.method in BY_BLOCK and p.value(HEADLINE) is not None]
    if not points:
        return None
    rows = []
    for index, point in enumerate(points):
        cells = (
            Cell(method_style(point.method).label),
            Cell(point.removed),
            *(metric_cell(point.value(metric)) for metric in ("HR@10", HEADLINE)),
            _change(change_of(point)),
        )
        new = index == 0 or points[index - 1].method != point.method
        rows.append(Row(cells, group=new))
    frame = pd.DataFrame([_numbers(point) for point in points])
    columns = ("left out", "blocks", "HR@10", HEADLINE, f"change of {HEADLINE}")
    return Table("left_out", columns, 2, tuple(rows), frame)


def change_of(point: Point, metric: str = HEADLINE) -> Interval | None:
    """Relative change against the teacher, paired; None where there is no teacher."""
    ratio = point.ratio.get((FULL, metric))
    return None if ratio is None else Interval(ratio.value - 1, ratio.low - 1, ratio.high - 1)


def _change(change: Interval | None) -> Cell:
    if change is None:
        return Cell(NONE)
    sign = "+" if change.value >= 0 else ""
    return Cell(f"{sign}{percent(change.value)}", bounds(change, scale=100, digits=1))


def _numbers(point: Point) -> dict[str, object]:
    """Every digit of a row."""
    out: dict[str, object] = {"method": point.method, "removed": point.removed}
    out |= {"depth": point.depth, "seeds": len(point.seeds), "users": point.users}
    for metric in ("HR@10", HEADLINE):
        out |= three(metric, point.value(metric))
    return out | three("change", change_of(point))
