"""The tables of a report: every digit for CSV, rounded texts for Markdown, LaTeX and the page.

A row maps names to numbers, texts and intervals, and goes into the CSV file unchanged. A column
says which of these a reader sees, and in which form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from depthprobe.evaluation.slices import ALL, FEWEST
from depthprobe.evaluation.statistics import Interval
from depthprobe.files import complete_file
from depthprobe.formatting import (
    NONE,
    accuracy,
    count,
    in_percent,
    percent,
    significant,
    times,
    with_bounds,
)
from depthprobe.methods import method_info, method_order
from depthprobe.report.numbers import (
    FULL,
    PLAIN,
    POPULARITY,
    SAMPLED,
    SASREC,
    TEACHER,
    TIMES,
    Point,
    Source,
    Summary,
    as_summary,
    less_one,
)

SHOWN = ("HR@1", "HR@5", "HR@10", "NDCG@10", "MRR")
BRIEF = SHOWN[1:]  # of a trial on the page; the CSV file has all
NOTHING = Interval(math.nan, math.nan, math.nan)  # not measured


class Table(NamedTuple):
    """A table in two forms: ``frame`` has every digit, ``rows`` the rounded texts."""

    name: str
    columns: tuple[str, ...]
    words: int  # how many columns, from the left, are text; the rest are numbers
    rows: tuple[tuple[str, ...], ...]  # a line break separates the second line of a cell
    marks: tuple[str, ...]  # of rows: "group" begins a new group; "teacher", "failed"
    frame: pd.DataFrame


Values = dict[str, Any]
# The head; the name of a value, or a function of the row that makes it; how to write it.
Column = tuple[str, str | Callable[[Values], Any], Callable[[Any], str]]


def make_table(
    name: str,
    rows: Sequence[Values],
    columns: Sequence[Column],
    *,
    words: int = 1,
    group: str = "",
    frame: pd.DataFrame | None = None,
) -> Table | None:
    """Make a table of rows, None without rows; a new value of ``group`` begins a new group."""
    texts, marks, last = [], [], object()
    for row in rows:
        texts.append(tuple(_text(row, source, show) for _, source, show in columns))
        state = "failed" if row.get("status", "done") != "done" else ""
        if row.get("method") == TEACHER and "trial" not in row:
            state = "teacher"
        marks.append(" ".join(filter(None, ("group" if row.get(group) != last else "", state))))
        last = row.get(group)
    heads = tuple(head for head, *_ in columns)
    made = make_frame(rows) if frame is None else frame
    return Table(name, heads, words, tuple(texts), tuple(marks), made) if texts else None


def _text(row: Values, source: str | Callable[[Values], Any], show: Callable[[Any], str]) -> str:
    value = source(row) if callable(source) else row.get(source)
    number = value.value if isinstance(value, Interval) else value
    if value is None or (isinstance(number, float) and math.isnan(number)):
        return NONE
    text = show(value)
    return text.replace(" [", "\n[", 1) if isinstance(value, Interval) else text


def make_frame(rows: Sequence[Values]) -> pd.DataFrame:
    """Rows with every digit; an interval is three columns."""
    spread: list[Values] = [{} for _ in rows]
    for row, wide in zip(rows, spread, strict=True):
        for key, value in row.items():
            if isinstance(value, Interval):
                wide |= {key: value.value, f"{key} low": value.low, f"{key} high": value.high}
            else:
                wide[key] = value
    return pd.DataFrame(spread)


def plain(value: Any) -> str:
    """A text unchanged, or a whole number with commas."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def label(method: str) -> str:
    """The name of a method."""
    return method_info(method).label


# --- files -----------------------------------------------------------------------------------


def save_table(table: Table, folder: Path) -> None:
    """Write FOLDER/NAME.csv with every digit, .md and .tex (booktabs) rounded as on the page."""
    known = table.frame.replace([math.inf, -math.inf], math.nan)  # empty where nothing is known
    texts = {"csv": known.to_csv(index=False), "md": to_markdown(table), "tex": to_latex(table)}
    for suffix, text in texts.items():
        with complete_file(folder / f"{table.name}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")


def _lines(table: Table) -> list[list[str]]:
    return [[text.replace("\n", " ") for text in row] for row in table.rows]


def to_markdown(table: Table) -> str:
    """A Markdown table, as GitHub and most others read it; every text is escaped."""
    rule = ["---"] * table.words + ["--:"] * (len(table.columns) - table.words)
    head, *rows = ([escape_markdown(t) for t in row] for row in (table.columns, *_lines(table)))
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown, and HTML inside it, print it literally."""
    return re.sub(r"([\\`*_{}\[\]<>|~&])", r"\\\1", text)


def to_latex(table: Table) -> str:
    """A booktabs tabular; every text is escaped."""
    align = "l" * table.words + "r" * (len(table.columns) - table.words)
    frame = pd.DataFrame(_lines(table), columns=table.columns)
    return str(frame.to_latex(index=False, escape=True, column_format=align))


# --- the values of a point, and columns that several tables have -----------------------------


def values_of(point: Point, protocol: str = FULL) -> Values:
    """All measured values, under the names in CSV files."""
    row: Values = {
        "method": point.method, "depth": point.depth, "kept": point.kept, "removed": point.removed,
        "protocol": protocol, "seeds": len(point.seeds), "users": point.users,
    }  # fmt: skip
    row |= {name: value for (kind, name), value in point.accuracy.items() if kind == protocol}
    ratios = {name: value for (kind, name), value in point.ratio.items() if kind == protocol}
    row |= {f"{name} of teacher": value for name, value in ratios.items()}
    if protocol == FULL:
        row |= {f"parameters {part}": number for part, number in point.parameters.items()}
        row |= {key: value for kind in TIMES for key, value in _time(point, kind).items()}
    return row


def _time(point: Point | None, kind: str) -> Values:
    """Milliseconds with their quartiles, and how many times faster than the teacher."""
    time = point.time.get(kind, NOTHING) if point else NOTHING
    return {
        f"{kind} ms": time.value, f"{kind} ms p25": time.low, f"{kind} ms p75": time.high,
        f"{kind} times faster": point.speed.get(kind, NOTHING) if point else NOTHING,
    }  # fmt: skip


def milliseconds(head: str, kind: str) -> Column:
    """A column of times, with the speed-up over the teacher below each."""

    def text(row: Values) -> str:
        speed = row[f"{kind} times faster"]
        faster = "" if math.isnan(speed.value) else f"\n{times(speed)}"
        return significant(row[f"{kind} ms"]) + faster

    return head, text, plain


def _depth(row: Values) -> str | None:
    """The depth, with the removed blocks below it unless they are the last ones."""
    if method_info(row["method"]).role == "baseline":
        return None
    last = not row["depth"] or row["kept"] in ("0", f"0-{row['depth'] - 1}")
    blocks = re.fullmatch(r"\d+([-,]\d+)*", row["removed"])
    return f"{row['depth']}\nwithout {row['removed']}" if blocks and not last else str(row["depth"])


METHOD: Column = ("method", "method", label)
DEPTH: Column = ("depth", _depth, plain)
SEEDS: Column = ("seeds", "seeds", plain)


def _change(row: Values, name: str) -> Interval | None:
    return less_one(row[name]) if name in row else None


# --- all methods, all trials -----------------------------------------------------------------


def depth_table(run: Source, *, protocol: str = FULL) -> Table | None:
    """Every method at every depth, averaged over its seeds; None without ranks.

    Methods that leave out chosen blocks are in :func:`depthprobe.report.tables.left_out_table`.
    """
    summary, full = as_summary(run), protocol == FULL
    points = [p for p in summary.points if not p.info.by_block]
    points = [p for p in points if p.value(summary.headline, protocol)]
    columns = [METHOD, DEPTH]
    # a number that all rows share goes above the table, to save a column
    if len({len(point.seeds) for point in points if point.method != POPULARITY}) > 1:
        columns.append(SEEDS)
    columns += [(name, name, with_bounds) for name in SHOWN]
    if any((protocol, summary.headline) in point.ratio for point in points):
        columns.append(("of the teacher's", f"{summary.headline} of teacher", in_percent))
    if full:
        columns.append(("parameters", "parameters total", count))
        measured = [k for k in ("inference", "training") if any(k in p.time for p in points)]
        columns += [milliseconds(f"{kind}, ms", kind) for kind in measured]
    rows = [values_of(point, protocol) for point in points]
    return make_table("methods" if full else "methods_sampled", rows, columns, group="method")


def trial_table(run: Source) -> Table | None:
    """Every trial with its own interval over users; failed ones with their error."""
    summary = as_summary(run)
    metrics, rows = summary.run.metrics, list[Any](summary.run.trials.to_dict("records"))
    measured: dict[tuple[str, str], Interval] = {}
    if len(metrics):
        of_test = (metrics["split"] == "test") & (metrics["slice"] == ALL)
        for row in metrics[of_test & (metrics["protocol"] == FULL)].to_dict("records"):
            value = Interval(row["value"], row["ci_low"], row["ci_high"])
            measured[row["trial"], row["metric"]] = value
    rows.sort(key=lambda row: (method_order(row["method"]), row["depth"], row["trial"]))
    for row in rows:
        row |= {name: measured.get((row["trial"], name), NOTHING) for name in SHOWN}
    columns: list[Column] = [
        ("trial", "trial", plain), METHOD, ("depth", lambda row: row["depth"] or None, plain),
        ("seed", "seed", plain), *((name, name, with_bounds) for name in BRIEF),
        ("parameters", "parameters_total", count), ("training, s", "training_seconds", significant),
    ]  # fmt: skip
    if len(summary.failed):
        columns.append(("error", _error, plain))
    return make_table("trials", rows, columns, words=2)


def _error(trial: Values) -> str:
    """The first line of a failed trial's error."""
    error = trial["error"].strip() if isinstance(trial["error"], str) else ""
    return "" if trial["status"] == "done" else (error or "no message").splitlines()[0]


# --- what a depth costs, for all methods -----------------------------------------------------

KINDS = {"inference": "to serve, ms", "latency": "one user, ms", "training": "training step, ms"}


def timed(summary: Summary, kind: str) -> dict[int, Point]:
    """For each depth below the full one, shallow to deep, a point whose speed was measured.

    A depth is timed once for all methods, except for what a method adds to a training step. So take
    the first method of the registry that trains, else the first probe that could be served.
    """
    of_depth = [p for p in summary.points if not p.levers]
    trained = [p for p in of_depth if p.info.role in ("trained", "control")]
    probes = [p for p in of_depth if p.info.role == "probe" and p.on_offer]
    found: dict[int, Point] = {}
    for point in (*trained, *probes):
        if 0 < point.depth < summary.blocks and kind in point.speed:
            found.setdefault(point.depth, point)
    return dict(sorted(found.items()))


def cost_table(run: Source) -> Table | None:
    """Parameters and times by depth, with SASRec; None if no depth was timed."""
    summary = as_summary(run)
    by_kind = {kind: timed(summary, kind) for kind in KINDS}
    depths = sorted({depth for points in by_kind.values() for depth in points})
    if summary.teacher is None or not depths:
        return None
    lines = [[points.get(depth) for points in by_kind.values()] for depth in depths]
    lines += [[point] * len(KINDS) for point in (summary.teacher, *summary.of(SASREC))]
    rows = []
    for line in lines:
        row = values_of(next(filter(None, line)))
        for kind, point in zip(KINDS, line, strict=True):
            row |= _time(point, kind)
        rows.append(row)
    full = summary.teacher.cost("parameters")

    def name(row: Values) -> str:
        said = f"{row['depth']}, the {label(TEACHER)}" if row["method"] == TEACHER else ""
        return said or str(row["depth"] or label(row["method"]))

    def size(row: Values) -> str:
        own = row.get("parameters total")
        part = f"\n{percent(own / full, 0)}" if own and full and row["method"] != TEACHER else ""
        return count(own) + part

    columns: list[Column] = [
        ("depth", name, plain), ("parameters", size, plain),
        ("of them in blocks", "parameters blocks", count),
    ]  # fmt: skip
    measured = [kind for kind in KINDS if by_kind[kind] or kind in summary.teacher.time]
    columns += [milliseconds(KINDS[kind], kind) for kind in measured]
    return make_table("cost", rows, columns)


# --- ways to a shallow model, beside plain fine-tuning; blocks left out without training ------


def ablation_table(run: Source) -> Table | None:
    """Paired change of the headline metric against fine-tuning, by depth; None without a pair.

    Over the common seeds. Seconds are means over seeds, without and with the teacher's, whose
    training and features all students share.
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
    rows: list[Values] = []
    for point, reference in pairs:
        found = summary.compare(point, reference)
        if found is None or found.ratio is None:
            continue
        if not rows or rows[-1]["depth"] != point.depth:
            rows.append(_trained(summary, reference))
        row = {"seeds": found.seeds, "difference": found.difference, "ratio": found.ratio}
        rows.append(_trained(summary, point) | row)
    columns: list[Column] = [
        ("depth", "depth", plain), METHOD, SEEDS,
        (summary.headline, summary.headline, with_bounds),
        ("change", "difference", partial(with_bounds, sign=True)),
        ("relative", lambda row: _change(row, "ratio"), partial(in_percent, sign=True)),
        ("training, s", "training seconds", significant),
        ("with teacher", lambda row: row["training seconds"] + row["teacher seconds"], significant),
    ]  # fmt: skip
    return make_table("ablation", rows, columns, words=2, group="depth")


def _trained(summary: Summary, point: Point) -> Values:
    trials = summary.run.trials.reindex(columns=["trial", *SECONDS])
    own = trials[trials["trial"].isin(point.trials)]
    took = {name: float(own[column].mean()) for column, name in SECONDS.items()}
    return values_of(point) | took


SECONDS = {"training_seconds": "training seconds", "training_teacher_seconds": "teacher seconds"}


def left_out_table(run: Source) -> Table | None:
    """Accuracy without some blocks, and its paired change; None if none was left out.

    Single blocks, spans of blocks, every n-th block, and only attention or MLP, over all seeds.
    """
    summary = as_summary(run)
    name, points = summary.headline, [point for point in summary.points if point.info.by_block]
    rows = [values_of(point) for point in points if point.value(name)]
    for row in rows:
        row["change"] = _change(row, f"{name} of teacher") or NOTHING
    columns: list[Column] = [
        ("left out", "method", label), ("blocks", "removed", plain),
        *((shown, shown, with_bounds) for shown in dict.fromkeys(("HR@10", name))),
        (f"change of {name}", "change", partial(in_percent, sign=True)),
    ]  # fmt: skip
    return make_table("left_out", rows, columns, words=2, group="method")


# --- who loses without some blocks, and what is recommended then -----------------------------

DEPTHS = 3  # besides the answer; nobody reads more columns


def slice_table(run: Source) -> Table | None:
    """Paired change of the headline metric against the teacher, by slice; None without slices.

    For the answer, and the best trained model at a few depths, over the seeds that each shares with
    the teacher. Intervals are over a slice's users and over seeds, one comparison at a time; slices
    of fewer than 30 users, or without a hit, have no interval.
    """
    summary = as_summary(run)
    teacher, points, labels = summary.teacher, _chosen(summary), summary.run.slices
    if teacher is None or not points or len(labels) != summary.ranks.users(teacher.trials):
        return None
    own = summary.ranks.values(FULL, summary.headline, [teacher.trials])[0].mean(axis=0)  # (U,)
    rows, numbers = [], []
    for name, inside in _slices(labels):
        users, mean = int(inside.sum()), float(own[inside].mean())
        row: Values = {"slice": name, "users": users, "teacher": mean}
        for point in points:
            found = None if users < FEWEST else summary.compare(point, teacher, inside)
            number = {"method": point.method, "depth": point.depth, "difference": NOTHING}
            if found is not None:
                relative = found.ratio.value - 1 if found.ratio else math.nan
                number |= {"difference": found.difference, "relative": relative}
                more = f", {percent(relative, sign=True)}" if found.ratio else ""
                text = with_bounds(found.difference, sign=True)
                row[point.name] = text.replace(" ", "\n", 1) + more
            numbers.append(row | number)
        rows.append(row | {"family": name.partition(":")[0]})
    shown = [point.name for point in points]
    columns: list[Column] = [
        ("group", _words, plain), ("users", "users", plain), ("teacher", "teacher", accuracy),
        *((name, name, plain) for name in shown),
    ]  # fmt: skip
    frame = make_frame(numbers).drop(columns=shown, errors="ignore")
    return make_table("slices", rows, columns, group="family", frame=frame)


def _chosen(summary: Summary) -> tuple[Point, ...]:
    """The answer, and the best trained model at a few depths, shallow to deep.

    The depths are the shallowest, a middle and the deepest of those with the most trained methods.
    """
    trained: dict[int, list[Point]] = {}
    for point in summary.points:
        shallower = point.depth < summary.blocks and not point.levers
        if point.info.role == "trained" and shallower and point.accuracy:
            trained.setdefault(point.depth, []).append(point)
    most = max(map(len, trained.values()), default=0)
    depths = [depth for depth in sorted(trained) if len(trained[depth]) == most]
    places = np.linspace(0, len(depths) - 1, min(DEPTHS, len(depths))).round().astype(int)
    points = {
        depths[place]: max(
            trained[depths[place]], key=lambda point: point.accuracy[FULL, summary.headline].value
        )
        for place in places.tolist()
    }
    if (answer := summary.answer) is not None:
        points[answer.depth] = answer
    return tuple(points[depth] for depth in sorted(points))


def _slices(labels: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """All users, then each slice of each family in order: its name, and its users, bool (U,)."""
    yield ALL, np.ones(len(labels), bool)
    for family in labels.columns.drop("user"):
        values = labels[family]
        for name in values.cat.remove_unused_categories().cat.categories:
            yield f"{family}:{name}", (values == name).to_numpy(bool)


def _words(row: Values) -> str:
    """A slice in words: "history of 3-4 items", "tail target"."""
    family, _, value = row["slice"].partition(":")
    if family == "history":
        return f"history of {value} item{'' if value == '1' else 's'}"
    return {ALL: "all", "target": f"{value} target"}.get(family, f"{family} {value}")


def lists_table(run: Source) -> Table | None:
    """Coverage, Gini index and popularity of recommended items; None if they were not counted.

    For the baselines, the teacher and the models of :func:`slice_table`; means over seeds, with the
    lowest and the highest below.
    """
    summary = as_summary(run)
    if summary.run.metrics.empty:
        return None
    columns: list[Column] = [
        ("model", "method", label), DEPTH, ("coverage", "coverage@10", in_percent),
        ("Gini index", "gini@10", lambda value: with_bounds(value, 3)),
        ("popularity", "popularity@10", lambda value: with_bounds(value, 2)),
    ]  # fmt: skip
    points = [p for p in summary.points if p.info.role in ("baseline", "teacher")]
    rows, metrics = [], summary.run.metrics
    for point in sorted((*points, *_chosen(summary)), key=summary.points.index):
        own = metrics[metrics["trial"].isin(point.trials)]
        row = {}
        for _, name, _ in columns[2:]:
            values = own.loc[own["metric"] == name, "value"].to_numpy()
            ends = (min(values), max(values)) if len(values) > 1 else (math.nan, math.nan)
            if len(values):
                row[str(name)] = Interval(float(np.mean(values)), *ends)
        if row:
            rows.append(values_of(point) | row)
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
