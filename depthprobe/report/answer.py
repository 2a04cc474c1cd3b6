"""The report's first screen: what to ship, how sure that is, what it saves, and caveats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from depthprobe import formatting
from depthprobe.errors import shell_line
from depthprobe.evaluation.slices import FEWEST
from depthprobe.evaluation.statistics import Interval
from depthprobe.evaluation.sufficiency import Numbers, RetainedAccuracy, Sufficiency
from depthprobe.formatting import in_percent, percent, plain_percent, with_bounds
from depthprobe.methods import method_info
from depthprobe.report.controls import order_words
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
from depthprobe.study import is_candidate, settings_of

FEW_SEEDS = 5
NAMED = 6  # models that a sentence names before "and N more"
SHOWN, BETTER_BASELINE, WEAK = "shown", "SASRec is better", "weak teacher"


class Tile(NamedTuple):
    """A number on the first screen: label, value, interval, and what it is compared with."""

    label: str
    value: str
    interval: str = ""
    note: str = ""


class Quantized(NamedTuple):
    """The recommended model after quantisation, compared with itself before."""

    trial: str
    kept: Interval  # share of the unquantised model's headline metric
    bytes: float | None  # share of the unquantised model's
    latency: Interval | None  # times faster for one user
    command: str


@dataclass(frozen=True)
class Answer:
    """The first screen. Unmeasured values are None; the sentences claim no more than the values."""

    verdict: str  # "shown", "not shown", ...; or what is missing for an answer
    lines: tuple[str, ...]  # what to do; how sure that is; what it saves, and against SASRec
    tiles: tuple[Tile, ...]
    caveats: tuple[str, ...]
    margin: float
    blocks: int
    users: int  # tested
    command: str = ""  # exports the recommended model
    trial: str = ""  # the recommended trial; empty if there is none
    quantized: Quantized | None = None  # the same quantised, if it was measured
    method: str | None = None  # of the sufficient depth, or of the best candidate
    depth: int | None = None
    kept: Interval | None = None  # share of the teacher's headline metric
    parameters: float | None = None  # share of the teacher's
    inference: Interval | None = None  # times faster than the teacher
    training: Interval | None = None
    sasrec: Interval | None = None  # share of SASRec's headline metric


def build_answer(run: Source) -> Answer:
    """Put the run's result into words that are no stronger than its numbers."""
    summary = as_summary(run)
    if summary.teacher is not None and summary.sufficiency is not None:
        return _compared(summary, summary.teacher, summary.sufficiency)
    return _uncompared(summary)


def _compared(summary: Summary, teacher: Point, sufficiency: Sufficiency) -> Answer:
    row = _row(sufficiency)
    point, blocks = summary.candidates[row.method, row.depth], summary.blocks
    own, full = point.cost("parameters"), teacher.cost("parameters")
    share = own / full if own and full else None
    baseline = next(iter(summary.of(SASREC)), None)
    against = summary.compare(point, baseline) if baseline else None
    ratio = against.ratio if against else None
    worse = bool(ratio and ratio.high < 1 and against and against.seeds > 1)
    place = f"depth {point.depth} of {blocks}"
    what = f"{point.info.label}, {place}"
    keeps = f"keeps {in_percent(row.kept)} of the teacher's {summary.headline}."
    ship: Point | None = point
    verdict, advice = SHOWN, f"Ship the {point.info.label} model, {place}: it {keeps}"
    details = [_how_sure(summary, sufficiency, row)]
    if not row.shown:
        verdict, (advice, why) = "not shown", _advice(summary, sufficiency)
        ship = teacher if advice.startswith("Keep all blocks") else None
        details = [why, f"Best candidate: {what}. It {keeps}", *details]
    saves, tiles = _saves(point, share), _tiles(summary, point, teacher, row.kept, share, ratio)
    if ratio is not None:
        saves += f" Its {summary.headline} is {in_percent(ratio)} of SASRec's."
    if weak := doubt(summary, POPULARITY):
        verdict, advice, ship = WEAK, f"No answer: the teacher {weak[0]}.", None
        details = [f"{weak[1]}. What a shallower model keeps of such a teacher is worth little."]
        saves, tiles = "", _level_tiles(summary)
    elif worse and baseline:
        verdict, ship = BETTER_BASELINE, baseline
        model, named = "best shallow model", "Best candidate"
        if row.shown:  # it need not be the most accurate one
            model, named = "shallowest model that suffices", "Smallest sufficient depth"
        better = f"is more accurate than the {model}"
        advice = f"Ship SASRec: it {better}, and no dearer."
        if dearer := _extra_cost(baseline, point):
            advice, ship = f"Not decided: SASRec {better}, but {dearer}.", None
        elif not row.shown and not doubt(summary, SASREC):
            advice = f"Ship SASRec, or the teacher if its cost does not matter: SASRec {better}."
        details = [f"{named}: {what}. It {keeps}", details[-1]]
    if any(other.lower > 1 for other in sufficiency.rows):
        details.append("The teacher is undertrained: a shallower model is more accurate.")
    trial = _best_trial(summary, ship) if ship else ""
    smaller = _quantized(summary, ship, trial) if ship else None
    lines = (advice, " ".join(filter(None, details)), saves.strip())
    return Answer(
        verdict, (*lines, _quantized_words(summary, smaller)) if smaller else lines, tiles,
        caveats(summary, point), summary.margin, blocks, teacher.users,
        _export(summary, ship) if ship else "", trial, smaller, point.method, point.depth,
        row.kept, share, point.speed.get("inference"), point.speed.get("training"), ratio,
    )  # fmt: skip


def _uncompared(summary: Summary) -> Answer:
    failure = ""
    if not summary.points:
        verdict, missing = "nothing finished", "no trial of this run is finished."
    elif summary.teacher is None:
        verdict = "no teacher"
        missing = "no trial of the teacher is finished, so nothing can be compared with it."
        if TEACHER not in summary.run.study.methods:
            missing = f"this study has no teacher ({TEACHER}) to compare its models with."
        for trial in summary.failed.to_dict("records"):
            if trial["method"] == TEACHER:
                missing = "the teacher failed."
                failure = f"Its error: {str(trial['error'])[:160]}."
    elif not any(0 < p.depth < summary.blocks for p in summary.points):
        verdict, missing = "no depth tried", "no depth below the teacher's was tried."
    elif not any(p.info.candidate for p in summary.points):
        verdict = "probes only"
        missing = "no shallower model was trained, and probes alone show no depth to ship."
    elif not any(is_candidate(summary.run.study, p.method) for p in summary.points):
        verdict, missing = "no depth tried", "narrower and looped models show no depth to ship."
    elif (own := summary.teacher.value(summary.headline)) and not own.value:
        verdict = "no hit"
        missing = f"the teacher hits no target, so its {summary.headline} has no share to keep."
    else:
        verdict = "no comparison"
        missing = "no finished trial below full depth can be compared with the teacher."
    name = summary.headline
    texts = [f"{p.info.label} {with_bounds(p.accuracy[FULL, name])}" for p in _levels(summary)]
    so_far = f"{name} so far: {', '.join(texts)}." if texts else ""
    users = max((point.users for point in summary.points), default=0)
    found = caveats(summary, None)
    return Answer(
        verdict, (f"No answer: {missing}", failure, so_far), _level_tiles(summary), found,
        summary.margin, summary.blocks, users,
    )  # fmt: skip


def _levels(summary: Summary) -> list[Point]:
    """The teacher and the baselines with a known accuracy."""
    found = [p for p in summary.points if p.info.role in ("baseline", "teacher")]
    known = [p for p in found if p.value(summary.headline)]
    return sorted(known, key=lambda point: point.method != TEACHER)


def _level_tiles(summary: Summary) -> tuple[Tile, ...]:
    """The accuracy of teacher and baselines, if shares of the teacher's accuracy mean little."""
    tiles = []
    for point in _levels(summary):
        value, size = point.accuracy[FULL, summary.headline], point.cost("parameters")
        note = f"{formatting.count(size)} parameters" if size else ""
        label = f"{summary.headline}, {point.info.label}"
        number = formatting.accuracy(value.value)
        tiles.append(Tile(label, number, formatting.bounds(value, 4), note))
    return tuple(tiles)


def _row(sufficiency: Sufficiency) -> RetainedAccuracy:
    """The row of the sufficient depth, else of the undecided one, else of the most accurate."""
    if sufficiency.row is not None:
        return sufficiency.row
    nearest = sufficiency.needed[:2] if sufficiency.needed is not None else None
    named = (row for row in sufficiency.rows if (row.method, row.depth) == nearest)
    return next(named, max(sufficiency.rows, key=lambda row: row.kept.value))


# --- what to do ------------------------------------------------------------------------------


def _best_trial(summary: Summary, point: Point) -> str:
    """The trial of a point with the best validation score."""
    scores = {record.id: record.validation for record in summary.run.records}
    found = [(v.ndcg if (v := scores.get(trial)) else 0.0, trial) for trial in point.trials]
    return max(found, key=lambda pair: pair[0])[1]


def _export(summary: Summary, point: Point) -> str:
    """The command that exports a point's best trial; empty if it can't be exported."""
    if point.info.exportable is None and point.method != SASREC:
        return ""
    return _export_trial(summary, _best_trial(summary, point))


def _export_trial(summary: Summary, trial: str) -> str:
    return f"depthprobe export {shell_line([str(summary.run.path), trial])} DIR"


def _quantized(summary: Summary, ship: Point, trial: str) -> Quantized | None:
    """The smallest quantised model of a trial whose mean is within the margin.

    If none is within it, the most accurate one.
    """
    found = [
        (kept, point)
        for point in summary.quantized(ship)
        if trial in point.of and (kept := summary.against(point, ship)) is not None
    ]
    if not found:
        return None
    near = [each for each in found if each[1].bytes and each[0].value >= 1 - summary.margin]
    kept, best = (
        min(near, key=lambda each: each[1].bytes or 0.0)
        if near
        else max(found, key=lambda each: each[0].value)
    )
    name = best.trials[best.of.index(trial)]
    part = best.bytes / ship.bytes if best.bytes and ship.bytes else None
    latency = summary.faster(best, ship, "latency")
    return Quantized(name, kept, part, latency, _export_trial(summary, name))


def _quantized_words(summary: Summary, of: Quantized) -> str:
    """What a quantised model keeps and saves, without a claim that it suffices."""
    said = f"Quantised, as {of.trial}, it keeps {in_percent(of.kept)} of its {summary.headline}."
    held = "" if of.bytes is None else f" It then has {percent(of.bytes, 0)} of its bytes."
    faster = of.latency and f" For one user it is {formatting.times_faster(of.latency)}."
    return f"{said}{held}{faster or ''} That this suffices is not tested."


def _extra_cost(baseline: Point, point: Point) -> str:
    """How the baseline costs more than the point: in time, or in size if it was not timed."""
    kinds = (("inference", "is slower to serve"), ("parameters", "has more parameters"))
    for cost, dearer in kinds:
        own, other = baseline.cost(cost), point.cost(cost)
        if own and other:
            return dearer if own > other else ""
    return ""


def _advice(summary: Summary, sufficiency: Sufficiency) -> tuple[str, str]:
    """Advice in one line if no depth is shown to suffice, and further sentences."""
    floor = plain_percent(1 - sufficiency.margin)
    if sufficiency.seeds == 1:
        more = "Run three seeds or more (--seeds 3)."
        if summary.run.study.seeds > 1:
            more = "The others are not finished for the teacher and every candidate."
        if summary.found is not None and summary.found.ended:
            more = f"The search ended: {summary.found.ended}."
        return f"Not decided: one seed never shows a depth. {more}", ""
    if (needed := sufficiency.needed) is not None:
        more = needed_words(*needed[2:], users=sufficiency.users, seeds=sufficiency.seeds)
        return f"Not decided: {more}.", likely_words(*needed[2:])
    if summary.found is not None and summary.found.state.open:  # the search hardly trained these
        return f"Not decided: no depth is shown to keep {floor} of the teacher's accuracy.", ""
    if all(other.kept.high < 1 - sufficiency.margin for other in sufficiency.rows):
        return f"Keep all blocks: no shallower model keeps {floor} of the teacher's accuracy.", ""
    return (
        f"Not decided: no depth is shown to keep {floor} of the teacher's accuracy.",
        "No mean reaches that either, so more users or seeds will probably confirm it.",
    )


def needed_words(more_users: Numbers, more_seeds: Numbers, *, users: int, seeds: int) -> str:
    """How many users, or how many seeds, would decide with even odds."""
    if not (ways := _ways(more_users, more_seeds, 0)):
        return "neither more users nor more seeds alone would decide"
    have = ((more_users, users), (more_seeds, seeds))
    now = " and ".join(f"{number:,}" for numbers, number in have if any(numbers[:1]))
    return f"even odds of a decision take about {ways} ({now} now)"


def likely_words(more_users: Numbers, more_seeds: Numbers) -> str:
    """A sentence for odds of 80 %; empty if no number reaches them."""
    ways = _ways(more_users, more_seeds, 1)
    return f"Odds of 80 % take about {ways}." if ways else ""


def _ways(more_users: Numbers, more_seeds: Numbers, odds: int) -> str:
    ways = (("test users", more_users), ("seeds", more_seeds))
    known = [(noun, number) for noun, found in ways for number in found[odds : odds + 1]]
    return " or ".join(f"{_rounded(number)} {noun}" for noun, number in known if number)


def _rounded(number: int) -> str:
    """Round up to two significant digits: the estimate is rough, and must not be too low."""
    step = 10 ** max(0, len(str(number)) - 2)
    return f"{-(-number // step) * step:,}"


def _how_sure(summary: Summary, sufficiency: Sufficiency, row: RetainedAccuracy) -> str:
    """Words for the confidence, with a note if the candidate was picked from several."""
    number, margin = len(sufficiency.rows), plain_percent(summary.margin)
    picked = f", allowing for the choice among {number} candidates" * (number > 1)
    picked = ", allowing for all depths and looks of the search" if summary.found else picked
    if row.shown:
        said = (
            f"With {plain_percent(summary.level)} confidence it loses at most {margin}: it keeps "
            f"at least {_percent_below(row.lower, 1)}{picked}."
        )
        if picked:
            said += " The interval is for this model alone."
        if (needed := sufficiency.needed) is not None:
            label = method_info(needed.method).label
            words = needed_words(*needed[2:], users=sufficiency.users, seeds=sufficiency.seeds)
            said += f" Depth {needed.depth} ({label}) is undecided: {words}."
        return said
    if sufficiency.seeds == 1:
        return "The interval is over users alone: one seed cannot say how much trainings differ."
    sure = f"only {_percent_below(row.lower, 1 - summary.margin)}" if row.lower > 0 else "nothing"
    asked = plain_percent(1 - summary.margin)
    return (
        f"The margin asks for {asked}; with {plain_percent(summary.level)} confidence {sure} is "
        f"shown{picked}."
    )


def _percent_below(share: float, floor: float) -> str:
    """A share with enough digits to look smaller than the floor that it misses."""
    for digits in (1, 2, 3):
        if float(f"{100 * share:.{digits}f}") < 100 * floor:
            break
    return percent(share, digits if share < floor else 1)


def _saves(point: Point, share: float | None) -> str:
    said = "" if share is None else f"It has {percent(share, 0)} of the parameters."
    for kind, verb in (("inference", "serve"), ("training", "train")):
        if kind in point.speed:
            said += f" It is {formatting.times_faster(point.speed[kind])} to {verb}."
    return said


def _tiles(
    summary: Summary,
    point: Point,
    teacher: Point,
    kept: Interval,
    share: float | None,
    ratio: Interval | None,
) -> tuple[Tile, ...]:
    both, name = (point, teacher), summary.headline
    own, theirs = (formatting.accuracy(p.accuracy[FULL, name].value) for p in both)
    note = f"{name} {own}, teacher {theirs}"
    tiles = [
        Tile("accuracy kept", percent(kept.value), formatting.bounds(kept, 1, scale=100), note)
    ]
    if share is not None:
        own, theirs = (formatting.count(p.cost("parameters")) for p in both)
        tiles.append(Tile("parameters", percent(share, 0), "exact", f"{own}, teacher {theirs}"))
    for kind in ("inference", "training"):
        if kind in point.speed:
            value, _, ends = formatting.times_faster(point.speed[kind]).partition(" [")
            own, theirs = (formatting.significant(p.time[kind].value) for p in both)
            note = f"{own} ms, teacher {theirs} ms"
            tiles.append(Tile(f"{kind} time", value, ends and f"[{ends}", note))
    if ratio is not None:
        baseline = summary.of(SASREC)[0]
        note = f"SASRec {formatting.accuracy(baseline.accuracy[FULL, name].value)}"
        note += f", {formatting.count(baseline.cost('parameters'))} parameters"
        ends = formatting.bounds(ratio, 1, scale=100)
        tiles.append(Tile("against SASRec", percent(ratio.value), ends, note))
    return tuple(tiles)


# --- read before deciding ---------------------------------------------------------------------


def caveats(summary: Summary, chosen: Point | None) -> tuple[str, ...]:
    """Caveats, the most important first; ``chosen`` is the point that the answer names."""
    found = [*_data(summary), *_controls(summary, chosen), *_conditions(summary)]
    if summary.left_out and summary.teacher is not None:
        names = ", ".join(point.name for point in summary.left_out)
        found.append(f"Not compared with the teacher, for want of a common seed: {names}.")
    if failed := len(summary.failed):
        total = len(summary.run.trials)
        found.append(f"{failed} of {total} trials failed; their errors are listed below.")
    return tuple(dict.fromkeys(found))


def doubt(summary: Summary, baseline: str) -> tuple[str, str] | None:
    """How a baseline casts doubt on the teacher; None if the teacher is shown to be better."""
    ratio = next((p.ratio.get((FULL, summary.headline)) for p in summary.of(baseline)), None)
    if ratio is None or ratio.high < 1:
        return None
    name = method_info(baseline).label
    less = "less accurate than" if ratio.low > 1 else "not shown to be more accurate than"
    reaches = f"reaches {in_percent(ratio)} of the teacher's {summary.headline}"
    return f"is {less} {name}", f"{name[0].upper()}{name[1:]} {reaches}"


def _data(summary: Summary) -> Iterator[str]:
    """Caveats about the log."""
    run, teacher = summary.run, summary.teacher
    yield from (f"Data: {warning.rstrip('.')}." for warning in run.manifest.data.warnings)
    if run.study.data.source == "embedded":
        yield "The log is the generated default: the numbers say nothing about another log."
    if teacher is not None and teacher.users:
        values = summary.ranks.values(FULL, summary.headline, [teacher.trials])[0]  # (S, U)
        hits = int(values.any(axis=0).sum())
        if 0 < hits < FEWEST:
            users = formatting.plural(hits, "user")
            yield f"The teacher hits the targets of {users} alone: intervals are rough."


def _controls(summary: Summary, chosen: Point | None) -> Iterator[str]:
    """Caveats: is the teacher good, and are a language model, its blocks and pretraining needed?"""
    study = summary.run.study
    if found := doubt(summary, SASREC):
        yield f"The teacher {found[0]}. {found[1]}."
    if summary.teacher is not None and not summary.of(SASREC):
        yield "SASRec was not run: whether a language model is needed at all is not tested."
    # compare the read-out of all blocks with one on only the last item's embedding
    heads = {point.depth: point for point in summary.of(HEAD)}
    if 0 in heads and (full := heads.get(summary.blocks)):
        ratio = summary.against(heads[0], full)
        if ratio is not None and ratio.high >= 1 - summary.margin:
            read = "token" if study.backbone.reads_titles else "item"
            yield (
                f"It is not shown that blocks add more than {plain_percent(summary.margin)}: a "
                f"fresh head on the last {read} alone reaches {in_percent(ratio)} of the "
                f"{summary.headline} of one behind all blocks."
            )
    said, matters = order_words(summary)
    if not matters:
        yield said
    if chosen is not None and study.backbone.source != "embedded" and not study.backbone.own:
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
    """Caveats about trainings, machine and number of seeds."""
    study, manifest = summary.run.study, summary.run.manifest
    yield from _trainings(summary)
    if study.backbone.source == "embedded":
        yield "The backbone is the small embedded one with random weights: pretraining has no part."
    if len(study.recipe.rates) == 1 and any(p.info.trains for p in summary.points):
        rate = formatting.rounded(*study.recipe.rates)
        yield (
            f"The learning rate was not tuned ({rate} for all): with another one, depths "
            "and random weights may compare otherwise."
        )
    if not any(point.speed for point in summary.points):
        yield "No times were compared: what a shallower model saves in time is not shown."
    elif (manifest.timing or {}).get("device", "cpu") == "cpu":
        yield "Times were measured on a CPU; on a GPU the savings can differ."
    compared = len(summary.seeds_compared)
    seeds = formatting.plural(compared, "seed")
    if 0 < compared < study.seeds:
        yield (
            f"{seeds} of {study.seeds} compared: the others are not finished for the teacher and "
            "every candidate."
        )
    elif compared == 1:
        yield "One seed: the intervals do not hold the differences between trainings."
    elif 0 < compared < FEW_SEEDS:
        yield f"{seeds}: differences between trainings are only roughly known."


def _trainings(summary: Summary) -> Iterator[str]:
    """Which models might be better with a longer training, or another learning rate."""
    study, records = summary.run.study, {record.id: record for record in summary.run.records}
    last, lowest, highest = list[str](), list[str](), list[str]()
    for point in summary.points:
        if not (point.info.trains or point.method == SASREC):
            continue
        recipe = settings_of(study, point.method).recipe
        for training in (records[trial].training for trial in point.trials if trial in records):
            if training is None:
                continue
            if training.best_epoch == recipe.epochs:
                last.append(point.name)
            for end, names in ((min, lowest), (max, highest)):
                if len(recipe.rates) > 1 and training.learning_rate == end(recipe.rates):
                    names.append(point.name)
    if last:
        # an undertrained model is easy to match or beat
        yield f"A longer training may help what was best at its last epoch: {_names(last)}."
    if lowest or highest:
        best = (("lowest", lowest), ("highest", highest))
        said = "; ".join(f"the {end} for {_names(names)}" for end, names in best if names)
        yield f"A wider range of learning rates may help: the best one tried was {said}."


def _names(names: Iterable[str]) -> str:
    """Each name once; only the first few if there are many."""
    each = list(dict.fromkeys(names))
    more = len(each) - NAMED
    return ", ".join(each) if more < 2 else f"{', '.join(each[:NAMED])} and {more} more"
