"""A run reduced to the numbers of its report, every bootstrap computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from depthprobe.evaluation.statistics import Interval, bootstrap_ratio
from depthprobe.evaluation.sufficiency import Sufficiency, sufficient_depth
from depthprobe.report.points import (
    FULL,
    HEADLINE,
    LEVEL,
    METRICS,
    SAMPLED,
    Array,
    Point,
    Ranks,
    make_points,
)
from depthprobe.report.style import method_order
from depthprobe.study import base_of

__all__ = [
    "BY_BLOCK",
    "FULL",
    "HEADLINE",
    "LEVEL",
    "METRICS",
    "SAMPLED",
    "SHOWN_ONLY",
    "Point",
    "RunLike",
    "Summary",
    "as_summary",
    "summarise",
]

# Probes with many kept sets at a depth: each set is a point of its own.
BY_BLOCK = frozenset({"skip", "span", "interval", "drop-attention", "drop-mlp"})
# They show where depth matters; none of them is a model on offer.
SHOWN_ONLY = frozenset(
    {
        "early-exit-raw",
        "readout",
        "tuned-lens",
        "skip",
        "span",
        "interval",
        "drop-attention",
        "drop-mlp",
    }
)
# Compared with the teacher, but no answer: baselines, the teacher, a control, a probe.
CONTROLS = frozenset({"random-init", "random-selection"})
NOT_CANDIDATES = frozenset({"popularity", "sasrec", "full"}) | CONTROLS | SHOWN_ONLY
Key = tuple[str, int]  # (method, depth), as the sufficient depth names candidates


class RunLike(Protocol):
    """What a report reads of a run folder; `depthprobe.sweep.store.Run` is one."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def study(self) -> Any: ...  # noqa: D102
    @property
    def manifest(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def records(self) -> Sequence[Mapping[str, Any]]: ...  # noqa: D102
    @property
    def trials(self) -> pd.DataFrame: ...  # noqa: D102
    @property
    def metrics(self) -> pd.DataFrame: ...  # noqa: D102
    @property
    def users(self) -> pd.DataFrame: ...  # noqa: D102


@dataclass(frozen=True)
class Summary:
    """The numbers of a report; `run` stays at hand for the words around them."""

    run: RunLike = field(repr=False)
    points: tuple[Point, ...]
    blocks: int | None  # of the whole backbone
    margin: float
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
        return next(iter(self.of("full")), None)

    def against(self, point: Point, other: Point) -> Interval | None:
        """Headline metric of one point over another's, paired; None without a common seed."""
        arms = self.paired(point, other)
        if arms is None or not arms[1].any():
            return None
        return bootstrap_ratio(*arms, resamples=int(self.run.study.protocol.resamples))

    def paired(self, point: Point, other: Point) -> tuple[Array, Array] | None:
        """Headline metric of two points by seed and user, (S, U) each; None without such seeds."""
        seeds = [seed for seed in point.seeds if seed in other.seeds]
        arms = point.of_seeds(seeds), other.of_seeds(seeds)
        if not self.ranks.has([*arms[0], *arms[1]], FULL):
            return None
        values, reference = self.ranks.values(FULL, HEADLINE, arms)
        return values, reference


def as_summary(run: RunLike | Summary | str | Path) -> Summary:
    """The summary of a run; a summary is handed through, so that a report makes only one."""
    return run if isinstance(run, Summary) else summarise(run)


def summarise(run: RunLike | str | Path) -> Summary:
    """Reduce a run, or what its folder holds, to its points and its sufficient depth.

    Raises:
        BadInput: if the path is no run.
    """
    if isinstance(run, (str, Path)):
        from depthprobe.sweep.store import open_run  # which imports torch

        run = open_run(run)
    trials, protocol = run.trials, run.study.protocol
    groups = []
    if len(trials):
        done = trials[trials["status"] == "done"].sort_values("seed", kind="stable")
        # a search keeps other blocks with another seed, and is one method all the same
        one = ~done["method"].isin(BY_BLOCK)
        by = {name: done[name].mask(one, "") for name in ("kept", "removed")}
        groups = [rows for _, rows in done.groupby(["method", "depth", *by.values()], sort=False)]
    ranks = Ranks(run.users)
    records = {str(record["id"]): record for record in run.records}
    made = make_points(groups, ranks, records, resamples=int(protocol.resamples))
    points = sorted(made, key=_by_method)
    reference = next((point for point in points if point.method == "full"), None)
    blocks = run.manifest.get("backbone", {}).get("blocks")
    if blocks is None and reference is not None:
        blocks = reference.depth
    offered = _candidates(points, blocks)
    seeds, candidates = _common_seeds(reference, offered)
    sufficiency = None
    if reference is not None and ranks.has(reference.of_seeds(seeds), FULL) and candidates:
        arms = [point.of_seeds(seeds) for point in candidates.values()]
        values, *others = ranks.values(FULL, HEADLINE, [reference.of_seeds(seeds), *arms])
        if values.mean() > 0:
            sufficiency = sufficient_depth(
                dict(zip(candidates, others, strict=True)), values,
                margin=float(protocol.margin), level=LEVEL,
            )  # fmt: skip
            # one interval for one comparison: figures and tables show the one that decides
            for row in sufficiency.rows:
                point = candidates[row.method, row.depth]
                if set(point.seeds) & set(reference.seeds) == set(seeds):
                    settled = replace(point, ratio={**point.ratio, (FULL, HEADLINE): row.kept})
                    candidates[row.method, row.depth] = settled
                    points[points.index(point)] = settled
    return Summary(
        run=run,
        points=tuple(points),
        blocks=int(blocks) if blocks else None,
        margin=float(protocol.margin),
        sufficiency=sufficiency,
        candidates=candidates,
        seeds_compared=seeds,
        left_out=tuple(p for key, p in offered.items() if key not in candidates),
        failed=trials[trials["status"] != "done"] if len(trials) else trials,
        ranks=ranks,
    )


def _candidates(points: Iterable[Point], blocks: int | None) -> dict[Key, Point]:
    """What may be the answer; a second choice of blocks at the same depth carries their names."""
    offered: dict[Key, Point] = {}
    for point in points:
        if base_of(point.method) not in NOT_CANDIDATES and 0 < point.depth < (blocks or 0):
            taken = (point.method, point.depth) in offered
            offered[f"{point.method} {point.kept}" if taken else point.method, point.depth] = point
    return offered


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


def _by_method(point: Point) -> tuple[tuple[int, str], tuple[int, int, str]]:
    return method_order(point.method), _by_depth(point)
