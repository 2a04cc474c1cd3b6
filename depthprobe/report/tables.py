"""The tables of a report: every digit for CSV, rounded cells for Markdown, LaTeX and the page.

A table is made of rows and columns. A row maps names to numbers, texts and intervals, which all go
into the CSV file, and to cells, which don't: their names begin with "_". A column shows one name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from depthprobe.evaluation.slices import ALL, FEWEST
from depthprobe.evaluation.statistics import Interval
from depthprobe.files import complete_file
from depthprobe.methods import method_order
from depthprobe.report import style
from depthprobe.report.numbers import (
    FULL,
    METRICS,
    PLAIN,
    POPULARITY,
    SAMPLED,
    SASREC,
    TEACHER,
    Point,
    Source,
    Summary,
    as_summary,
    less_one,
    paired_changes,
)

SHOWN = ("HR@1", "HR@5", "HR@10", "NDCG@10", "MRR")
BRIEF = SHOWN[1:]  # of a trial, on the page: the file has all
NOTHING = Interval(math.nan, math.nan, math.nan)  # what was not measured


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


Values = Mapping[str, Any]
Column = tuple[str, str, Callable[[Any], Cell]]  # head, the value's name, how it is shown


def make_table(
    name: str,
    rows: Sequence[Values],
    columns: Sequence[Column],
    *,
    words: int = 1,
    group: str = "",
    frame: pd.DataFrame | None = None,
) -> Table:
    """Show rows of values; where the value of `group` changes, a new group of rows begins."""
    shown, last = [], object()
    for row in rows:
        cells = tuple(show(row.get(key)) for _, key, show in columns)
        new = bool(group) and row[group] != last
        shown.append(Row(cells, new, row.get("_state", "")))
        last = row.get(group)
    made = make_frame(rows) if frame is None else frame
    return Table(name, tuple(head for head, _, _ in columns), words, tuple(shown), made)


def make_frame(rows: Sequence[Values]) -> pd.DataFrame:
    """Rows with every digit; an interval is three columns."""
    spread: list[dict[str, Any]] = [{} for _ in rows]
    for row, wide in zip(rows, spread, strict=True):
        for key, value in row.items():
            if isinstance(value, Interval) and not key.startswith("_"):
                wide |= {key: value.value, f"{key} low": value.low, f"{key} high": value.high}
            elif not key.startswith("_"):
                wide[key] = value
    return pd.DataFrame(spread)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame, by column."""
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]


# --- how values are shown --------------------------------------------------------------------


def plain(value: Any) -> Cell:
    """A cell as it is; a text; a whole number; a dash for none."""
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell(style.NONE)
    return Cell(f"{value:,}" if isinstance(value, int) else str(value))


def label(method: str) -> Cell:
    """The name of a method."""
    return Cell(style.method_info(method).label)


def size(number: float | None) -> Cell:
    """A number of parameters."""
    return Cell(style.count(number or None))


def seconds(value: float | None) -> Cell:
    """Seconds at three digits."""
    return Cell(style.significant(value or math.nan))


def estimate(
    interval: Interval | None, *, text: Callable[[float], str], digits: int, scale: float = 1
) -> Cell:
    """A number, below it its interval; a dash where there is none."""
    if interval is None or math.isnan(interval.value):
        return Cell(style.NONE)
    return Cell(text(interval.value), style.bounds(interval, scale=scale, digits=digits))


metric = partial(estimate, text=style.accuracy, digits=4)
difference = partial(estimate, text="{:+.4f}".format, digits=4)
share = partial(estimate, text=style.percent, digits=1, scale=100)
change = partial(estimate, text=partial(style.percent, sign=True), digits=1, scale=100)
correlation = partial(estimate, text="{:.2f}".format, digits=2)


# --- files -----------------------------------------------------------------------------------


def save_table(table: Table, folder: Path) -> None:
    """Write FOLDER/NAME.csv with every digit, .md and .tex (booktabs) rounded as on the page."""
    texts = {
        "csv": table.frame.to_csv(index=False), "md": to_markdown(table), "tex": to_latex(table)
    }  # fmt: skip
    for suffix, text in texts.items():
        with complete_file(folder / f"{table.name}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")


def _texts(table: Table) -> list[list[str]]:
    """The text of each cell, an interval beside its number."""
    texts = ([f"{cell.text} {cell.note}".strip() for cell in row.cells] for row in table.rows)
    return [[text.replace("\n", " ") for text in row] for row in texts]


def to_markdown(table: Table) -> str:
    """A table as GitHub and most other readers of Markdown know it; every text is escaped."""
    rule = ["---"] * table.words + ["--:"] * (len(table.columns) - table.words)
    head, *rows = ([escape_markdown(t) for t in row] for row in (table.columns, *_texts(table)))
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def escape_markdown(text: str) -> str:
    """Text that Markdown, and HTML inside it, print as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|~&])", r"\\\1", text)


def to_latex(table: Table) -> str:
    """A booktabs tabular; every text is escaped."""
    align = "l" * table.words + "r" * (len(table.columns) - table.words)
    frame = pd.DataFrame(_texts(table), columns=table.columns)
    return str(frame.to_latex(index=False, escape=True, column_format=align))


# --- all methods, all trials -----------------------------------------------------------------


def depth_table(run: Source, *, protocol: str = FULL) -> Table | None:
    """Every method at every depth, averaged over its seeds; None without ranks.

    What was left out block by block is in :func:`depthprobe.report.tables.left_out_table`.
    """
    summary = as_summary(run)
    name = summary.headline
    points = [p for p in summary.points if p.value(name, protocol) and not p.info.by_block]
    if not points:
        return None
    rows, kinds = [], ("inference", "training") if protocol == FULL else ()
    for point in points:
        row: dict[str, Any] = {
            "method": point.method, "depth": point.depth, "kept": point.kept,
            "removed": point.removed, "protocol": protocol, "seeds": len(point.seeds),
            "users": point.users, **_marks(point),
        }  # fmt: skip
        row |= {each: point.accuracy[protocol, each] for each in METRICS}
        row[name] = point.accuracy[protocol, name]
        row[f"{name} of teacher"] = point.ratio.get((protocol, name), NOTHING)
        row |= _parameters(point) if kinds else {}
        for kind in kinds:
            row |= _time(point, kind, quartiles=True)
        rows.append(row)
    columns: list[Column] = [("method", "method", label), ("depth", "_depth", plain)]
    # where all have the same number it stands above the table: a column less to fit on a page
    if len({len(point.seeds) for point in points if point.method != POPULARITY}) > 1:
        columns.append(("seeds", "seeds", plain))
    columns += [(each, each, metric) for each in dict.fromkeys([*SHOWN, name])]
    if any((protocol, name) in point.ratio for point in points):
        columns.append(("of the teacher's", f"{name} of teacher", share))
    if kinds:
        columns.append(("parameters", "parameters total", size))
    measured = [kind for kind in kinds if any(kind in point.time for point in points)]
    columns += [(f"{kind}, ms", f"_{kind}", plain) for kind in measured]
    return make_table("methods" if kinds else "methods_sampled", rows, columns, group="method")


def _marks(point: Point) -> dict[str, Any]:
    """The state of a row; its depth, and which blocks are gone where not the first are kept."""
    if point.info.role == "baseline":
        return {"_depth": None}
    first = point.kept in ("0", f"0-{point.depth - 1}") or not point.removed
    note = point.removed if point.span or "," in point.removed else ""
    depth = Cell(str(point.depth), "" if first or not note else f"without {note}")
    return {"_depth": depth, "_state": "teacher" if point.method == TEACHER else ""}


def _parameters(point: Point) -> dict[str, float]:
    return {f"parameters {part}": number for part, number in point.parameters.items()}


def _time(point: Point | None, kind: str, *, quartiles: bool = False) -> dict[str, Any]:
    """Milliseconds, and how many times faster than the teacher."""
    time = point.time.get(kind, NOTHING) if point else NOTHING
    speed = point.speed.get(kind) if point else None
    shown = Cell(style.significant(time.value), " ".join(style.times(speed)) if speed else "")
    row: dict[str, Any] = {f"{kind} ms": time.value, f"_{kind}": shown}
    if quartiles:
        row |= {f"{kind} ms p25": time.low, f"{kind} ms p75": time.high}
    return row | {f"{kind} times faster": speed or NOTHING}


def trial_table(run: Source) -> Table | None:
    """Every trial by itself with its own interval over users; failed ones with their error."""
    summary = as_summary(run)
    trials, metrics = summary.run.trials, summary.run.metrics
    if trials.empty:
        return None
    order = sorted(set(trials["method"]), key=method_order)
    frame = trials.assign(place=trials["method"].map(order.index))
    frame = frame.sort_values(["place", "depth", "trial"], kind="stable")
    frame = frame.drop(columns="place").reset_index(drop=True)
    measured: dict[tuple[str, str], Interval] = {}
    if len(metrics):
        of_test = (metrics["split"] == "test") & (metrics["slice"] == ALL)
        chosen = metrics[of_test & (metrics["protocol"] == FULL)]
        measured = {
            (row["trial"], row["metric"]): Interval(row["value"], row["ci_low"], row["ci_high"])
            for row in records(chosen)
        }
    rows = records(frame)
    for row in rows:
        row |= {f"_{name}": metric(measured.get((row["trial"], name))) for name in BRIEF}
        row |= {"_depth": row["depth"] or None, "_error": ""}
        if row["status"] != "done":
            error = row["error"].strip() if isinstance(row["error"], str) else ""
            row |= {"_state": "failed", "_error": (error or "no message").splitlines()[0]}
    for name in SHOWN:
        frame[name] = [measured.get((trial, name), NOTHING).value for trial in frame["trial"]]
    columns: list[Column] = [
        ("trial", "trial", plain), ("method", "method", label), ("depth", "_depth", plain),
        ("seed", "seed", plain), *((name, f"_{name}", plain) for name in BRIEF),
        ("parameters", "parameters_total", size), ("training, s", "training_seconds", seconds),
    ]  # fmt: skip
    if len(summary.failed):
        columns.append(("error", "_error", plain))
    return make_table("trials", rows, columns, words=2, frame=frame)


# --- what a depth costs, whatever the method -------------------------------------------------

KINDS = {"inference": "to serve, ms", "latency": "one user, ms", "training": "training step, ms"}


def timed(summary: Summary, kind: str) -> list[Point]:
    """For each depth below the full one, a point whose speed was measured.

    A depth is timed once for all methods, but for what a method adds to a training step: the
    first method of the registry that trains, else the first probe that may be an answer.
    """
    trained = [p for p in summary.points if p.info.role in ("trained", "control")]
    probes = [p for p in summary.points if p.info.role == "probe" and p.info.candidate]
    found: dict[int, Point] = {}
    for point in (*trained, *probes):
        if 0 < point.depth < summary.blocks and kind in point.speed:
            found.setdefault(point.depth, point)
    return [found[depth] for depth in sorted(found)]


def cost_table(run: Source) -> Table | None:
    """Parameters and times by depth, SASRec beside them; None where no depth was timed."""
    summary = as_summary(run)
    teacher = summary.teacher
    by_kind = {kind: {point.depth: point for point in timed(summary, kind)} for kind in KINDS}
    depths = sorted({depth for points in by_kind.values() for depth in points})
    if teacher is None or not depths:
        return None
    kinds = [kind for kind in KINDS if by_kind[kind] or kind in teacher.time]
    lines = [{kind: by_kind[kind].get(depth) for kind in kinds} for depth in depths]
    lines += [dict.fromkeys(kinds, point) for point in (teacher, *summary.of(SASREC))]
    full, rows = teacher.cost("parameters"), []
    for line in lines:
        point = next(filter(None, line.values()))
        name, own = point.info.label, point.cost("parameters")
        below = style.percent(own / full, 0) if own and full and point is not teacher else ""
        row: dict[str, Any] = {
            **_marks(point), "depth": point.depth, "method": "" if point.depth else point.method,
            "_depth": f"{point.depth}, the {name}" if point is teacher else point.depth or name,
            "_parameters": Cell(style.count(own), below), **_parameters(point),
        }  # fmt: skip
        for kind, timed_point in line.items():
            row |= _time(timed_point, kind)
        rows.append(row)
    columns: list[Column] = [
        ("depth", "_depth", plain), ("parameters", "_parameters", plain),
        ("of them in blocks", "parameters blocks", size),
        *((KINDS[kind], f"_{kind}", plain) for kind in kinds),
    ]  # fmt: skip
    return make_table("cost", rows, columns)


# --- ways to a shallow model, beside plain fine-tuning ---------------------------------------


def ablation_table(run: Source) -> Table | None:
    """Paired change of NDCG@10 against fine-tuning, by depth; None without two to compare.

    Over the seeds that both have. Seconds are means over seeds, without and with those that the
    teacher took, whose training and features all students share.
    """
    summary = as_summary(run)
    plain_ones = {point.depth: point for point in summary.of(PLAIN)}
    others = [p for p in summary.points if p.info.role in ("trained", "control")]
    pairs = [
        (point, plain_ones[depth])
        for depth in sorted(plain_ones)
        for point in others
        if point.depth == depth and point.method != PLAIN
    ]
    rows: list[dict[str, Any]] = []
    for (point, reference), found in zip(pairs, paired_changes(summary, pairs), strict=True):
        if found is None or found.ratio is None:
            continue
        if not rows or rows[-1]["depth"] != point.depth:
            row = _ablation_row(summary, reference, len(reference.seeds))
            rows.append(row | {"_difference": Cell("0")})
        row = _ablation_row(summary, point, found.seeds)
        row |= {"difference": found.difference, "_difference": difference(found.difference)}
        rows.append(row | {"ratio": found.ratio, "_relative": change(less_one(found.ratio))})
    if not rows:
        return None
    columns: list[Column] = [
        ("depth", "depth", plain), ("method", "method", label), ("seeds", "seeds", plain),
        (summary.headline, "_value", metric), ("change", "_difference", plain),
        ("relative", "_relative", plain), ("training, s", "training seconds", seconds),
        ("with teacher", "_seconds", seconds),
    ]  # fmt: skip
    return make_table("ablation", rows, columns, words=2, group="depth")


def _ablation_row(summary: Summary, point: Point, seeds: int) -> dict[str, Any]:
    """A row without its change: the reference's has none."""
    trials = summary.run.trials
    own, value = trials[trials["trial"].isin(point.trials)], point.value(summary.headline)
    took, before = _mean(own, "training_seconds"), _mean(own, "training_teacher_seconds")
    return {
        "depth": point.depth, "method": point.method, "seeds": seeds, "users": point.users,
        summary.headline: value.value if value else math.nan, "_value": value,
        "training seconds": took, "teacher seconds": before, "_seconds": took + before,
    }  # fmt: skip


def _mean(trials: pd.DataFrame, column: str) -> float:
    values: Sequence[float] = trials[column].dropna().tolist() if column in trials else []
    return sum(values) / len(values) if values else math.nan


# --- the teacher with some of its blocks left out, without training --------------------------


def left_out_table(run: Source) -> Table | None:
    """Accuracy without some blocks, and its paired change; None where none was left out.

    Single blocks, spans of blocks, every n-th, and attention or MLP alone, over all seeds.
    """
    summary = as_summary(run)
    name = summary.headline
    points = [p for p in summary.points if p.info.by_block and p.value(name)]
    if not points:
        return None
    rows = [
        {
            "method": point.method, "removed": point.removed, "depth": point.depth,
            "seeds": len(point.seeds), "users": point.users, "HR@10": point.value("HR@10"),
            name: point.value(name), "change": point.change(name) or NOTHING,
        }
        for point in points
    ]  # fmt: skip
    columns: list[Column] = [
        ("left out", "method", label), ("blocks", "removed", plain), ("HR@10", "HR@10", metric),
        (name, name, metric), (f"change of {name}", "change", change),
    ]  # fmt: skip
    return make_table("left_out", rows, columns, words=2, group="method")


# --- who loses when blocks go, and what is recommended then ----------------------------------

DEPTHS = 3  # beside the answer: more columns are no longer read


def slice_table(run: Source) -> Table | None:
    """Paired change of NDCG@10 against the teacher, by slice; None without slices or models.

    Of the answer, and of the best trained model at a few depths, over the seeds that each shares
    with the teacher. Intervals are over the users of a slice and over seeds, one comparison at a
    time; slices of less than 30 users, or without any hit, have none.
    """
    summary = as_summary(run)
    teacher, points, labels = summary.teacher, _chosen(summary), summary.run.slices
    if teacher is None or not points or len(labels) != summary.ranks.users(teacher.trials):
        return None
    own = summary.ranks.values(FULL, summary.headline, [teacher.trials])[0].mean(axis=0)  # (U,)
    pairs = [(point, teacher) for point in points]
    rows, numbers = [], []
    for name, inside in _slices(labels):
        users, mean = int(inside.sum()), float(own[inside].mean())
        changes = [None] * len(pairs) if users < FEWEST else paired_changes(summary, pairs, inside)
        row = {"name": _words(name), "users": users, "mean": Cell(style.accuracy(mean))}
        row["family"] = name.partition(":")[0]
        for place, (point, found) in enumerate(zip(points, changes, strict=True)):
            interval, relative = NOTHING, math.nan
            if found is not None:
                interval, relative = found.difference, found.share
                shown = difference(interval)
                more = f", {style.percent(relative, sign=True)}" if found.ratio else ""
                row[f"{place}"] = Cell(shown.text, shown.note + more)
            numbers.append(
                {
                    "slice": name, "users": users, "method": point.method, "depth": point.depth,
                    "teacher": mean, "difference": interval, "relative": relative,
                }
            )  # fmt: skip
        rows.append(row)
    columns: list[Column] = [
        ("group", "name", plain), ("users", "users", plain), ("teacher", "mean", plain),
        *((point.name, f"{place}", plain) for place, point in enumerate(points)),
    ]  # fmt: skip
    return make_table("slices", rows, columns, group="family", frame=make_frame(numbers))


def _chosen(summary: Summary) -> tuple[Point, ...]:
    """The answer, and the best trained model at a few depths, shallow to deep.

    Of the depths at which most methods were trained: the shallowest, a middle one, the deepest.
    """
    trained: dict[int, list[Point]] = {}
    name = summary.headline
    for point in summary.points:
        if point.info.role == "trained" and point.depth < summary.blocks and point.value(name):
            trained.setdefault(point.depth, []).append(point)
    most = max(map(len, trained.values()), default=0)
    depths = [depth for depth in sorted(trained) if len(trained[depth]) == most]
    places = np.linspace(0, len(depths) - 1, min(DEPTHS, len(depths))).round().astype(int)
    points = [
        max(trained[depths[place]], key=lambda point: point.accuracy[FULL, name].value)
        for place in places.tolist()
    ]
    if (answer := summary.answer) is not None:
        points = [point for point in points if point.depth != answer.depth] + [answer]
    return tuple(sorted(points, key=lambda point: (point.depth, point.method)))


def _slices(labels: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """All users, then each slice of each family in its order: name, and who is inside, (U,)."""
    yield ALL, np.ones(len(labels), bool)
    for family in labels.columns.drop("user"):
        values = labels[family]
        for name in values.cat.categories:
            yield f"{family}:{name}", (values == name).to_numpy(bool)


def _words(name: str) -> str:
    """A slice in words: "history of 3-4 items", "tail target"."""
    family, _, value = name.partition(":")
    if family == "history":
        return f"history of {value} item{'' if value == '1' else 's'}"
    return {ALL: "all", "target": f"{value} target"}.get(family, f"{family} {value}")


# Statistics of the recommended items: how each is called and shown.
LISTS: dict[str, tuple[str, Callable[[Interval], Cell]]] = {
    "coverage@10": ("coverage", share),
    "gini@10": ("Gini index", partial(estimate, text=style.significant, digits=3)),
    "popularity@10": ("popularity", partial(estimate, text=style.significant, digits=2)),
}


def lists_table(run: Source) -> Table | None:
    """Coverage, Gini index and popularity of what is recommended; None where it was not counted.

    Of the baselines, the teacher and the models of :func:`slice_table`; means over seeds, with the
    lowest and the highest below.
    """
    summary, rows = as_summary(run), []
    metrics = summary.run.metrics
    if metrics.empty:
        return None
    counted = metrics[metrics["metric"].isin(LISTS)].set_index(["metric", "trial"])["value"]
    points = [p for p in summary.points if p.info.role in ("baseline", "teacher")]
    for point in sorted((*points, *_chosen(summary)), key=summary.points.index):
        row: dict[str, Any] = {"method": point.method, "depth": point.depth, **_marks(point)}
        for name, (_, show) in LISTS.items():
            own = [counted[name, t] for t in point.trials if (name, t) in counted.index]
            row[name] = float(np.mean(own)) if own else math.nan
            ends = (min(own), max(own)) if len(own) > 1 else (math.nan, math.nan)
            row[f"_{name}"] = show(Interval(row[name], *ends))
        if any(math.isfinite(row[name]) for name in LISTS):
            rows.append(row)
    if not rows:
        return None
    columns: list[Column] = [("model", "method", label), ("depth", "_depth", plain)]
    columns += [(called, f"_{name}", plain) for name, (called, _) in LISTS.items()]
    return make_table("lists", rows, columns)


TABLES: tuple[Callable[[Summary], Table | None], ...] = (
    depth_table, partial(depth_table, protocol=SAMPLED), trial_table, ablation_table, slice_table,
    lists_table, left_out_table, cost_table,
)  # fmt: skip


def all_tables(run: Source) -> dict[str, Table]:
    """The tables that the run has data for, by name."""
    summary = as_summary(run)
    made = (table(summary) for table in TABLES)
    return {table.name: table for table in made if table is not None}
