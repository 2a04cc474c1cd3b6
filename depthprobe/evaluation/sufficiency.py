"""The sufficient depth: the smallest that keeps the teacher's accuracy, shown and not just seen.

A candidate is *shown* to suffice when the lower bound of its share of the teacher's mean metric is
at least ``1 - margin``: a test of non-inferiority, paired by user and seed. Looking at many
depths and methods and taking the smallest that passes would pass too easily, so each bound is
one-sided at ``1 - (1 - level) / candidates`` (Bonferroni): with confidence ``level`` no candidate
is wrongly shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthprobe.evaluation import statistics
from depthprobe.evaluation.statistics import Interval, shares

TAIL_DRAWS = 10  # a bound needs at least so many bootstrap draws below it


@dataclass(frozen=True)
class RetainedAccuracy:
    """A candidate's share of the teacher's mean.

    ``kept`` is a two-sided interval for it alone; ``lower`` the one-sided bound that holds for
    all candidates at once; ``shown`` says that ``lower >= 1 - margin``.
    """

    method: str
    depth: int
    kept: Interval
    lower: float
    shown: bool


@dataclass(frozen=True)
class Sufficiency:
    """All candidates by depth, and the smallest that is shown to suffice; None if none is.

    ``users_needed`` is about how many users would decide ``undecided``: of the candidates
    shallower than ``depth`` whose estimate is within the margin and whose bound is not, the one
    that needs the fewest. None if there is none, or if no number would do because the seeds
    differ too much.
    """

    rows: tuple[RetainedAccuracy, ...]
    method: str | None
    depth: int | None
    users_needed: int | None
    undecided: tuple[str, int] | None
    users: int
    margin: float
    level: float


def sufficient_depth(
    candidates: Mapping[tuple[str, int], Any],
    reference: Any,
    *,
    margin: float = 0.01,
    level: float = 0.95,
    resamples: int = 2000,
) -> Sufficiency:
    """Find the smallest depth whose loss against the reference is within the margin.

    Args:
        candidates: per-user values of a metric, (S, U) or (U,), by method and depth.
        reference: the teacher's values, of the same shape, users and seeds; their mean above 0.
        margin: the relative loss that is acceptable, 0.01 is 1 %.
        level: confidence.
        resamples: bootstrap draws; more are made when many candidates need a farther tail.
    """
    if not 0 <= margin < 1 or not 0 < level < 1:
        raise ValueError(f"margin is {margin} and level is {level}, expected numbers in [0, 1)")
    names = sorted(candidates, key=lambda name: (name[1], name[0]))
    arms = statistics.as_arms([*(candidates[name] for name in names), reference])
    bottom = arms[-1].mean()
    if not bottom > 0:
        raise ValueError(f"the reference's mean is {bottom:g}, expected a number above 0")
    users = arms[-1].shape[1]
    tail = (1 - level) / max(1, len(names))
    resamples = max(resamples, math.ceil(TAIL_DRAWS / tail))
    drawn = list(statistics.resampled_means(arms, resamples=resamples, seed=0))
    crossed = shares(np.concatenate([both for both, _ in drawn]))  # (R, A - 1)
    by_user = shares(np.concatenate([users_alone for _, users_alone in drawn]))
    rows = []
    for place, (method, depth) in enumerate(names):
        value, draws = float(arms[place].mean() / bottom), crossed[:, place]
        if users > 1:
            lower = float(statistics.lower_bounds(draws[:, None], tail)[0])
            kept = statistics.interval(value, draws, level=level)
        else:  # one user says nothing about others
            lower, kept = -math.inf, Interval(value, -math.inf, math.inf)
        rows.append(RetainedAccuracy(method, depth, kept, lower, lower >= 1 - margin))
    shown = [row for row in rows if row.shown]
    best = min(shown, key=lambda row: (row.depth, -row.kept.value), default=None)
    needed = dict[tuple[str, int], int]()
    for place, row in enumerate(rows):
        if row.shown or (best is not None and row.depth >= best.depth):
            continue
        gap = row.kept.value - (1 - margin)
        reach = row.kept.value - row.lower
        enough = _users_needed(crossed[:, place], by_user[:, place], gap, reach, users)
        if enough is not None:
            needed[row.method, row.depth] = enough
    undecided = min(needed, key=lambda name: needed[name], default=None)
    return Sufficiency(
        rows=tuple(rows),
        method=best.method if best else None,
        depth=best.depth if best else None,
        users_needed=needed[undecided] if undecided else None,
        undecided=undecided,
        users=users,
        margin=margin,
        level=level,
    )


def _users_needed(
    crossed: np.ndarray, by_user: np.ndarray, gap: float, reach: float, users: int
) -> int | None:
    """Users at which the bound would lie only ``gap`` below the estimate, not ``reach`` as now.

    More users shrink their own part of the variance; that of the seeds stays. The bound keeps its
    distance in standard errors: a normal one would, near the margin, ask for fewer users than
    those that have just not sufficed, for draws at a far tail are not normal.
    """
    if gap <= 0 or users < 2 or not (np.isfinite(crossed).all() and np.isfinite(by_user).all()):
        return None
    of_users = float(by_user.var())
    of_seeds = max(0.0, float(crossed.var()) - of_users)
    left = (gap / reach) ** 2 * (of_users + of_seeds) - of_seeds
    if left <= 0:
        return None
    return max(users + 1, math.ceil(users * of_users / left))
