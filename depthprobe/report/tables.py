"""The tables of a report: numbers for CSV, rounded cells for LaTeX (booktabs) and for the page."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from depthprobe.evaluation.metrics import check_metrics
from depthprobe.evaluation.slices import ALL, FEWEST
from depthprobe.evaluation.statistics import Interval, interval, resampled_means
from depthprobe.files import complete_file
from depthprobe.methods import base_of, method_order, names
from depthprobe.report.numbers import (
    BY_BLOCK,
    CONTROLS,
    FULL,
    HEADLINE,
    LEVEL,
    METRICS,
    SAMPLED,
    Array,
    Point,
    RunLike,
    Summary,
    as_summary,
)
from depthprobe.report.style import (
    NONE,
    accuracy,
    bounds,
    count,
    method_style,
    percent,
    significant,
    times,
)
from depthprobe.runs.tables import OF_LISTS

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

    What was left out block by block is in :func:`depthprobe.report.tables.left_out_table`.

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
                NONE if point.method in names("baseline") else str(point.depth),
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


# What a depth costs, whatever the method: parameters, serving, a training step.

SERVING, TRAINING, LATENCY = "inference", "training", "latency"
KINDS = {SERVING: "to serve, ms", LATENCY: "one user, ms", TRAINING: "training step, ms"}
# A depth is timed once for all methods, but for what a method adds to a training step.
PLAINEST = ("finetune", "early-exit", "heal", "elastic", "random-init", "distill")


def timed(summary: Summary, kind: str) -> list[Point]:
    """For each depth below the whole one, the plainest point whose speed was measured."""
    found: dict[int, Point] = {}
    for point in sorted(summary.points, key=_plainness):
        if point.depth and point.method in PLAINEST and kind in point.speed:
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
    return PLAINEST.index(base) if base in PLAINEST else len(PLAINEST)


def _parameters(point: Point, teacher: Point) -> tuple[Cell, Cell]:
    own, whole = point.cost("parameters"), teacher.cost("parameters")
    share = percent(own / whole, 0) if own and whole and point is not teacher else ""
    return Cell(count(own), share), Cell(count(point.parameters.get("blocks")))


# Trained shallower models against plain fine-tuning at the same depth: what each way adds.

FINETUNED = "finetune"
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
    changes = _ablation_changes(summary, pairs)
    rows, numbers, last = [], [], None
    for (point, plain), found in zip(pairs, changes, strict=True):
        if found is None:
            continue
        if last is not plain:
            rows.append(_ablation_row(summary, plain, None, group=True))
            numbers.append(_ablation_numbers(summary, plain, None))
        last = plain
        rows.append(_ablation_row(summary, point, found, group=False))
        numbers.append(_ablation_numbers(summary, point, found))
    if not rows:
        return None
    return Table("ablation", COLUMNS, 2, tuple(rows), pd.DataFrame(numbers))


_Change = tuple[int, Interval, Interval]  # seeds, difference, ratio


def _pairs(summary: Summary) -> list[tuple[Point, Point]]:
    """Each trained point beside the fine-tuned one of its depth, by depth."""
    plain = {point.depth: point for point in summary.of(FINETUNED)}
    others = [
        p
        for p in summary.points
        if base_of(p.method) in names("trained", "control") and p.method != FINETUNED
    ]
    return [
        (point, plain[depth]) for depth in sorted(plain) for point in others if point.depth == depth
    ]


def _ablation_changes(
    summary: Summary, pairs: Sequence[tuple[Point, Point]]
) -> list[_Change | None]:
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


def _ablation_row(summary: Summary, point: Point, compared: _Change | None, *, group: bool) -> Row:
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


def _ablation_numbers(
    summary: Summary, point: Point, compared: _Change | None
) -> dict[str, object]:
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


# The teacher with some of its blocks left out, without training: every one, in a table.


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
            _change_cell(change_of(point)),
        )
        new = index == 0 or points[index - 1].method != point.method
        rows.append(Row(cells, group=new))
    frame = pd.DataFrame([_left_out_numbers(point) for point in points])
    columns = ("left out", "blocks", "HR@10", HEADLINE, f"change of {HEADLINE}")
    return Table("left_out", columns, 2, tuple(rows), frame)


def change_of(point: Point, metric: str = HEADLINE) -> Interval | None:
    """Relative change against the teacher, paired; None where there is no teacher."""
    ratio = point.ratio.get((FULL, metric))
    return None if ratio is None else Interval(ratio.value - 1, ratio.low - 1, ratio.high - 1)


def _change_cell(change: Interval | None) -> Cell:
    if change is None:
        return Cell(NONE)
    sign = "+" if change.value >= 0 else ""
    return Cell(f"{sign}{percent(change.value)}", bounds(change, scale=100, digits=1))


def _left_out_numbers(point: Point) -> dict[str, object]:
    """Every digit of a row."""
    out: dict[str, object] = {"method": point.method, "removed": point.removed}
    out |= {"depth": point.depth, "seeds": len(point.seeds), "users": point.users}
    for metric in ("HR@10", HEADLINE):
        out |= three(metric, point.value(metric))
    return out | three("change", change_of(point))


# Who loses when blocks go, and what is recommended then: what one average over users hides.

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
        changes = _slice_changes(arms, inside, resamples=resamples) if users >= FEWEST else {}
        found = [changes.get(place) for place in range(len(points))]
        cells = [Cell(_words(name)), Cell(f"{users:,}"), Cell(accuracy(mean))]
        cells += map(_slice_change, found)
        rows.append(Row(tuple(cells), group=family != last, state=""))
        last = family
        numbers += [
            _slice_numbers(name, users, mean, *pair) for pair in zip(points, found, strict=True)
        ]
    columns = ("group", "users", "teacher", *map(_label, points))
    return Table("slices", columns, 1, tuple(rows), pd.DataFrame(numbers))


def lists_table(run: RunLike | Summary) -> Table | None:
    """Coverage, Gini index and popularity of what is recommended; None where it was not counted.

    Of the baselines, the teacher and the models of :func:`slice_table`; means over seeds, with the
    lowest and the highest below.
    """
    summary = as_summary(run)
    found = _of_lists(summary)
    shown = (*summary.of(*names("baseline"), "full"), *_chosen(summary))
    rows, numbers = [], []
    for point in sorted(shown, key=summary.points.index):
        values = {
            name: [found[trial, name] for trial in point.trials if (trial, name) in found]
            for name in OF_LISTS
        }
        if not any(values.values()):
            continue
        depth = NONE if point.method in names("baseline") else str(point.depth)
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
        if value is None or base not in names("trained", "control") or base in CONTROLS:
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


def _slice_changes(
    groups: Sequence[Arms], inside: np.ndarray, *, resamples: int
) -> dict[int, Change]:
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


def _slice_change(found: Change | None) -> Cell:
    if found is None:
        return Cell(NONE)
    change, share = found
    relative = f", {'+' if share >= 0 else ''}{percent(share)}" if math.isfinite(share) else ""
    return Cell(f"{change.value:+.4f}", f"{bounds(change, digits=4)}{relative}")


def _slice_numbers(
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
