"""A run reduced to the numbers of its report.

A point is a method with certain kept blocks, over all its seeds, compared with the teacher.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from depthprobe.evaluation.metrics import METRICS, per_user_metric
from depthprobe.evaluation.statistics import (
    Interval,
    difference_interval,
    mean_interval,
    median_ratio,
    ratio_interval,
)
from depthprobe.evaluation.sufficiency import Sufficiency, sufficient_depth
from depthprobe.methods import Method, method_info, method_order
from depthprobe.study import Variant, is_candidate, override

if TYPE_CHECKING:
    from depthprobe.runs.records import Record
    from depthprobe.runs.search import Found
    from depthprobe.runs.store import Run

Array = NDArray[np.float64]
FULL, SAMPLED = "full", "sampled-999"
PARAMETERS = "parameters_"
# The parts of each kind of time; a round's time is the sum of its parts.
TIMES = {"training": ("train_step",), "inference": ("encode", "score"), "latency": ("latency",)}

# The methods that a report treats specially; it knows all others only by their records.
TEACHER = "full"  # the reference
POPULARITY, SASREC = "popularity", "sasrec"  # a teacher must beat them to be worth matching
PLAIN = "finetune"  # what other ways to train are compared with
HEAD = "readout"  # at depth 0 a head on only the last item: do blocks add anything?
# What can be left out, as cheap scores name it, and the method that measures its damage.
BLOCK, SPAN, PARTS = "skip", "span", {"attention": "drop-attention", "mlp": "drop-mlp"}
# The options of a block under a budget, by the method that measures each.
BUDGET, MAP, WHOLE = "mix", "replace", "kept"
BLOCK_OPTIONS = (WHOLE, *PARTS.values(), MAP, BLOCK)
# They read the teacher's states at each depth, a hint of what training can reach there.
READERS = ("early-exit", "early-exit-raw", "readout", "tuned-lens")
STATES, SETTLING = "similarity", "settling"  # for figures of blocks and users
ORDER, RANDOM_BLOCKS = "shuffled", "random-blocks"  # controls that make a table
PROMPT_ONLY = "prompt-only"  # a floor that makes a table
TITLES, SPREAD = ("item-text", "item-text-linear"), "item-text-spread"  # of items, not of users


@dataclass(frozen=True)
class Point:
    """A method with certain kept blocks, over all its finished seeds."""

    method: str
    depth: int
    kept: str
    removed: str
    trials: tuple[str, ...]
    seeds: tuple[int, ...]
    users: int
    parameters: Mapping[str, float] = field(repr=False)  # blocks, adapters, ..., total, trainable
    accuracy: Mapping[tuple[str, str], Interval] = field(repr=False)  # (protocol, metric)
    ratio: Mapping[tuple[str, str], Interval] = field(repr=False)  # accuracy over the teacher's
    time: Mapping[str, Interval] = field(repr=False)  # median and quartiles, in ms
    speed: Mapping[str, Interval] = field(repr=False)  # the teacher's time over this one's
    of: tuple[str, ...] = ()  # for a quantised model, the trials that it is made of, by seed
    levers: tuple[str, ...] = ()  # besides depth, in order: "narrow", "int8"
    bytes: float | None = field(repr=False, default=None)  # of the weights as served
    training: float | None = field(repr=False, default=None)  # seconds of all its trainings

    @property
    def info(self) -> Method:
        """The record of its method."""
        return method_info(self.method)

    @property
    def span(self) -> tuple[int, int] | None:
        """The blocks [start, end) that are left out, if they are neighbours."""
        return span_of(self.removed)

    @property
    def on_offer(self) -> bool:
        """Whether it could be served, and is not only a probe of the teacher."""
        info = self.info
        served = info.role != "probe" or info.candidate or bool(self.of)
        return served or bool(info.exportable and not info.by_block)

    @property
    def plain(self) -> str:
        """Its method without the levers: "heal" of "int8:heal:narrow"."""
        return ":".join(part for part in self.method.split(":") if part not in self.levers)

    @property
    def look(self) -> Method:
        """The record of its method without the levers."""
        return method_info(self.plain)

    @property
    def name(self) -> str:
        """Its name in captions and columns: "distilled 4", "SASRec", "healed 4, narrow, int8"."""
        label = self.look.label
        depth = label if self.info.role == "baseline" else f"{label} {self.depth}"
        return ", ".join((depth, *self.levers))

    def of_seeds(self, seeds: Iterable[int]) -> tuple[str, ...]:
        """The trials of some of its seeds, in their order."""
        own = dict(zip(self.seeds, self.trials, strict=True))
        return tuple(own[seed] for seed in seeds)

    def value(self, metric: str, protocol: str = FULL) -> Interval | None:
        """The metric, or None if it was not measured."""
        return self.accuracy.get((protocol, metric))

    def change(self, metric: str) -> Interval | None:
        """Relative change against the teacher, paired; None if there is no teacher."""
        ratio = self.ratio.get((FULL, metric))
        return None if ratio is None else less_one(ratio)

    def cost(self, name: str) -> float | None:
        """Parameters, bytes, seconds of training, or ms of a kind of time; None if unknown."""
        if name in ("bytes", "training"):
            return self.bytes if name == "bytes" else self.training
        if name == "parameters":
            return self.parameters.get("total")
        return self.time[name].value if name in self.time else None


def less_one(ratio: Interval) -> Interval:
    """A ratio as a relative change."""
    return Interval(ratio.value - 1, ratio.low - 1, ratio.high - 1)


def span_of(removed: str) -> tuple[int, int] | None:
    """Parse neighbouring blocks from a run's tables to [start, end); None for other blocks.

    >>> span_of("4"), span_of("4-6"), span_of("1,3")
    ((4, 5), (4, 7), None)
    """
    first, _, last = removed.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        return None
    return int(first), int(last or first) + 1


class Ranks:
    """The test users' ranks of every trial, and the per-user metrics made from them.

    NaN is a user whom a trial did not rank. An infinite rank is a target that is never served,
    which counts as a miss.
    """

    def __init__(self, users: pd.DataFrame) -> None:
        self._ranks: dict[str, dict[str, Array]] = {}  # by protocol and trial, (U,)
        for protocol, part in users.groupby("protocol", observed=True):
            table = part.pivot(index="user", columns="trial", values="rank").astype(float)
            self._ranks[str(protocol)] = {
                str(trial): table[trial].to_numpy() for trial in table.columns
            }

    def users(self, trials: Iterable[str]) -> int:
        """How many users were ranked for these trials, under full ranking."""
        trials = list(trials)
        if not self.has(trials):
            return 0
        return min(int((~np.isnan(self._ranks[FULL][trial])).sum()) for trial in trials)

    def has(self, trials: Iterable[str], protocol: str = FULL) -> bool:
        """Whether there are trials, and every one of them was ranked under the protocol."""
        wanted = set(trials)
        return bool(wanted) and wanted <= self._ranks.get(protocol, {}).keys()

    def values(self, protocol: str, metric: str, arms: Sequence[Iterable[str]]) -> list[Array]:
        """Per-user metric (S, U) of each arm's trials, over the users that all of them ranked."""
        trials = list(dict.fromkeys(trial for arm in arms for trial in arm))
        ranks = np.stack([self._ranks[protocol][trial] for trial in trials])
        ranks = ranks[:, ~np.isnan(ranks).any(axis=0)]
        values = per_user_metric(ranks, metric)
        place = {trial: index for index, trial in enumerate(trials)}
        return [values[[place[trial] for trial in arm]] for arm in arms]


Group = Mapping[int, str]  # the trials of a point, by seed
Measured = dict[tuple[str, str], Interval]  # by protocol and metric


@dataclass(frozen=True)
class Change:
    """The change from one model to another, paired by seed and user."""

    seeds: int
    difference: Interval
    ratio: Interval | None  # None if the other one's mean is 0


def _compare(
    ranks: Ranks,
    one: Group,
    other: Group,
    metric: str,
    *,
    level: float,
    protocol: str = FULL,
    inside: NDArray[np.bool_] | None = None,
) -> Change | None:
    """The change over the common seeds; None without one, or if neither model has a hit."""
    seeds = [seed for seed in one if seed in other]
    arms = [[group[seed] for seed in seeds] for group in (one, other)]
    if not ranks.has([*arms[0], *arms[1]], protocol):
        return None
    values = ranks.values(protocol, metric, arms)
    if inside is not None:
        values = [arm[:, inside] for arm in values]
    if not any(arm.any() for arm in values):
        return None
    ratio = ratio_interval(*values, level=level) if values[1].any() else None
    return Change(len(seeds), difference_interval(*values, level=level), ratio)


def _make_point(
    rows: pd.DataFrame,
    teacher: Group,
    ranks: Ranks,
    records: Mapping[str, Record],
    metrics: Sequence[str],
    level: float,
    variants: Mapping[str, Variant],
) -> Point:
    """The point of trials that differ only in their seed."""
    first, own = rows.iloc[0], _by_seed(rows)
    method = str(first["method"])
    kept, removed = (
        str(first[name]) if rows[name].nunique() == 1 else "other blocks with each seed"
        for name in ("kept", "removed")
    )
    parameters = {
        str(name).removeprefix(PARAMETERS): float(value)
        for name, value in first.items()
        if str(name).startswith(PARAMETERS) and pd.notna(value) and value > 0
    }
    reference = {} if method == TEACHER else teacher
    # popularity has no seed, so pair it with every seed of the teacher
    paired = dict.fromkeys(teacher, next(iter(own.values()))) if method == POPULARITY else own
    accuracy, ratio = Measured(), Measured()
    for key in itertools.product((FULL, SAMPLED), metrics):
        protocol, metric = key
        if ranks.has(own.values(), protocol):
            (values,) = ranks.values(protocol, metric, [own.values()])
            accuracy[key] = mean_interval(values, level=level)
        change = _compare(ranks, paired, reference, metric, level=level, protocol=protocol)
        if change is not None and change.ratio is not None:
            ratio[key] = change.ratio
    time, speed = _timing(own, reference, records)
    known = [records[trial] for trial in own.values() if trial in records]
    took = [_trained(r, records, records.get(teacher.get(r.seed, ""))) or 0.0 for r in known]
    sizes = [size for r in known if r.costs and (size := r.costs.bytes.get("total"))]
    of = tuple(record.of for record in known if record.of)
    return Point(
        method, int(first["depth"]), kept, removed, tuple(own.values()), tuple(own),
        ranks.users(own.values()), parameters, accuracy, ratio, time, speed,
        of, _levers(method, variants, quantized=bool(of)), max(sizes, default=None),
        float(np.mean(took)) if took and all(took) else None,
    )  # fmt: skip


def _levers(method: str, variants: Mapping[str, Variant], *, quantized: bool) -> tuple[str, ...]:
    """What besides depth makes a model smaller: its variant's width or loops, quantisation."""
    lever, _, source = method.partition(":") if quantized else ("", "", method)
    name = source.partition(":")[2]
    reshaped = name in variants and variants[name].reshapes
    return tuple(filter(None, (name if reshaped else "", lever)))


def _trained(record: Record, records: Mapping[str, Record], teacher: Record | None) -> float | None:
    """Seconds of all trainings that a model needs: its own or its source's, and the teacher's.

    Steps times the measured time of a step, because trainings that run side by side slow each
    other down; clock time if no step was timed. The teacher counts only if it is needed.
    """
    if record.of is not None:
        source = records.get(record.of)
        return _trained(source, records, teacher) if source else None
    training = record.training
    if training is None or training.teacher_seconds:
        needed = training is not None or TEACHER in method_info(record.method).needs
        if not needed or teacher is None or teacher is record:
            return None
        own, theirs = _seconds(record), _seconds(teacher)
        clock = teacher.training.seconds if teacher.training else 0.0
        features = max(0.0, training.teacher_seconds - clock) if training else 0.0
        return own + features + theirs
    return _seconds(record)


def _seconds(record: Record) -> float:
    rounds = _rounds(record, TIMES["training"])
    if record.training is None:
        return 0.0
    return record.training.steps * float(np.median(rounds)) if rounds else record.training.seconds


def _by_seed(rows: pd.DataFrame) -> Group:
    return dict(zip(map(int, rows["seed"]), map(str, rows["trial"]), strict=True))


def _timing(
    own: Group, teacher: Group, records: Mapping[str, Record]
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Median times of each kind, and the speed-up over the teacher."""
    time, speed = {}, {}
    for kind, parts in TIMES.items():
        rounds = {seed: _rounds(records.get(trial), parts) for seed, trial in own.items()}
        # one measurement may be in the records of several seeds; count it once
        measured = sorted({r for r in rounds.values() if r})
        if measured:
            low, median, high = 1e3 * np.quantile(np.concatenate(measured), [0.25, 0.5, 0.75])
            time[kind] = Interval(float(median), float(low), float(high))
        pairs = {
            (rounds[seed], _rounds(records.get(teacher[seed]), parts))
            for seed in own
            if seed in teacher
        }
        pairs = {(a, b) for a, b in pairs if a and len(a) == len(b)}
        if pairs:
            candidate, reference = (np.concatenate(arm) for arm in zip(*sorted(pairs), strict=True))
            speed[kind] = median_ratio(candidate, reference)
    return time, speed


def _rounds(record: Record | None, parts: Sequence[str]) -> tuple[float, ...]:
    """Seconds of each round, its parts added; empty if one part was not measured."""
    timing = (record.costs.timing if record and record.costs else None) or {}
    rounds = [timing[part].seconds if part in timing else [] for part in parts]
    if not all(rounds) or len({len(seconds) for seconds in rounds}) > 1:
        return ()
    return tuple(float(sum(seconds)) for seconds in zip(*rounds, strict=True))


# --- a whole run -----------------------------------------------------------------------------

Source: TypeAlias = "Run | Summary | str | Path"  # what figures and tables are made from
Key = tuple[str, int]  # (method, depth), as the sufficient depth names candidates


@dataclass(frozen=True)
class Summary:
    """The numbers of a report; ``run`` has everything else that it needs."""

    run: Run = field(repr=False)
    points: tuple[Point, ...]
    blocks: int  # of the full backbone
    headline: str  # the metric of the answer
    margin: float
    level: float  # of the answer and all intervals
    sufficiency: Sufficiency | None
    candidates: Mapping[Key, Point] = field(repr=False)  # those that the test compared
    seeds_compared: tuple[int, ...]
    left_out: tuple[Point, ...]  # candidates without a common seed
    failed: pd.DataFrame = field(repr=False)
    ranks: Ranks = field(repr=False)
    found: Found | None = field(repr=False, default=None)  # the result of a search for the depth

    def of(self, *methods: str) -> tuple[Point, ...]:
        """The points of some methods, shallow to deep."""
        chosen = (point for point in self.points if point.method in methods)
        return tuple(sorted(chosen, key=_by_depth))

    @property
    def teacher(self) -> Point | None:
        """The trained full-depth recommender, if a seed of it finished."""
        return next(iter(self.of(TEACHER)), None)

    @property
    def answer(self) -> Point | None:
        """The model of the sufficient depth; None if none is shown."""
        found = self.sufficiency
        if found is None or found.method is None or found.depth is None:
            return None
        return self.candidates[found.method, found.depth]

    def source(self, point: Point) -> Point | None:
        """The point that a quantised one is made of."""
        return next((p for p in self.points if not p.of and set(p.trials) & {*point.of}), None)

    def quantized(self, point: Point) -> tuple[Point, ...]:
        """The quantised points that are made of a point."""
        return tuple(p for p in self.points if set(p.of) & {*point.trials})

    def share(self, point: Point, metric: str | None = None) -> Interval | None:
        """A point's share of the teacher's metric: None if unknown, 1 for the teacher."""
        own = point.value(metric or self.headline)
        if point.method == TEACHER and own is not None and own.value:
            return Interval(1.0, 1.0, 1.0)
        return point.ratio.get((FULL, metric or self.headline))

    def faster(self, one: Point, other: Point, kind: str) -> Interval | None:
        """How many times faster one point is than another, over the seeds of both."""
        records = {record.id: record for record in self.run.records}
        first, second = (dict(zip(p.seeds, p.trials, strict=True)) for p in (one, other))
        return _timing(first, second, records)[1].get(kind)

    def compare(
        self, one: Point, other: Point, inside: NDArray[np.bool_] | None = None
    ) -> Change | None:
        """The change of the headline metric from ``other`` to ``one``, over the seeds of both.

        ``inside`` says which users count, (U,); all by default. None without a common seed, or if
        neither model has a hit, since a difference of 0 then shows nothing.
        """
        first, second = (dict(zip(p.seeds, p.trials, strict=True)) for p in (one, other))
        return _compare(self.ranks, first, second, self.headline, level=self.level, inside=inside)

    def against(self, point: Point, other: Point) -> Interval | None:
        """Headline metric of one point over another's, paired; None without a common seed."""
        change = self.compare(point, other)
        return change.ratio if change else None


def as_summary(run: Source) -> Summary:
    """The summary of a run; a summary is returned as it is, so that a report makes only one."""
    return run if isinstance(run, Summary) else summarise(run)


def summarise(
    run: Run | str | Path,
    *,
    margin: float | None = None,
    level: float | None = None,
    headline: str | None = None,
) -> Summary:
    """Reduce a run, open or in its folder, to its points and its sufficient depth.

    Args:
        run: an open run or its folder.
        margin: the relative loss that is acceptable; the study's by default.
        level: the confidence of the answer and of all intervals; the study's by default.
        headline: the metric of the answer: any HR@K or NDCG@K, or MRR; the study's by default.

    Raises:
        BadInput: if the path is no run.
        ValueError: if the metric is unknown, or the margin or the level is not below 1.
    """
    if isinstance(run, (str, Path)):
        from depthprobe.runs.store import open_run

        run = open_run(run)
    trials, protocol = run.trials, run.study.protocol
    margin = float(protocol.margin) if margin is None else margin
    level, headline = level or protocol.level, headline or protocol.metric
    per_user_metric([1.0], headline)  # raises if it is no metric
    groups = []
    if len(trials):
        done = trials[trials["status"] == "done"].sort_values("seed", kind="stable")
        # a search may keep different blocks with each seed, and still is one method
        one = ~done["method"].map(lambda name: method_info(name).by_block).astype(bool)
        by = [done[name].mask(one, "") for name in ("kept", "removed")]
        groups = [rows for _, rows in done.groupby(["method", "depth", *by], sort=False)]
    ranks = Ranks(run.users)
    records = {record.id: record for record in run.records}
    reference = next((rows for rows in groups if rows.iloc[0]["method"] == TEACHER), None)
    teaching = {} if reference is None else _by_seed(reference)
    metrics = tuple(dict.fromkeys((*METRICS, headline)))
    made = [
        _make_point(rows, teaching, ranks, records, metrics, level, run.study.variants)
        for rows in groups
    ]
    points = sorted(made, key=lambda point: (method_order(point.method), _by_depth(point)))
    teacher = next((point for point in points if point.method == TEACHER), None)
    blocks = run.manifest.backbone.blocks
    offered = {
        (point.method, point.depth): point
        for point in points
        if is_candidate(run.study, point.method) and 0 < point.depth < blocks
    }
    seeds, candidates = _common_seeds(teacher, offered)
    sufficiency, found = None, None
    if run.study.searches:
        # each depth has its own seeds, and a level that allows for the search's choices
        from depthprobe.runs.search import find_out

        asked = {"protocol.margin": margin, "protocol.level": level, "protocol.metric": headline}
        found = find_out(run.path, override(run.study, **asked), blocks)
        sufficiency = found.state.verdict
        names = {(row.method, row.depth) for row in sufficiency.rows} if sufficiency else set()
        candidates = {key: point for key, point in offered.items() if key in names}
    elif teacher is not None and ranks.has(teacher.of_seeds(seeds)) and candidates:
        arms = [point.of_seeds(seeds) for point in candidates.values()]
        values, *others = ranks.values(FULL, headline, [teacher.of_seeds(seeds), *arms])
        if values.mean() > 0:
            named = dict(zip(candidates, others, strict=True))
            sufficiency = sufficient_depth(named, values, margin=margin, level=level)
    left_out = tuple(point for key, point in offered.items() if key not in candidates)
    return Summary(
        run, tuple(points), blocks, headline, margin, level, sufficiency, candidates, seeds,
        left_out, trials[trials["status"] != "done"] if len(trials) else trials, ranks, found,
    )  # fmt: skip


def _common_seeds(
    teacher: Point | None, offered: Mapping[Key, Point]
) -> tuple[tuple[int, ...], dict[Key, Point]]:
    """The seeds that the teacher and all candidates have; without one, the seed that most have.

    A paired comparison needs the same seeds in all arms, so a failed trial removes its seed.
    """
    if teacher is None:
        return (), {}
    paired = {k: set(p.seeds) & set(teacher.seeds) for k, p in offered.items()}
    paired = {key: seeds for key, seeds in paired.items() if seeds}
    if not paired:
        return (), {}
    common = set.intersection(*paired.values())
    if not common:
        votes = Counter(seed for seeds in paired.values() for seed in sorted(seeds))
        common = {votes.most_common(1)[0][0]}
    return tuple(sorted(common)), {k: offered[k] for k, s in paired.items() if common <= s}


def _by_depth(point: Point) -> tuple[int, int, str]:
    return (point.depth, int(point.removed) if point.removed.isdigit() else -1, point.kept)
