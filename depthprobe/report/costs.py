"""What a depth costs, whatever the method: parameters, serving, a training step."""

from __future__ import annotations

import pandas as pd

from depthprobe.report.style import NONE, count, method_style, percent
from depthprobe.report.summary import Point, RunLike, Summary, as_summary
from depthprobe.report.tables import Cell, Row, Table, three, time_cell
from depthprobe.study import base_of

SERVING, TRAINING, LATENCY = "inference", "training", "latency"
KINDS = {SERVING: "to serve, ms", LATENCY: "one user, ms", TRAINING: "training step, ms"}
# A depth is timed once for all methods, but for what a method adds to a training step.
PLAIN = ("finetune", "early-exit", "heal", "elastic", "random-init", "distill")


def timed(summary: Summary, kind: str) -> list[Point]:
    """For each depth below the whole one, the plainest point whose speed was measured."""
    found: dict[int, Point] = {}
    for point in sorted(summary.points, key=_plainness):
        if point.depth and point.method in PLAIN and kind in point.speed:
            found.setdefault(point.depth, point)
    return [found[depth] for depth in sorted(found) if depth < (summary.blocks or 0)]


def cost_table(run: RunLike | Summary) -> Table | None:
    """Parameters and times by depth, SASRec beside them; None where no depth was timed."""
    summary = as_summary(run)
    teacher = summary.teacher
    by_kind = {kind: {point.depth: point for point in timed(summary, kind)} for kind in KINDS}
    depths = sorted({depth for points in by_kind.values() for depth in points})
    if teacher is None or not depths:
        return None
    kinds = [kind for kind in KINDS if by_kind[kind] or kind in teacher.time]
    rows, numbers = [], []
    lines: list[tuple[str, int, dict[str, Point]]] = [
        (
            f"{depth}",
            depth,
            {kind: by_kind[kind][depth] for kind in kinds if depth in by_kind[kind]},
        )
        for depth in depths
    ]
    lines.append((f"{teacher.depth}, the teacher", teacher.depth, dict.fromkeys(kinds, teacher)))
    for sasrec in summary.of("sasrec"):
        lines.append((method_style("sasrec").label, 0, dict.fromkeys(kinds, sasrec)))
    for label, depth, points in lines:
        point = next(iter(points.values()))
        cells = [Cell(label), *_parameters(point, teacher)]
        out: dict[str, object] = {"depth": depth, "method": point.method if not depth else ""}
        out |= {f"parameters {name}": value for name, value in point.parameters.items()}
        for kind in kinds:
            own = points.get(kind)
            cells.append(time_cell(own, kind) if own else Cell(NONE))
            spread = own.time.get(kind) if own else None
            out[f"{kind} ms"] = spread.median if spread else None
            out |= three(f"{kind} times faster", own.speed.get(kind) if own else None)
        rows.append(Row(tuple(cells), state="teacher" if depth == teacher.depth else ""))
        numbers.append(out)
    columns = ("depth", "parameters", "of them in blocks", *(KINDS[kind] for kind in kinds))
    return Table("cost", columns, 1, tuple(rows), pd.DataFrame(numbers))


def _plainness(point: Point) -> int:
    base = base_of(point.method)
    return PLAIN.index(base) if base in PLAIN else len(PLAIN)


def _parameters(point: Point, teacher: Point) -> tuple[Cell, Cell]:
    own, whole = point.cost("parameters"), teacher.cost("parameters")
    share = percent(own / whole, 0) if own and whole and point is not teacher else ""
    return Cell(count(own), share), Cell(count(point.parameters.get("blocks")))
