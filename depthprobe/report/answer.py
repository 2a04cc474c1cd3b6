"""The answer of a run in words: how many blocks, how to get there, what it saves, how sure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from depthprobe.evaluation.statistics import Interval
from depthprobe.evaluation.sufficiency import Needed, RetainedAccuracy, Sufficiency
from depthprobe.report import style
from depthprobe.report.numbers import (
    FULL,
    HEAD,
    POPULARITY,
    SASREC,
    TEACHER,
    Point,
    Source,
    Summary,
    as_summary,
)
from depthprobe.report.style import in_percent, percent, plain_percent

FEW_SEEDS = 5


class Tile(NamedTuple):
    """A number of the first screen: what, how much, how sure, against what."""

    label: str
    value: str
    interval: str = ""
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """The first screen. What was not measured is None; the sentences say nothing beyond this."""

    verdict: str  # "shown", "not shown", "weak teacher"; else what is missing for an answer
    headline: str
    detail: str
    tiles: tuple[Tile, ...]
    caveats: tuple[str, ...]
    margin: float
    blocks: int
    users: int  # tested
    method: str | None = None  # of the sufficient depth, else of the best candidate
    depth: int | None = None
    kept: Interval | None = None  # share of the teacher's NDCG@10
    parameters: float | None = None  # share of the teacher's
    inference: Interval | None = None  # times faster than the teacher
    training: Interval | None = None
    users_needed: int | None = None  # to decide about the best undecided one


def build_answer(run: Source) -> Answer:
    """What the run shows, worded no stronger than its numbers."""
    summary = as_summary(run)
    if summary.teacher is not None and summary.sufficiency is not None:
        return _compared(summary, summary.teacher, summary.sufficiency)
    return _uncompared(summary)


def _compared(summary: Summary, teacher: Point, sufficiency: Sufficiency) -> Answer:
    row = _row(sufficiency)
    point, blocks = summary.candidates[row.method, row.depth], summary.blocks
    own, full = point.cost("parameters"), teacher.cost("parameters")
    share = own / full if own and full else None
    number, margin = len(sufficiency.rows), plain_percent(summary.margin)
    offer = (
        f"{point.depth} of {blocks} blocks {'keeps' if point.depth == 1 else 'keep'} "
        f"{in_percent(row.kept)} of the teacher's {summary.headline}"
    )
    means, verdict = _means(point, share), "shown" if sufficiency.depth else "not shown"
    if weak := doubt(summary, POPULARITY):  # then what is kept of its accuracy is worth nothing
        verdict = "weak teacher"
        headline, detail = f"No answer: {weak}.", f"Measured all the same: {offer}. {means}"
    elif sufficiency.depth:
        headline = f"{offer}."
        among = f", all {number} candidates taken into account" if number > 1 else ""
        picked = (
            f" It was picked out of {number}: allowing for that, it keeps at least "
            f"{percent(row.lower)}. The interval is for it alone."
            if number > 1
            else ""
        )
        detail = (
            f"With {plain_percent(summary.level)} confidence it loses at most {margin} of the "
            f"teacher's {summary.headline}{among}.{picked} {means}{_shallower(sufficiency)}"
        )
    else:
        floor = 1 - summary.margin
        headline = (
            f"Not shown at a margin of {margin}: no depth below {blocks} is sure to keep "
            f"{plain_percent(floor)} of the teacher's {summary.headline}."
        )
        detail = f"Best candidate: {offer}. {means}"
        if row.kept.low >= floor and sufficiency.seeds > 1:
            detail += (
                f" With all {number} candidates taken into account, its lower bound is "
                f"{_below(row.lower, floor)}."
            )
        detail += f" {_more_users(sufficiency, row)}"
    return Answer(
        verdict, headline, detail, _tiles(summary.headline, point, teacher, row.kept, share),
        caveats(summary, point), summary.margin, blocks, teacher.users, point.method, point.depth,
        row.kept, share, point.speed.get("inference"), point.speed.get("training"),
        sufficiency.needed.users[0] if sufficiency.needed else None,
    )  # fmt: skip


def _uncompared(summary: Summary) -> Answer:
    if not summary.points:
        verdict, headline = "nothing finished", "no trial of this run is finished."
    elif summary.teacher is None:
        verdict = "no teacher"
        headline = "no trial of the teacher is finished, so nothing can be compared with it."
    elif not any(p.info.candidate and p.depth < summary.blocks for p in summary.points):
        verdict = "no depth tried"
        headline = "no model of fewer blocks was trained, and early exits are only a hint."
    else:
        verdict = "no comparison"
        headline = "no finished trial below full depth can be compared with the teacher."
    shown = [p for p in summary.points if p.info.role in ("baseline", "teacher")]
    shown = sorted(
        (p for p in shown if p.value(summary.headline)), key=lambda p: p.method != TEACHER
    )
    reached = {point.info.label: point.accuracy[FULL, summary.headline] for point in shown}
    detail = ", ".join(f"{name} {style.with_bounds(value)}" for name, value in reached.items())
    detail = f"{summary.headline} so far: {detail}." if shown else ""
    if failed := len(summary.failed):
        detail += f" {failed} of {len(summary.run.trials)} trials failed."
    sizes = [style.count(size) if (size := p.cost("parameters")) else "" for p in shown]
    tiles = [
        Tile(
            f"{summary.headline}, {name}",
            style.accuracy(value.value),
            style.bounds(value, 4),
            f"{size} parameters" if size else "",
        )
        for (name, value), size in zip(reached.items(), sizes, strict=True)
    ]  # fmt: skip
    users = max((point.users for point in summary.points), default=0)
    return Answer(
        verdict, f"No answer: {headline}", detail.strip(), tuple(tiles), caveats(summary, None),
        summary.margin, summary.blocks, users,
    )  # fmt: skip


def _row(sufficiency: Sufficiency) -> RetainedAccuracy:
    """The row of the sufficient depth; else the undecided one, else the most accurate."""
    key = (sufficiency.method, sufficiency.depth)
    if sufficiency.depth is None and sufficiency.needed is not None:
        key = sufficiency.needed[:2]
    named = (row for row in sufficiency.rows if (row.method, row.depth) == key)
    return next(named, max(sufficiency.rows, key=lambda row: row.kept.value))


def _more_users(sufficiency: Sufficiency, row: RetainedAccuracy) -> str:
    """What it would take to decide about the best candidate."""
    floor = 1 - sufficiency.margin
    if sufficiency.seeds == 1:
        return "One seed shows nothing, for trainings differ: run three or more."
    if sufficiency.needed is not None:
        return f"{_needed(sufficiency, sufficiency.needed)}."
    if row.kept.high < floor:
        return (
            f"The whole interval is below {plain_percent(floor)}: more users would not change that."
        )
    return f"Its mean is below {plain_percent(floor)}: more users are more likely to confirm that."


def _shallower(sufficiency: Sufficiency) -> str:
    """A word on a smaller depth that more users may yet show."""
    if sufficiency.needed is None:
        return ""
    label = style.method_info(sufficiency.needed.method).label
    words = _needed(sufficiency, sufficiency.needed)
    return f" Depth {sufficiency.needed.depth} ({label}) is undecided. {words}."


def _needed(sufficiency: Sufficiency, needed: Needed) -> str:
    """How many users, or how many seeds, would decide; first for even odds, then for 80 %."""
    (users, more_users), (seeds, more_seeds) = needed.users, needed.seeds
    with_users = with_seeds = ""
    if users is not None:
        surely = f" ({_rounded(more_users)} for 80 %)" if more_users else ""
        with_users = f"about {_rounded(users)} test users{surely} instead of {sufficiency.users:,}"
    if seeds is not None:
        surely = f" ({more_seeds} for 80 %)" if more_seeds else ""
        with_seeds = f"{seeds} seeds{surely} instead of {sufficiency.seeds}"
    if users is None and seeds is None:
        return "Neither more users nor more seeds alone would decide"
    if users is None:
        with_seeds += ", for the seeds differ too much for more users alone to decide"
    return f"Even odds to decide take {', or '.join(filter(None, (with_users, with_seeds)))}"


def _means(point: Point, share: float | None) -> str:
    """How to get there, and what it saves."""
    said = f"Method: {point.info.label}."
    if share is not None:
        said += f" It has {percent(share, 0)} of the parameters."
    for kind, verb in (("inference", "serve"), ("training", "train")):
        if kind in point.speed:
            said += f" It is {style.times_faster(point.speed[kind])} to {verb}."
    return said


def _tiles(
    metric: str, point: Point, teacher: Point, kept: Interval, share: float | None
) -> tuple[Tile, ...]:
    both = (point, teacher)
    own, theirs = (style.accuracy(p.accuracy[FULL, metric].value) for p in both)
    note = f"{metric} {own}, teacher {theirs}"
    tiles = [Tile("accuracy kept", percent(kept.value), style.bounds(kept, 1, scale=100), note)]
    if share is not None:
        own, theirs = (style.count(p.cost("parameters")) for p in both)
        tiles.append(Tile("parameters", percent(share, 0), "exact", f"{own}, teacher {theirs}"))
    for kind, label in (("inference", "inference time"), ("training", "training step")):
        if kind in point.speed:
            own, theirs = (style.significant(p.time[kind].value) for p in both)
            note = f"{own} ms, teacher {theirs} ms"
            value, _, interval = style.times_faster(point.speed[kind]).partition(" [")
            tiles.append(Tile(label, value, interval and f"[{interval}", note))
    return tuple(tiles)


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


# --- what a run does not show ----------------------------------------------------------------


def caveats(summary: Summary, chosen: Point | None) -> tuple[str, ...]:
    """Sentences, the weightiest first; `chosen` is the point that the answer names."""
    found = [*_controls(summary, chosen), *_conditions(summary)]
    if summary.left_out:
        names = ", ".join(point.name for point in summary.left_out)
        found.append(f"Not compared with the teacher, for want of a common seed: {names}.")
    if failed := len(summary.failed):
        total = len(summary.run.trials)
        found.append(f"{failed} of {total} trials failed; their errors are listed below.")
    return tuple(dict.fromkeys(found))


def doubt(summary: Summary, baseline: str) -> str:
    """How a baseline puts the teacher's worth in doubt; empty if the teacher is shown better."""
    ratio = next((p.ratio.get((FULL, summary.headline)) for p in summary.of(baseline)), None)
    if ratio is None or ratio.high < 1:
        return ""
    name = style.method_info(baseline).label
    less = "less accurate than" if ratio.low > 1 else "not shown to be more accurate than"
    return (
        f"the teacher is {less} {name}, which reaches {in_percent(ratio)} of its {summary.headline}"
    )


def _controls(summary: Summary, chosen: Point | None) -> Iterator[str]:
    """Does it take a language model, its blocks, its pretraining; is the teacher at its best?"""
    study = summary.run.study
    if text := doubt(summary, SASREC):
        yield f"T{text[1:]}."
    if summary.teacher is not None and not summary.of(SASREC):
        yield "SASRec was not run: whether a language model is needed at all is not tested."
    # heads of one kind, one on the last item's embedding alone
    heads = {point.depth: point for point in summary.of(HEAD)}
    if 0 in heads and (full := heads.get(summary.blocks)):
        ratio = summary.against(heads[0], full)
        if ratio is not None and ratio.high >= 1 - summary.margin:
            yield (
                f"It is not shown that blocks add more than {plain_percent(summary.margin)}: a "
                f"fresh head on the last item alone reaches {in_percent(ratio)} of the "
                f"{summary.headline} of one behind all blocks."
            )
    last = int(study.recipe.epochs)
    trained = [r.training for r in summary.run.records if r.method == TEACHER and r.training]
    if any(training.best_epoch == last for training in trained):
        # a teacher that was cut off is an easy one to match
        yield (
            f"The teacher was best at its last epoch ({last}): a longer training may change the "
            "comparison."
        )
    if chosen is not None and study.backbone.source != "embedded":
        fresh = [p for p in summary.points if p.info.fresh and p.depth == chosen.depth]
        ratio = summary.against(fresh[0], chosen) if fresh else None
        if ratio is None:
            yield f"No random init at depth {chosen.depth}: what pretraining adds is not tested."
        elif ratio.high >= 1:
            yield (
                f"Pretraining is not shown to help: random init at depth {chosen.depth} reaches "
                f"{in_percent(ratio)} of this {summary.headline}."
            )


def _conditions(summary: Summary) -> Iterator[str]:
    """What the data, the machine and the number of seeds leave open."""
    study, manifest = summary.run.study, summary.run.manifest
    if study.data.source == "embedded":
        yield "The log is the generated default: the numbers say nothing about another log."
    if study.backbone.source == "embedded":
        yield "The backbone is the small embedded one with random weights: pretraining has no part."
    yield from (f"Data: {warning.rstrip('.')}." for warning in manifest.data.warnings)
    if not any(point.speed for point in summary.points):
        yield "No times were compared: what a shallower model saves in time is not shown."
    elif (manifest.timing or {}).get("device", "cpu") == "cpu":
        yield "Times were measured on a CPU; on a GPU the savings can differ."
    compared = len(summary.seeds_compared)
    seeds = style.plural(compared, "seed")
    if 0 < compared < study.seeds:
        yield (
            f"{seeds} of {study.seeds} compared: the others are not finished for the teacher and "
            "every candidate."
        )
    elif compared == 1:
        yield "One seed: the intervals do not hold the differences between trainings."
    elif 0 < compared < FEW_SEEDS:
        yield f"{seeds}: differences between trainings are only roughly known."
