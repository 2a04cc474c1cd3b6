"""A run reduced to the numbers of its report; every bootstrap is computed once.

A point is a method at some kept blocks, its seeds together, compared with the teacher.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import (
    Interval,
    interval,
    median_ratio,
    resampled_means,
)
from depthprobe.evaluation.sufficiency import Sufficiency, sufficient_depth
from depthprobe.methods import Method, method_order
from depthprobe.report.style import Array, method_info

if TYPE_CHECKING:
    from depthprobe.runs.records import Record
    from depthprobe.runs.store import Run

FULL, SAMPLED = "full", "sampled-999"
HEADLINE = "NDCG@10"
METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")
PARAMETERS = "parameters_"
LEVEL = 0.95
# What a round of each kind of time is made of; the parts of one round are added.
TIMES = {"training": ("train_step",), "inference": ("encode", "score"), "latency": ("latency",)}

# The methods with a part of their own in a report; all others are known by their records alone.
TEACHER = "full"  # the reference
POPULARITY, SASREC = "popularity", "sasrec"  # a teacher must beat them to be worth matching
PLAIN = "finetune"  # what other ways to train are compared with
HEAD = "readout"  # at depth 0 a head on the last item alone: do blocks add anything?
# What is left out, as cheap scores name it, and the method that measures what that costs.
BLOCK, SPAN, PARTS = "skip", "span", {"attention": "drop-attention", "mlp": "drop-mlp"}
# They read the teacher's states at each depth: a hint of what training reaches there.
READERS = ("early-exit", "early-exit-raw", "readout", "tuned-lens")
STATES, SETTLING = "similarity", "settling"  # whose tables figures of blocks and users need


@dataclass(frozen=True)
class Point:
    """A method at some kept blocks; every finished seed of it."""

    method: str
    depth: int
    kept: str
    removed: str
    trials: tuple[str, ...]
    seeds: tuple[int, ...]
    users: int
    parameters: Mapping[str, float] = field(repr=False)  # blocks, adapters, ..., total, trainable
    accuracy: Mapping[tuple[str, str], Interval] = field(repr=False)  # (protocol, metric)
    ratio: Mapping[tuple[str, str], Interval] = field(repr=False)  # the same, over the teacher's
    time: Mapping[str, Interval] = field(repr=False)  # median and quartiles, in ms
    speed: Mapping[str, Interval] = field(repr=False)  # the teacher's time over this one's

    @property
    def info(self) -> Method:
        """The record of its method."""
        return method_info(self.method)

    @property
    def span(self) -> tuple[int, int] | None:
        """The blocks [start, end) that are left out, if they are neighbours."""
        return span_of(self.removed)

    @property
    def name(self) -> str:
        """As captions and columns name it: "distilled 4", "SASRec"."""
        label = self.info.label
        return label if self.info.role == "baseline" else f"{label} {self.depth}"

    def of_seeds(self, seeds: Iterable[int]) -> tuple[str, ...]:
        """The trials of some of its seeds, in their order."""
        own = dict(zip(self.seeds, self.trials, strict=True))
        return tuple(own[seed] for seed in seeds)

    def value(self, metric: str, protocol: str = FULL) -> Interval | None:
        """The metric, or None where it was not measured."""
        return self.accuracy.get((protocol, metric))

    def change(self, metric: str) -> Interval | None:
        """Relative change against the teacher, paired; None where there is no teacher."""
        ratio = self.ratio.get((FULL, metric))
        return None if ratio is None else less_one(ratio)

    def cost(self, name: str) -> float | None:
        """Total parameters, or median milliseconds of a kind of time; None if unknown."""
        if name == "parameters":
            return self.parameters.get("total")
        return self.time[name].value if name in self.time else None


def less_one(ratio: Interval) -> Interval:
    """A ratio as a relative change."""
    return Interval(ratio.value - 1, ratio.low - 1, ratio.high - 1)


def span_of(removed: str) -> tuple[int, int] | None:
    """Neighbouring blocks as a run's tables write them, to [start, end).

    >>> span_of("4"), span_of("4-6"), span_of("1,3")
    ((4, 5), (4, 7), None)
    """
    first, _, last = removed.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        return None
    return int(first), int(last or first) + 1


class Ranks:
    """The test users' ranks of every trial, and the per-user metrics made from them."""

    def __init__(self, users: pd.DataFrame) -> None:
        self._ranks = {  # by protocol, (users, trials)
            str(protocol): part.pivot(index="user", columns="trial", values="rank").astype(float)
            for protocol, part in users.groupby("protocol", observed=True)
        }

    def users(self, trials: Iterable[str]) -> int:
        """How many users were ranked for these trials, under full ranking."""
        trials = list(trials)
        return int(self._ranks[FULL][trials].count().min()) if self.has(trials) else 0

    def has(self, trials: Sequence[str], protocol: str = FULL) -> bool:
        """Whether every one of these trials was ranked under the protocol."""
        ranked = self._ranks.get(protocol, pd.DataFrame()).columns
        return bool(trials) and all(trial in ranked for trial in trials)

    def values(self, protocol: str, metric: str, arms: Sequence[Sequence[str]]) -> list[Array]:
        """Per-user metric (S, U) of each arm's trials, over the users that all of them ranked."""
        trials = list(dict.fromkeys(trial for arm in arms for trial in arm))
        common = self._ranks[protocol][trials].dropna()
        values = {trial: per_user_metric(common[trial].to_numpy(), metric) for trial in trials}
        return [np.stack([values[trial] for trial in arm]) for arm in arms]


def draws_of_means(arms: Sequence[Array], resamples: int) -> Array:
    """Bootstrap draws of each arm's mean over users and seeds, (R, arms); arms share each draw."""
    if arms[0].shape[1] == 1:  # one user says nothing about others
        return np.array([[-np.inf], [np.inf]]).repeat(len(arms), axis=1)
    drawn = resampled_means(arms, resamples=resamples, seed=0)
    return np.concatenate([both for both, _ in drawn])


def paired_ratio(value: float, draws: Array, reference: Array, level: float) -> Interval:
    """The interval of a ratio from draws of both arms, (R,) each."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(value, draws / reference, level=level)


Group = dict[int, str]  # the trials of a point, by seed
Measured = dict[tuple[str, str], Interval]  # by protocol and metric


def _make_points(
    groups: Sequence[pd.DataFrame],
    ranks: Ranks,
    records: Mapping[str, Record],
    metrics: Sequence[str],
    *,
    level: float,
    resamples: int,
) -> list[Point]:
    """A point for each group of trials that differ in their seed alone."""
    seeds: list[Group] = [
        dict(zip(map(int, rows["seed"]), map(str, rows["trial"]), strict=True)) for rows in groups
    ]
    methods = [str(rows.iloc[0]["method"]) for rows in groups]
    teacher = seeds[methods.index(TEACHER)] if TEACHER in methods else {}
    # popularity has no seed: it stands beside every one of the teacher's
    spread = [
        dict.fromkeys(teacher or own, next(iter(own.values()))) if method == POPULARITY else own
        for method, own in zip(methods, seeds, strict=True)
    ]
    accuracy, ratio = _accuracies(spread, teacher, ranks, metrics, level=level, resamples=resamples)
    points = []
    for place, (rows, method, own) in enumerate(zip(groups, methods, seeds, strict=True)):
        first = rows.iloc[0]
        kept, removed = (
            str(first[name]) if rows[name].nunique() == 1 else "other blocks with each seed"
            for name in ("kept", "removed")
        )
        parameters = {
            str(name).removeprefix(PARAMETERS): float(value)
            for name, value in first.items()
            if str(name).startswith(PARAMETERS) and pd.notna(value) and value > 0
        }
        time, speed = _timing(own, {} if method == TEACHER else teacher, records)
        points.append(
            Point(
                method, int(first["depth"]), kept, removed, tuple(own.values()), tuple(own),
                ranks.users(own.values()), parameters, accuracy[place],
                {} if method == TEACHER else ratio[place], time, speed,
            )
        )  # fmt: skip
    return points


def _accuracies(
    groups: Sequence[Group],
    teacher: Group,
    ranks: Ranks,
    metrics: Sequence[str],
    *,
    level: float,
    resamples: int,
) -> tuple[list[Measured], list[Measured]]:
    """Means of each group over its seeds, and ratios over the seeds that the teacher has too.

    All that is measured on the same seeds shares its bootstrap draws: the intervals are those of
    `bootstrap_mean` and `bootstrap_ratio`, for the cost of one.
    """
    accuracy: list[Measured] = [{} for _ in groups]
    ratio: list[Measured] = [{} for _ in groups]
    own = [tuple(group) for group in groups]
    common = [tuple(seed for seed in group if seed in teacher) for group in groups]
    for seeds in dict.fromkeys([*own, *common]):
        for protocol in (FULL, SAMPLED):
            members = [
                place
                for place, group in enumerate(groups)
                if seeds in (own[place], common[place])
                and ranks.has([group[seed] for seed in seeds], protocol)
            ]
            if not members:
                continue
            arms = [[groups[place][seed] for seed in seeds] for place in members]
            reference = [teacher[seed] for seed in seeds if seed in teacher]
            paired = len(reference) == len(seeds) and ranks.has(reference, protocol)
            arms += [reference] * paired
            values = [v for metric in metrics for v in ranks.values(protocol, metric, arms)]
            means = [float(v.mean()) for v in values]  # (metrics x arms)
            draws = draws_of_means(values, resamples)  # (R, metrics x arms)
            for column, metric in enumerate(metrics):
                last = (column + 1) * len(arms) - 1  # the teacher, if paired
                for index, place in enumerate(members):
                    at, key = column * len(arms) + index, (protocol, metric)
                    if own[place] == seeds:
                        accuracy[place][key] = interval(means[at], draws[:, at], level=level)
                    if common[place] == seeds and paired and means[last] > 0:
                        share = means[at] / means[last]
                        ratio[place][key] = paired_ratio(share, draws[:, at], draws[:, last], level)
    return accuracy, ratio


def _timing(
    own: Group, teacher: Group, records: Mapping[str, Record]
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Medians of each kind of time, and how many times faster than the teacher."""
    time, speed = {}, {}
    for kind, parts in TIMES.items():
        rounds = {seed: _rounds(records.get(trial), parts) for seed, trial in own.items()}
        # one measurement may stand in the records of several seeds: it counts once
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
    """Seconds of each round, the parts of a round added; empty if one was not measured."""
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
    """The numbers of a report; `run` stays at hand for the words around them."""

    run: Run = field(repr=False)
    points: tuple[Point, ...]
    blocks: int  # of the full backbone
    headline: str  # the metric of the answer
    margin: float
    level: float  # of the answer and all intervals
    sufficiency: Sufficiency | None
    candidates: Mapping[Key, Point] = field(repr=False)  # what the sufficiency compared
    seeds_compared: tuple[int, ...]
    left_out: tuple[Point, ...]  # candidates that share no seed with the others
    failed: pd.DataFrame = field(repr=False)
    ranks: Ranks = field(repr=False)

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
        """The model of the sufficient depth; None where none is shown."""
        found = self.sufficiency
        if found is None or found.method is None or found.depth is None:
            return None
        return self.candidates[found.method, found.depth]

    @property
    def resamples(self) -> int:
        """Bootstrap draws of each interval."""
        return int(self.run.study.protocol.resamples)

    def against(self, point: Point, other: Point) -> Interval | None:
        """Headline metric of one point over another's, paired; None without a common seed."""
        change = paired_changes(self, [(point, other)])[0]
        return change.ratio if change else None


@dataclass(frozen=True)
class Change:
    """What one model adds to another, paired by seed and user."""

    seeds: int
    difference: Interval
    ratio: Interval | None  # None where the other one's mean is 0
    share: float  # the difference as a share of the other one's mean


def paired_changes(
    summary: Summary, pairs: Sequence[tuple[Point, Point]], inside: NDArray[np.bool_] | None = None
) -> list[Change | None]:
    """The change of each pair's first model against its second, over the seeds that both have.

    Pairs with the same seeds share their draws. None without a common seed, for one user alone,
    and where neither has a hit: draws are all 0 then, and sure of nothing. ``inside`` says which
    users count, (U,); all by default.
    """
    found: list[Change | None] = [None] * len(pairs)
    common = [tuple(s for s in one.seeds if s in other.seeds) for one, other in pairs]
    for seeds in filter(None, dict.fromkeys(common)):
        places = [place for place, own in enumerate(common) if own == seeds]
        arms = list(dict.fromkeys(p.of_seeds(seeds) for place in places for p in pairs[place]))
        arms = [trials for trials in arms if summary.ranks.has(trials)]
        values = summary.ranks.values(FULL, summary.headline, arms) if arms else []
        if inside is not None:
            values = [np.ascontiguousarray(arm[:, inside]) for arm in values]
        if not values or values[0].shape[1] == 1:
            continue
        draws = draws_of_means(values, summary.resamples)  # (R, arms)
        means = [float(arm.mean()) for arm in values]
        for place in places:
            trials = [point.of_seeds(seeds) for point in pairs[place]]
            if not all(own in arms for own in trials):
                continue
            one, other = (arms.index(own) for own in trials)
            if not (means[one] or means[other]):
                continue
            value, ratio, share = means[one] - means[other], None, math.nan
            if means[other]:
                share = value / means[other]
                ratio = paired_ratio(
                    means[one] / means[other], draws[:, one], draws[:, other], summary.level
                )
            difference = interval(value, draws[:, one] - draws[:, other], level=summary.level)
            found[place] = Change(len(seeds), difference, ratio, share)
    return found


def as_summary(run: Source) -> Summary:
    """The summary of a run; a summary is handed through, so that a report makes only one."""
    return run if isinstance(run, Summary) else summarise(run)


def summarise(
    run: Run | str | Path,
    *,
    margin: float | None = None,
    level: float | None = None,
    headline: str | None = None,
) -> Summary:
    """Reduce a run, or what its folder holds, to its points and its sufficient depth.

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
    per_user_metric([1.0], headline)  # refuses what is no metric
    groups = []
    if len(trials):
        done = trials[trials["status"] == "done"].sort_values("seed", kind="stable")
        # a search keeps other blocks with another seed, and is one method all the same
        one = ~done["method"].map(lambda name: method_info(name).by_block).astype(bool)
        by = [done[name].mask(one, "") for name in ("kept", "removed")]
        groups = [rows for _, rows in done.groupby(["method", "depth", *by], sort=False)]
    ranks = Ranks(run.users)
    records = {record.id: record for record in run.records}
    metrics = tuple(dict.fromkeys((*METRICS, headline)))
    made = _make_points(
        groups, ranks, records, metrics, level=level, resamples=int(protocol.resamples)
    )
    points = sorted(made, key=lambda point: (method_order(point.method), _by_depth(point)))
    teacher = next((point for point in points if point.method == TEACHER), None)
    blocks = run.manifest.backbone.blocks
    offered = {
        (point.method, point.depth): point
        for point in points
        if point.info.candidate and 0 < point.depth < blocks
    }
    seeds, candidates = _common_seeds(teacher, offered)
    sufficiency = None
    if teacher is not None and ranks.has(teacher.of_seeds(seeds)) and candidates:
        arms = [point.of_seeds(seeds) for point in candidates.values()]
        values, *others = ranks.values(FULL, headline, [teacher.of_seeds(seeds), *arms])
        if values.mean() > 0:
            sufficiency = sufficient_depth(
                dict(zip(candidates, others, strict=True)), values,
                margin=margin, level=level,
            )  # fmt: skip
            # one interval for one comparison: figures and tables show the one that decides
            for row in sufficiency.rows:
                point = candidates[row.method, row.depth]
                if set(point.seeds) & set(teacher.seeds) == set(seeds):
                    settled = replace(point, ratio={**point.ratio, (FULL, headline): row.kept})
                    candidates[row.method, row.depth] = settled
                    points[points.index(point)] = settled
    left_out = tuple(point for key, point in offered.items() if key not in candidates)
    return Summary(
        run, tuple(points), blocks, headline, margin, level, sufficiency, candidates, seeds,
        left_out, trials[trials["status"] != "done"] if len(trials) else trials, ranks,
    )  # fmt: skip


def _common_seeds(
    teacher: Point | None, offered: Mapping[Key, Point]
) -> tuple[tuple[int, ...], dict[Key, Point]]:
    """The seeds that the teacher and every candidate have; else the one that most have.

    A paired comparison needs the same seeds in all arms: one failed trial takes its seed out.
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
