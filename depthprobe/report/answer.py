"""The answer of a run in words: how many blocks, how to get there, what it saves, how sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthprobe.evaluation.statistics import Interval
from depthprobe.evaluation.sufficiency import Kept, Sufficiency
from depthprobe.report.caveats import caveats, doubt
from depthprobe.report.style import (
    accuracy,
    bounds,
    count,
    in_percent,
    method_style,
    percent,
    significant,
    times_faster,
)
from depthprobe.report.summary import FULL, HEADLINE, LEVEL, Point, RunLike, Summary, as_summary

Verdict = Literal[
    "shown",
    "not shown",
    "weak teacher",
    "no comparison",
    "no depth tried",
    "no teacher",
    "nothing finished",
]


@dataclass(frozen=True)
class Tile:
    """A number of the first screen: what, how much, how sure, against what."""

    label: str
    value: str
    interval: str
    note: str


@dataclass(frozen=True)
class Answer:
    """The first screen. What was not measured is None; the sentences say nothing beyond this."""

    verdict: Verdict
    headline: str
    detail: str
    tiles: tuple[Tile, ...]
    caveats: tuple[str, ...]
    margin: float
    blocks: int | None
    users: int  # tested
    method: str | None = None  # of the sufficient depth, else of the best candidate
    depth: int | None = None
    kept: Interval | None = None  # share of the teacher's NDCG@10
    parameters: float | None = None  # share of the teacher's
    inference: Interval | None = None  # times faster than the teacher
    training: Interval | None = None
    users_needed: int | None = None  # to decide about the best undecided one


def build_answer(run: RunLike | Summary) -> Answer:
    """What the run shows, worded no stronger than its numbers."""
    summary = as_summary(run)
    if summary.teacher is not None and summary.sufficiency is not None:
        return _compared(summary, summary.teacher, summary.sufficiency)
    return _uncompared(summary)


def _compared(summary: Summary, teacher: Point, sufficiency: Sufficiency) -> Answer:
    shown = sufficiency.depth is not None and sufficiency.method is not None
    row = _row(sufficiency)
    point = summary.candidates[row.method, row.depth]
    blocks = summary.blocks or teacher.depth
    share = _parameter_share(point, teacher)
    inference, training = point.speed.get("inference"), point.speed.get("training")
    number = len(sufficiency.rows)
    margin, floor = _percent(summary.margin), _percent(1 - summary.margin)
    offer = (
        f"{point.depth} of {blocks} blocks {'keeps' if point.depth == 1 else 'keep'} "
        f"{in_percent(row.kept)} of the teacher's "
        f"{HEADLINE} ({method_style(point.method).label})" + _savings(share, inference, training)
    )
    weak = doubt(summary, "popularity")
    verdict: Verdict = "weak teacher" if weak else "shown" if shown else "not shown"
    if weak:  # then what is kept of its accuracy is worth nothing
        headline = f"No answer: {weak}."
        detail = f"Measured all the same: {offer}."
    elif shown:
        headline = f"{offer}."
        among = f", all {number} candidates taken into account" if number > 1 else ""
        sure = f"{margin} with {_percent(LEVEL)} confidence{among}"
        detail = f"Its loss is within the margin of {sure}.{_shallower(sufficiency)}"
    else:
        headline = (
            f"Not shown at a margin of {margin}: no depth below {blocks} is sure to keep {floor} "
            f"of the teacher's {HEADLINE}."
        )
        detail = f"Best candidate: {offer}."
        if row.kept.low >= 1 - summary.margin:
            detail += (
                f" With all {number} candidates taken into account, its lower bound is "
                f"{_below(row.lower, 1 - summary.margin)}."
            )
        detail += f" {_more_users(sufficiency, row, floor)}"
    return Answer(
        verdict=verdict,
        headline=headline,
        detail=detail,
        tiles=_tiles(point, teacher, row.kept, share),
        caveats=caveats(summary, point),
        margin=summary.margin,
        blocks=blocks,
        users=teacher.users,
        method=point.method,
        depth=point.depth,
        kept=row.kept,
        parameters=share,
        inference=inference,
        training=training,
        users_needed=sufficiency.users_needed,
    )


def _uncompared(summary: Summary) -> Answer:
    teacher, failed = summary.teacher, len(summary.failed)
    shown = [p for p in summary.of("full", "sasrec", "popularity") if p.value(HEADLINE)]
    tried = [p for p in summary.points if p.depth and p.method != "full"]
    verdict: Verdict
    if not summary.points:
        verdict, headline = "nothing finished", "No answer: no trial of this run is finished."
    elif teacher is None:
        verdict = "no teacher"
        headline = (
            "No answer: no trial of the teacher is finished, so nothing can be compared with it."
        )
    elif not tried:
        verdict, headline = "no depth tried", "No answer: no depth below the teacher's was tried."
    else:
        verdict = "no comparison"
        headline = "No answer: no finished trial below full depth can be compared with the teacher."
    said = [
        f"{method_style(p.method).label} {accuracy(p.accuracy[FULL, HEADLINE].value)} "
        f"{bounds(p.accuracy[FULL, HEADLINE], digits=4)}"
        for p in shown
    ]
    detail = f"{HEADLINE} so far: {', '.join(said)}." if said else ""
    if failed:
        detail += f" {failed} of {len(summary.run.trials)} trials failed."
    return Answer(
        verdict=verdict,
        headline=headline,
        detail=detail.strip(),
        tiles=tuple(
            Tile(
                f"{HEADLINE}, {method_style(p.method).label}",
                accuracy(p.accuracy[FULL, HEADLINE].value),
                bounds(p.accuracy[FULL, HEADLINE], digits=4),
                f"{count(p.cost('parameters'))} parameters" if p.cost("parameters") else "",
            )
            for p in shown
        ),
        caveats=caveats(summary, None),
        margin=summary.margin,
        blocks=summary.blocks,
        users=max((point.users for point in summary.points), default=0),
    )


def _row(sufficiency: Sufficiency) -> Kept:
    """The row of the sufficient depth; else the undecided one, else the most accurate."""
    key = (sufficiency.method, sufficiency.depth)
    if sufficiency.depth is None and sufficiency.undecided is not None:
        key = sufficiency.undecided
    found = (row for row in sufficiency.rows if (row.method, row.depth) == key)
    return next(found, max(sufficiency.rows, key=lambda row: row.kept.value))


def _more_users(sufficiency: Sufficiency, row: Kept, floor: str) -> str:
    """What it would take to decide about the best candidate."""
    if sufficiency.users_needed is not None:
        return (
            f"About {_rounded(sufficiency.users_needed)} test users would be needed to decide; "
            f"this run has {sufficiency.users:,}."
        )
    if row.kept.value >= 1 - sufficiency.margin:
        return "The seeds differ too much for more users alone to decide: it takes more seeds."
    if row.kept.high < 1 - sufficiency.margin:
        return f"The whole interval is below {floor}: more users would not change that."
    return f"Its mean is below {floor}: more users are more likely to confirm that."


def _shallower(sufficiency: Sufficiency) -> str:
    """A word on a smaller depth that more users may yet show."""
    if sufficiency.undecided is None or sufficiency.users_needed is None:
        return ""
    method, depth = sufficiency.undecided
    return (
        f" Depth {depth} ({method_style(method).label}) is undecided: about "
        f"{_rounded(sufficiency.users_needed)} test users would decide; this run has "
        f"{sufficiency.users:,}."
    )


def _parameter_share(point: Point, teacher: Point) -> float | None:
    own, whole = point.cost("parameters"), teacher.cost("parameters")
    return own / whole if own and whole else None


def _savings(share: float | None, inference: Interval | None, training: Interval | None) -> str:
    said = [f"with {percent(share, 0)} of the parameters"] if share is not None else []
    said += [
        f"{' '.join(filter(None, times_faster(ratio)))} to {verb}"
        for verb, ratio in (("serve", inference), ("train", training))
        if ratio is not None
    ]
    if len(said) > 1:
        said = [*said[:-2], f"{said[-2]} and {said[-1]}"]
    return f", {', '.join(said)}" if said else ""


def _tiles(point: Point, teacher: Point, kept: Interval, share: float | None) -> tuple[Tile, ...]:
    own, whole = point.value(HEADLINE), teacher.value(HEADLINE)
    tiles = [
        Tile(
            "accuracy kept",
            percent(kept.value),
            bounds(kept, scale=100, digits=1),
            f"{HEADLINE} {accuracy(own.value if own else None)}, "
            f"teacher {accuracy(whole.value if whole else None)}",
        )
    ]
    if share is not None:
        sizes = count(point.cost("parameters")), count(teacher.cost("parameters"))
        note = f"{sizes[0]}, teacher {sizes[1]}"
        tiles.append(Tile("parameters", percent(share, 0), "exact", note))
    for kind, label in (("inference", "inference time"), ("training", "training step")):
        ratio, mine, theirs = point.speed.get(kind), point.time.get(kind), teacher.time.get(kind)
        if ratio is not None and mine is not None and theirs is not None:
            number, interval, word = times_faster(ratio)
            note = f"{significant(mine.median)} ms, teacher {significant(theirs.median)} ms"
            tiles.append(Tile(label, f"{number} {word}".strip(), interval, note))
    return tuple(tiles)


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _rounded(users: int) -> str:
    """Two significant digits, upwards: an estimate that is known no better, and not too few."""
    step = 10 ** max(0, len(str(users)) - 2)
    return f"{-(-users // step) * step:,}"


def _below(share: float, floor: float) -> str:
    """A share in so many digits that it can be told from the floor that it misses."""
    for digits in (1, 2, 3):
        if float(f"{100 * share:.{digits}f}") < 100 * floor:
            break
    return percent(share, digits)
