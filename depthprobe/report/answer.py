"""What a run does not show: controls that weaken the answer, warnings, limits of the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthprobe.evaluation.statistics import Interval
from depthprobe.evaluation.sufficiency import RetainedAccuracy, Sufficiency
from depthprobe.report.numbers import FULL, HEADLINE, LEVEL, Point, RunLike, Summary, as_summary
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

FEW_SEEDS = 5


def caveats(summary: Summary, chosen: Point | None) -> tuple[str, ...]:
    """Sentences, the weightiest first; `chosen` is the point that the answer names."""
    found = [
        *_baselines(summary),
        *_no_blocks(summary),
        *_training(summary),
        *_pretraining(summary, chosen),
        *_data(summary),
        *_times(summary),
        *_seeds(summary),
        *_trials(summary),
    ]
    return tuple(dict.fromkeys(found))


def doubt(summary: Summary, baseline: str) -> str:
    """How a baseline puts the teacher's worth in doubt; empty if the teacher is shown better."""
    ratio = next((p.ratio.get((FULL, HEADLINE)) for p in summary.of(baseline)), None)
    if ratio is None or ratio.high < 1:
        return ""
    name = method_style(baseline).label
    less = "less accurate than" if ratio.low > 1 else "not shown to be more accurate than"
    return f"the teacher is {less} {name}, which reaches {in_percent(ratio)} of its {HEADLINE}"


def _baselines(summary: Summary) -> list[str]:
    text = doubt(summary, "sasrec")
    found = [f"{text[0].upper()}{text[1:]}."] if text else []
    if summary.teacher is not None and not summary.of("sasrec"):
        found.append("SASRec was not run: whether a language model is needed at all is not tested.")
    return found


def _no_blocks(summary: Summary) -> list[str]:
    """Heads of one kind, one on the last item's embedding alone: do blocks add anything?"""
    heads = {point.depth: point for point in summary.of("readout")}
    if 0 not in heads or (summary.blocks or 0) not in heads:
        return []
    ratio = summary.against(heads[0], heads[summary.blocks or 0])
    if ratio is None or ratio.high < 1 - summary.margin:
        return []
    return [
        f"It is not shown that blocks add more than {100 * summary.margin:g} %: a fresh head on "
        f"the last item alone reaches {in_percent(ratio)} of the {HEADLINE} of one behind all."
    ]


def _training(summary: Summary) -> list[str]:
    """A teacher that was cut off is an easy one to match."""
    last = int(summary.run.study.recipe.epochs)
    for record in summary.run.records:
        training = record.training
        if record.method == "full" and training is not None and training.best_epoch == last:
            return [
                f"The teacher was best at its last epoch ({last}): a longer training may change "
                "the comparison."
            ]
    return []


def _pretraining(summary: Summary, chosen: Point | None) -> list[str]:
    if chosen is None or summary.run.study.backbone.source == "embedded":
        return []
    control = next((p for p in summary.of("random-init") if p.depth == chosen.depth), None)
    ratio = summary.against(control, chosen) if control is not None else None
    if ratio is None:
        return [f"No random init at depth {chosen.depth}: what pretraining adds is not tested."]
    if ratio.high < 1:
        return []
    return [
        f"Pretraining is not shown to help: random init at depth {chosen.depth} reaches "
        f"{in_percent(ratio)} of this {HEADLINE}."
    ]


def _data(summary: Summary) -> list[str]:
    study, data = summary.run.study, summary.run.manifest.data
    found = []
    if study.data.source == "embedded":
        found.append("The log is the generated default: the numbers say nothing about another log.")
    if study.backbone.source == "embedded":
        found.append(
            "The backbone is the small embedded one with random weights: pretraining has no part."
        )
    return found + [f"Data: {_sentence(warning)}" for warning in data.warnings]


def _times(summary: Summary) -> list[str]:
    timed = any(point.speed for point in summary.points)
    conditions = summary.run.manifest.timing or {}
    if not timed:
        return ["No times were compared: what a shallower model saves in time is not shown."]
    if conditions.get("device", "cpu") == "cpu":
        return ["Times were measured on a CPU; on a GPU the savings can differ."]
    return []


def _seeds(summary: Summary) -> list[str]:
    wanted, compared = int(summary.run.study.seeds), len(summary.seeds_compared)
    if not compared:
        return []
    if compared < wanted:
        plural = "" if compared == 1 else "s"
        return [
            f"{compared} seed{plural} of {wanted} compared: the others are not finished "
            "for the teacher and every candidate."
        ]
    if compared == 1:
        return ["One seed: the intervals do not hold the differences between trainings."]
    if compared < FEW_SEEDS:
        return [f"{compared} seeds: differences between trainings are only roughly known."]
    return []


def _trials(summary: Summary) -> list[str]:
    found = []
    if summary.left_out:
        names = ", ".join(f"{method_style(p.method).label} {p.depth}" for p in summary.left_out)
        found.append(f"Not compared with the teacher, for want of a common seed: {names}.")
    failed, total = len(summary.failed), len(summary.run.trials)
    if failed:
        found.append(f"{failed} of {total} trials failed; their errors are listed below.")
    return found


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


# The answer of a run in words: how many blocks, how to get there, what it saves, how sure.

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


def _row(sufficiency: Sufficiency) -> RetainedAccuracy:
    """The row of the sufficient depth; else the undecided one, else the most accurate."""
    key = (sufficiency.method, sufficiency.depth)
    if sufficiency.depth is None and sufficiency.undecided is not None:
        key = sufficiency.undecided
    found = (row for row in sufficiency.rows if (row.method, row.depth) == key)
    return next(found, max(sufficiency.rows, key=lambda row: row.kept.value))


def _more_users(sufficiency: Sufficiency, row: RetainedAccuracy, floor: str) -> str:
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
