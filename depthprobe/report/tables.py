"""The tables of a report: numbers for CSV, rounded cells for LaTeX (booktabs) and for the page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from depthprobe.evaluation.metrics import check_metrics
from depthprobe.evaluation.statistics import Interval
from depthprobe.files import complete_file
from depthprobe.report.style import (
    NONE,
    accuracy,
    bounds,
    count,
    method_order,
    method_style,
    percent,
    significant,
    times,
)
from depthprobe.report.summary import (
    BY_BLOCK,
    FULL,
    HEADLINE,
    METRICS,
    SAMPLED,
    Point,
    RunLike,
    Summary,
    as_summary,
)
from depthprobe.sweep.plan import BASELINES

SHOWN = ("HR@1", "HR@5", "HR@10", "NDCG@10", "MRR")
BRIEF = SHOWN[1:]  # of a trial, on the page: the file has all
TIMES = ("inference", "training")


@dataclass(frozen=True)
class Cell:
    """What stands in a table: the number, below it its interval."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row; `group` begins a new method, `state` is "teacher", "failed" or empty."""

    cells: tuple[Cell, ...]
    group: bool = False
    state: str = ""


@dataclass(frozen=True)
class Table:
    """A table in both forms: `frame` has every digit, `rows` what a reader needs."""

    name: str
    columns: tuple[str, ...]
    words: int  # so many columns, from the left, are text; the rest are numbers
    rows: tuple[Row, ...]
    frame: pd.DataFrame = field(repr=False)


def depth_table(run: RunLike | Summary, *, protocol: str = FULL) -> Table | None:
    """Every method at every depth, averaged over its seeds; None without ranks.

    What was left out block by block is in :func:`depthprobe.report.blocks.left_out_table`.

    Raises:
        ValueError: if a row breaks a bound that holds between its metrics.
    """
    summary = as_summary(run)
    points = [
        point
        for point in summary.points
        if point.value(HEADLINE, protocol) is not None and point.method not in BY_BLOCK
    ]
    if not points:
        return None
    for point in points:
        check(
            {metric: point.accuracy[protocol, metric].value for metric in METRICS},
            f"{point.method} at depth {point.depth} ({protocol})",
        )
    costs = protocol == FULL
    times = [t for t in TIMES if costs and any(t in point.time for point in points)]
    ratio = any((protocol, HEADLINE) in point.ratio for point in points)
    # where all have the same number it stands above the table: a column less to fit on a page
    seeds = [len(point.seeds) for point in points if point.method != "popularity"]
    differ = len(set(seeds)) > 1
    columns = ["method", "depth", *["seeds"] * differ, *SHOWN]
    columns += ["of the teacher's"] * ratio
    columns += ["parameters"] * costs + [f"{name}, ms" for name in times]
    rows = []
    for index, point in enumerate(points):
        cells = [
            Cell(method_style(point.method).label),
            Cell(
                NONE if point.method in BASELINES else str(point.depth),
                f"without {point.removed}" if point.removed and point.method == "greedy" else "",
            ),
            *[Cell(str(len(point.seeds)))] * differ,
            *(metric_cell(point.value(name, protocol)) for name in SHOWN),
        ]
        if ratio:
            cells.append(share_cell(point.ratio.get((protocol, HEADLINE))))
        if costs:
            cells.append(Cell(count(point.cost("parameters"))))
        cells += [time_cell(point, name) for name in times]
        new = index == 0 or points[index - 1].method != point.method
        state = "teacher" if point.method == "full" else ""
        rows.append(Row(tuple(cells), group=new, state=state))
    frame = pd.DataFrame([_numbers(point, protocol, costs=costs) for point in points])
    name = "methods" if protocol == FULL else "methods_sampled"
    return Table(name, tuple(columns), 1, tuple(rows), frame)


def trial_table(run: RunLike | Summary) -> Table | None:
    """Every trial by itself with its own interval over users; failed ones with their error."""
    summary = as_summary(run)
    trials = summary.run.trials
    if trials.empty:
        return None
    rank = {method: method_order(method) for method in trials["method"]}
    places = trials["method"].map(sorted(rank, key=lambda method: rank[method]).index)
    frame = trials.assign(place=places).sort_values(["place", "depth", "trial"], kind="stable")
    frame = frame.drop(columns="place").reset_index(drop=True)
    found = _own_metrics(summary.run.metrics)
    failures = bool(len(summary.failed))
    columns = ["trial", "method", "depth", "seed", *BRIEF, "parameters", "training, s"]
    columns += ["error"] * failures
    rows = []
    for _, trial in frame.iterrows():
        own = found.get(str(trial["trial"]), {})
        values = {metric: interval.value for metric, interval in own.items()}
        check(values, f"trial {trial['trial']}")
        failed = trial["status"] != "done"
        cells = [
            Cell(str(trial["trial"])),
            Cell(method_style(str(trial["method"])).label),
            Cell(str(int(trial["depth"]) or NONE)),
            Cell(str(int(trial["seed"]))),
            *(metric_cell(own.get(name)) for name in BRIEF),
            Cell(count(_number(trial, "parameters_total") or None)),
            Cell(significant(_number(trial, "training_seconds") or math.nan)),
        ]
        if failures:
            cells.append(Cell(_line(trial["error"]) if failed else ""))
        rows.append(Row(tuple(cells), state="failed" if failed else ""))
    for metric in SHOWN:
        frame[metric] = [
            own[metric].value if (own := found.get(str(t), {})) and metric in own else math.nan
            for t in frame["trial"]
        ]
    return Table("trials", tuple(columns), 2, tuple(rows), frame)


def all_tables(run: RunLike | Summary) -> dict[str, Table]:
    """The tables that the run has data for, by name."""
    summary = as_summary(run)
    made = (depth_table(summary), depth_table(summary, protocol=SAMPLED), trial_table(summary))
    return {table.name: table for table in made if table is not None}


def save_table(table: Table, folder: Path) -> None:
    """Write FOLDER/NAME.csv with every digit, .md and .tex (booktabs) rounded as on the page."""
    texts = {
        "csv": table.frame.to_csv(index=False), "md": to_markdown(table), "tex": to_latex(table)
    }  # fmt: skip
    for suffix, text in texts.items():
        with complete_file(folder / f"{table.name}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")


def to_markdown(table: Table) -> str:
    """A table as GitHub and most other readers of Markdown know it; every text is escaped."""
    rule = ["---"] * table.words + ["--:"] * (len(table.columns) - table.words)
    rows = [[_markdown_cell(cell) for cell in row.cells] for row in table.rows]
    lines = [[escape_markdown(column) for column in table.columns], rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escape_markdown(text: str) -> str:
    """Text that Markdown, and HTML inside it, print as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|~&])", r"\\\1", text).replace("\n", " ")


def to_latex(table: Table) -> str:
    """A booktabs tabular; every text is escaped."""
    align = "l" * table.words + "r" * (len(table.columns) - table.words)
    lines = [f"\\begin{{tabular}}{{{align}}}", "\\toprule"]
    lines += [" & ".join(map(escape_latex, table.columns)) + " \\\\", "\\midrule"]
    for index, row in enumerate(table.rows):
        if row.group and index:
            lines.append("\\addlinespace")
        lines.append(" & ".join(map(_latex_cell, row.cells)) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    table = {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}", "×": r"$\times$", "–": "--", "<": r"\textless{}",
        ">": r"\textgreater{}", "\n": " ",
    } | {character: f"\\{character}" for character in "&%$#_"}  # fmt: skip
    return "".join(table.get(character, character) for character in text)


def _markdown_cell(cell: Cell) -> str:
    return " ".join(escape_markdown(text) for text in (cell.text, cell.note) if text)


def _latex_cell(cell: Cell) -> str:
    note = f" {{\\scriptsize {escape_latex(cell.note)}}}" if cell.note else ""
    return escape_latex(cell.text) + note


def check(values: Mapping[str, float], where: str) -> None:
    """Refuse metrics that break a bound between them, and say where."""
    try:
        check_metrics(dict(values))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _own_metrics(metrics: pd.DataFrame) -> dict[str, dict[str, Interval]]:
    found: dict[str, dict[str, Interval]] = {}
    if metrics.empty:
        return found
    chosen = metrics[
        (metrics["split"] == "test") & (metrics["protocol"] == FULL) & (metrics["slice"] == "all")
    ]
    columns = ("trial", "metric", "value", "ci_low", "ci_high")
    for trial, metric, value, low, high in zip(*(chosen[c] for c in columns), strict=True):
        found.setdefault(str(trial), {})[str(metric)] = Interval(float(value), low, high)
    return found


def _numbers(point: Point, protocol: str, *, costs: bool) -> dict[str, object]:
    """Every digit of a point, one column a number."""
    out: dict[str, object] = {
        "method": point.method, "depth": point.depth, "kept": point.kept, "removed": point.removed,
        "protocol": protocol, "seeds": len(point.seeds), "users": point.users,
    }  # fmt: skip
    for metric in METRICS:
        out |= three(metric, point.value(metric, protocol))
    out |= three(f"{HEADLINE} of teacher", point.ratio.get((protocol, HEADLINE)))
    if costs:
        out |= {f"parameters {name}": value for name, value in point.parameters.items()}
        for name in TIMES:
            spread = point.time.get(name)
            out[f"{name} ms"] = spread.median if spread else None
            out[f"{name} ms p25"] = spread.low if spread else None
            out[f"{name} ms p75"] = spread.high if spread else None
            out |= three(f"{name} times faster", point.speed.get(name))
    return out


def three(name: str, interval: Interval | None) -> dict[str, object]:
    """An estimate and its ends as three columns; empty ones where it was not measured."""
    ends = (interval.value, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip((name, f"{name} low", f"{name} high"), ends, strict=True))


def metric_cell(interval: Interval | None) -> Cell:
    """A metric at four decimals, below it its interval."""
    if interval is None:
        return Cell(NONE)
    return Cell(accuracy(interval.value), bounds(interval, digits=4))


def share_cell(interval: Interval | None) -> Cell:
    """A share in per cent above its interval; a dash where there is none."""
    if interval is None:
        return Cell(NONE)
    return Cell(percent(interval.value), bounds(interval, scale=100, digits=1))


def time_cell(point: Point, name: str) -> Cell:
    """Milliseconds above how many times faster than the teacher's; a dash where untimed."""
    spread = point.time.get(name)
    if spread is None:
        return Cell(NONE)
    ratio = point.speed.get(name)
    return Cell(significant(spread.median), " ".join(times(ratio)) if ratio else "")


def _number(trial: pd.Series, name: str) -> float:
    value = trial.get(name)
    return float(value) if value is not None and pd.notna(value) else 0.0


def _line(error: object) -> str:
    """The first line of an error; the record has the rest."""
    text = "" if error is None or error is pd.NA else str(error).strip()
    return text.splitlines()[0] if text and text != "nan" else "no message"
