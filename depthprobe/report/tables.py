"""The tables of a report: every digit for CSV, rounded cells for Markdown, LaTeX and the page."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from depthprobe.evaluation.metrics import check_metrics
from depthprobe.evaluation.slices import ALL, FEWEST
from depthprobe.evaluation.statistics import Interval
from depthprobe.files import complete_file
from depthprobe.methods import method_order
from depthprobe.report import style
from depthprobe.report.numbers import (
    FULL,
    HEADLINE,
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
SHOWN_TIMES = ("inference", "training")


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


Numbers = Mapping[str, Any]  # a row with every digit; a key that begins with _ is no column
Column = tuple[str, str, Callable[[Numbers, str], Cell]]  # head, key, how its cells are shown


def make_table(
    name: str,
    numbers: Sequence[Numbers],
    columns: Sequence[Column],
    *,
    words: int = 1,
    group: str = "",
    frame: pd.DataFrame | None = None,
) -> Table:
    """Show rows of numbers; where the value of `group` changes, a new group of rows begins."""
    rows, last = [], object()
    for row in numbers:
        cells = tuple(show(row, key) for _, key, show in columns)
        new = bool(group) and row[group] != last
        rows.append(Row(cells, group=new, state=row.get("_state", "")))
        last = row.get(group)
    if frame is None:
        public = [{k: v for k, v in row.items() if not k.startswith("_")} for row in numbers]
        frame = pd.DataFrame(public)
    return Table(name, tuple(head for head, _, _ in columns), words, tuple(rows), frame)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame, by column."""
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]


# --- cells -----------------------------------------------------------------------------------


def three(name: str, interval: Interval | None) -> dict[str, float | None]:
    """An estimate and its ends as three columns; empty ones where it was not measured."""
    ends = (interval.value, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip((name, f"{name} low", f"{name} high"), ends, strict=True))


def interval_of(row: Numbers, name: str) -> Interval | None:
    """What :func:`three` wrote."""
    value = row.get(name)
    return None if value is None else Interval(value, row[f"{name} low"], row[f"{name} high"])


def text(row: Numbers, name: str) -> Cell:
    """A text or whole number."""
    return Cell(f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]))


def ready(row: Numbers, name: str) -> Cell:
    """A cell that the row holds; a dash for none."""
    return row.get(name) or Cell(style.NONE)


def label(row: Numbers, name: str) -> Cell:
    """The name of a method."""
    return Cell(style.method_info(row[name]).label)


def metric(row: Numbers, name: str) -> Cell:
    """A metric at four decimals, below it its interval."""
    return metric_cell(interval_of(row, name))


def share(row: Numbers, name: str) -> Cell:
    """A share in per cent, below it its interval."""
    return share_cell(interval_of(row, name))


def change(row: Numbers, name: str) -> Cell:
    """A relative change with its sign, below it its interval."""
    return share_cell(interval_of(row, name), sign=True)


def size(row: Numbers, name: str) -> Cell:
    """A number of parameters."""
    return Cell(style.count(row.get(name) or None))


def seconds(row: Numbers, name: str) -> Cell:
    """Seconds at three digits."""
    return Cell(style.significant(row.get(name) or math.nan))


def milliseconds(row: Numbers, kind: str) -> Cell:
    """A median time, below it how many times faster than the teacher's."""
    if row[f"{kind} ms"] is None:
        return Cell(style.NONE)
    ratio = interval_of(row, f"{kind} times faster")
    return Cell(style.significant(row[f"{kind} ms"]), " ".join(style.times(ratio)) if ratio else "")


def metric_cell(interval: Interval | None) -> Cell:
    """A metric at four decimals, below it its interval; a dash where there is none."""
    if interval is None:
        return Cell(style.NONE)
    return Cell(style.accuracy(interval.value), style.bounds(interval, digits=4))


def share_cell(interval: Interval | None, *, sign: bool = False) -> Cell:
    """A share or change in per cent, below it its interval; a dash where there is none."""
    if interval is None:
        return Cell(style.NONE)
    note = style.bounds(interval, scale=100, digits=1)
    return Cell(style.percent(interval.value, sign=sign), note)


def difference_cell(interval: Interval | None, more: str = "") -> Cell:
    """A difference between metrics, below it its interval; a dash where there is none."""
    if interval is None:
        return Cell(style.NONE)
    return Cell(f"{interval.value:+.4f}", style.bounds(interval, digits=4) + more)


# --- files -----------------------------------------------------------------------------------


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
    texts = [[f"{cell.text} {cell.note}".strip() for cell in row.cells] for row in table.rows]
    head, *rows = ([escape_markdown(text) for text in row] for row in (table.columns, *texts))
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def escape_markdown(text: str) -> str:
    """Text that Markdown, and HTML inside it, print as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|~&])", r"\\\1", text).replace("\n", " ")


def to_latex(table: Table) -> str:
    """A booktabs tabular, an interval beside its number; every text is escaped."""
    cells = [[f"{cell.text} {cell.note}".strip() for cell in row.cells] for row in table.rows]
    align = "l" * table.words + "r" * (len(table.columns) - table.words)
    frame = pd.DataFrame(cells, columns=table.columns).replace("\n", " ", regex=True)
    return str(frame.to_latex(index=False, escape=True, column_format=align))


# --- all methods, all trials -----------------------------------------------------------------


def depth_table(run: Source, *, protocol: str = FULL) -> Table | None:
    """Every method at every depth, averaged over its seeds; None without ranks.

    What was left out block by block is in :func:`depthprobe.report.tables.left_out_table`.

    Raises:
        ValueError: if a row breaks a bound that holds between its metrics.
    """
    summary = as_summary(run)
    points = [p for p in summary.points if p.value(HEADLINE, protocol) and not p.info.by_block]
    if not points:
        return None
    full, numbers = protocol == FULL, []
    for point in points:
        values = {name: point.accuracy[protocol, name].value for name in METRICS}
        check(values, f"{point.method} at depth {point.depth} ({protocol})")
        row: dict[str, Any] = {
            "method": point.method, "depth": point.depth, "kept": point.kept,
            "removed": point.removed, "protocol": protocol, "seeds": len(point.seeds),
            "users": point.users, "_depth": _depth(point), "_state": _state(point),
        }  # fmt: skip
        for name in METRICS:
            row |= three(name, point.value(name, protocol))
        row |= three(f"{HEADLINE} of teacher", point.ratio.get((protocol, HEADLINE)))
        numbers.append(row | (_costs(point, SHOWN_TIMES, quartiles=True) if full else {}))
    columns: list[Column] = [("method", "method", label), ("depth", "_depth", ready)]
    # where all have the same number it stands above the table: a column less to fit on a page
    if len({len(point.seeds) for point in points if point.method != POPULARITY}) > 1:
        columns.append(("seeds", "seeds", text))
    columns += [(name, name, metric) for name in SHOWN]
    if any((protocol, HEADLINE) in point.ratio for point in points):
        columns.append(("of the teacher's", f"{HEADLINE} of teacher", share))
    if full:
        timed = [kind for kind in SHOWN_TIMES if any(kind in point.time for point in points)]
        columns.append(("parameters", "parameters total", size))
        columns += [(f"{kind}, ms", kind, milliseconds) for kind in timed]
    return make_table("methods" if full else "methods_sampled", numbers, columns, group="method")


def _depth(point: Point) -> Cell:
    """The depth; where the kept blocks are not the first ones, also which are gone."""
    if point.info.role == "baseline":
        return Cell(style.NONE)
    first = point.kept in ("0", f"0-{point.depth - 1}") or not point.removed
    note = point.removed if point.span or "," in point.removed else ""
    return Cell(str(point.depth), "" if first or not note else f"without {note}")


def _costs(point: Point, kinds: Sequence[str], *, quartiles: bool = False) -> dict[str, Any]:
    """Parameters, milliseconds and times faster than the teacher, one column a number."""
    row: dict[str, Any] = {f"parameters {name}": n for name, n in point.parameters.items()}
    for kind in kinds:
        spread = point.time.get(kind)
        row[f"{kind} ms"] = spread.median if spread else None
        if quartiles:
            row[f"{kind} ms p25"] = spread.low if spread else None
            row[f"{kind} ms p75"] = spread.high if spread else None
        row |= three(f"{kind} times faster", point.speed.get(kind))
    return row


def _state(point: Point) -> str:
    return "teacher" if point.method == TEACHER else ""


def check(values: Mapping[str, float], where: str) -> None:
    """Refuse metrics that break a bound between them, and say where."""
    try:
        check_metrics(dict(values))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def trial_table(run: Source) -> Table | None:
    """Every trial by itself with its own interval over users; failed ones with their error."""
    summary = as_summary(run)
    trials = summary.run.trials
    if trials.empty:
        return None
    order = sorted(set(trials["method"]), key=method_order)
    frame = trials.assign(place=trials["method"].map(order.index))
    frame = frame.sort_values(["place", "depth", "trial"], kind="stable")
    frame = frame.drop(columns="place").reset_index(drop=True)
    measured = _own_metrics(summary.run.metrics)
    own = [measured.get(str(trial), {}) for trial in frame["trial"]]
    numbers = records(frame)
    for row, found in zip(numbers, own, strict=True):
        check({name: interval.value for name, interval in found.items()}, f"trial {row['trial']}")
        row |= {f"_{name}": metric_cell(found.get(name)) for name in BRIEF}
        row["_depth"] = str(row["depth"] or style.NONE)
        failed = row["status"] != "done"
        row |= {"_state": "failed" if failed else "", "_error": ""}
        if failed:
            error = row["error"].strip() if isinstance(row["error"], str) else ""
            row["_error"] = (error or "no message").splitlines()[0]
    for name in SHOWN:
        frame[name] = [found[name].value if name in found else math.nan for found in own]
    columns: list[Column] = [
        ("trial", "trial", text), ("method", "method", label), ("depth", "_depth", text),
        ("seed", "seed", text), *((name, f"_{name}", ready) for name in BRIEF),
        ("parameters", "parameters_total", size), ("training, s", "training_seconds", seconds),
    ]  # fmt: skip
    if len(summary.failed):
        columns.append(("error", "_error", text))
    return make_table("trials", numbers, columns, words=2, frame=frame)


def _own_metrics(metrics: pd.DataFrame) -> dict[str, dict[str, Interval]]:
    """Test metrics of all users under full ranking, by trial and name."""
    found: dict[str, dict[str, Interval]] = {}
    if metrics.empty:
        return found
    of_test = (metrics["split"] == "test") & (metrics["slice"] == ALL)
    chosen = metrics[of_test & (metrics["protocol"] == FULL)]
    columns = ("trial", "metric", "value", "ci_low", "ci_high")
    for trial, name, value, low, high in zip(*(chosen[c] for c in columns), strict=True):
        found.setdefault(str(trial), {})[str(name)] = Interval(float(value), low, high)
    return found


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
    full, numbers = teacher.cost("parameters"), []
    for line in lines:
        point = next(filter(None, line.values()))
        name, own = point.info.label, point.cost("parameters")
        below = style.percent(own / full, 0) if own and full and point is not teacher else ""
        row: dict[str, Any] = {
            "depth": point.depth, "method": "" if point.depth else point.method,
            "_depth": f"{point.depth}, the {name}" if point is teacher else point.depth or name,
            "_parameters": Cell(style.count(own), below), "_state": _state(point),
        } | {f"parameters {part}": value for part, value in point.parameters.items()}  # fmt: skip
        for kind, timed_point in line.items():
            spread = timed_point and timed_point.time.get(kind)
            row[f"{kind} ms"] = spread.median if spread else None
            speed = timed_point.speed.get(kind) if timed_point else None
            row |= three(f"{kind} times faster", speed)
        numbers.append(row)
    columns: list[Column] = [
        ("depth", "_depth", text), ("parameters", "_parameters", ready),
        ("of them in blocks", "parameters blocks", size),
        *((KINDS[kind], kind, milliseconds) for kind in kinds),
    ]  # fmt: skip
    return make_table("cost", numbers, columns)


# --- ways to a shallow model, beside plain fine-tuning ---------------------------------------


def ablation_table(run: Source) -> Table | None:
    """Paired change of NDCG@10 against fine-tuning, by depth; None without two to compare.

    Over the seeds that both have. Seconds are means over seeds, without and with those that the
    teacher took, whose training and features all students share.
    """
    summary = as_summary(run)
    plain = {point.depth: point for point in summary.of(PLAIN)}
    others = [p for p in summary.points if p.info.role in ("trained", "control")]
    pairs = [
        (point, plain[depth])
        for depth in sorted(plain)
        for point in others
        if point.depth == depth and point.method != PLAIN
    ]
    numbers: list[dict[str, Any]] = []
    for (point, reference), found in zip(pairs, paired_changes(summary, pairs), strict=True):
        if found is None or found.ratio is None:
            continue
        if not numbers or numbers[-1]["depth"] != point.depth:
            numbers.append(_ablation_row(summary, reference, len(reference.seeds)))
        row = _ablation_row(summary, point, found.seeds)
        row["_change"] = difference_cell(found.difference)
        row["_relative"] = share_cell(less_one(found.ratio), sign=True)
        numbers.append(row | three("difference", found.difference) | three("ratio", found.ratio))
    if not numbers:
        return None
    columns: list[Column] = [
        ("depth", "depth", text), ("method", "method", label), ("seeds", "seeds", text),
        (HEADLINE, "_value", ready), ("change", "_change", ready),
        ("relative", "_relative", ready), ("training, s", "training seconds", seconds),
        ("with teacher", "_seconds", seconds),
    ]  # fmt: skip
    return make_table("ablation", numbers, columns, words=2, group="depth")


def _ablation_row(summary: Summary, point: Point, seeds: int) -> dict[str, Any]:
    """A row without its change: the reference's has none."""
    trials, value = summary.run.trials, point.value(HEADLINE)
    own = trials[trials["trial"].isin(point.trials)]
    took, before = _mean(own, "training_seconds"), _mean(own, "training_teacher_seconds")
    return {
        "depth": point.depth, "method": point.method, "seeds": seeds, "users": point.users,
        HEADLINE: value.value if value else math.nan, "_value": metric_cell(value),
        "_change": Cell("0"), "_relative": None, "training seconds": took,
        "teacher seconds": before, "_seconds": took + before,
    }  # fmt: skip


def _mean(trials: pd.DataFrame, column: str) -> float:
    values: Sequence[float] = trials[column].dropna().tolist() if column in trials else []
    return sum(values) / len(values) if values else math.nan


# --- the teacher with some of its blocks left out, without training --------------------------


def left_out_table(run: Source) -> Table | None:
    """Accuracy without some blocks, and its paired change; None where none was left out.

    Single blocks, spans of blocks, every n-th, and attention or MLP alone, over all seeds.
    """
    points = [p for p in as_summary(run).points if p.info.by_block and p.value(HEADLINE)]
    if not points:
        return None
    numbers = [
        {
            "method": point.method, "removed": point.removed, "depth": point.depth,
            "seeds": len(point.seeds), "users": point.users,
            **three("HR@10", point.value("HR@10")), **three(HEADLINE, point.value(HEADLINE)),
            **three("change", point.change()),
        }
        for point in points
    ]  # fmt: skip
    columns: list[Column] = [
        ("left out", "method", label), ("blocks", "removed", text), ("HR@10", "HR@10", metric),
        (HEADLINE, HEADLINE, metric), (f"change of {HEADLINE}", "change", change),
    ]  # fmt: skip
    return make_table("left_out", numbers, columns, words=2, group="method")


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
    own = summary.ranks.values(FULL, HEADLINE, [teacher.trials])[0].mean(axis=0)  # (U,)
    rows: list[dict[str, Any]] = []
    numbers = []
    for name, inside in _slices(labels):
        users, mean = int(inside.sum()), float(own[inside].mean())
        pairs = [(point, teacher) for point in points]
        changes = [None] * len(pairs) if users < FEWEST else paired_changes(summary, pairs, inside)
        row = {"name": _words(name), "users": users, "mean": Cell(style.accuracy(mean))}
        row["family"] = name.partition(":")[0]
        for place, (point, found) in enumerate(zip(points, changes, strict=True)):
            difference, relative = Interval(math.nan, math.nan, math.nan), math.nan
            if found is not None:
                difference, relative = found.difference, found.share
                more = f", {style.percent(relative, sign=True)}" if found.ratio else ""
                row[f"{place}"] = difference_cell(difference, more)
            numbers.append(
                {
                    "slice": name, "users": users, "method": point.method, "depth": point.depth,
                    "teacher": mean, **three("difference", difference), "relative": relative,
                }
            )  # fmt: skip
        rows.append(row)
    columns: list[Column] = [
        ("group", "name", text), ("users", "users", text), ("teacher", "mean", ready),
        *((point.name, f"{place}", ready) for place, point in enumerate(points)),
    ]  # fmt: skip
    return make_table("slices", rows, columns, group="family", frame=pd.DataFrame(numbers))


def _chosen(summary: Summary) -> tuple[Point, ...]:
    """The answer, and the best trained model at a few depths, shallow to deep.

    Of the depths at which most methods were trained: the shallowest, a middle one, the deepest.
    """
    best: dict[int, Point] = {}
    tried: Counter[int] = Counter()
    for point in summary.points:
        value = point.value(HEADLINE)
        if not value or point.info.role != "trained" or point.depth >= summary.blocks:
            continue
        tried[point.depth] += 1
        other = best.get(point.depth)
        if other is None or value.value > other.accuracy[FULL, HEADLINE].value:
            best[point.depth] = point
    depths = [depth for depth in sorted(best) if tried[depth] == max(tried.values())]
    places = np.linspace(0, len(depths) - 1, min(DEPTHS, len(depths))).round().astype(int)
    points = [best[depths[place]] for place in places.tolist()]
    if (answer := summary.answer) is not None:
        points = [point for point in points if point.depth != answer.depth] + [answer]
    return tuple(sorted(points, key=lambda point: (point.depth, point.method)))


def _slices(labels: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """All users, then each slice of each family in its order: name, and who is inside, (U,)."""
    yield ALL, np.ones(len(labels), bool)
    for family in labels.columns.drop("user"):
        values = labels[family]
        for label in values.cat.categories:
            yield f"{family}:{label}", (values == label).to_numpy(bool)


def _words(name: str) -> str:
    """A slice in words: "history of 3-4 items", "tail target"."""
    family, _, label = name.partition(":")
    if family == "history":
        return f"history of {label} item{'' if label == '1' else 's'}"
    return {ALL: "all", "target": f"{label} target"}.get(family, f"{family} {label}")


def lists_table(run: Source) -> Table | None:
    """Coverage, Gini index and popularity of what is recommended; None where it was not counted.

    Of the baselines, the teacher and the models of :func:`slice_table`; means over seeds, with the
    lowest and the highest below.
    """
    summary = as_summary(run)
    if summary.run.metrics.empty:
        return None
    metrics = summary.run.metrics
    counted = metrics[metrics["metric"].isin(LISTS)].set_index(["metric", "trial"])["value"]
    numbers = []
    baselines = [p for p in summary.points if p.info.role in ("baseline", "teacher")]
    for point in sorted((*baselines, *_chosen(summary)), key=summary.points.index):
        row: dict[str, Any] = {"method": point.method, "depth": point.depth}
        for name in LISTS:
            own = [counted[name, t] for t in point.trials if (name, t) in counted.index]
            row[name] = float(np.mean(own)) if own else math.nan
            row[f"_{name}"] = _spread(own, name) if own else None
        if any(row[f"_{name}"] for name in LISTS):
            numbers.append(row | {"_depth": _depth(point), "_state": _state(point)})
    if not numbers:
        return None
    columns: list[Column] = [("model", "method", label), ("depth", "_depth", ready)]
    columns += [(LISTS[name], f"_{name}", ready) for name in LISTS]
    return make_table("lists", numbers, columns)


LISTS = {"coverage@10": "coverage", "gini@10": "Gini index", "popularity@10": "popularity"}
DIGITS = {"coverage@10": 1, "gini@10": 3, "popularity@10": 2}


def _spread(values: Sequence[float], name: str) -> Cell:
    """A mean over seeds, below it the lowest and the highest."""
    mean, scale = float(np.mean(values)), 100 if name == "coverage@10" else 1
    ends = Interval(mean, min(values), max(values))
    note = style.bounds(ends, scale=scale, digits=DIGITS[name]) if len(values) > 1 else ""
    return Cell(style.percent(mean) if scale == 100 else style.significant(mean), note)


TABLES: tuple[Callable[[Summary], Table | None], ...] = (
    depth_table, partial(depth_table, protocol=SAMPLED), trial_table, ablation_table, slice_table,
    lists_table, left_out_table, cost_table,
)  # fmt: skip


def all_tables(run: Source) -> dict[str, Table]:
    """The tables that the run has data for, by name."""
    summary = as_summary(run)
    made = (table(summary) for table in TABLES)
    return {table.name: table for table in made if table is not None}
