"""Intervals in closed form, with t quantiles: over users, and over seeds where there are several.

Values are per user, (U,), or (S, U) with a row per seed; arms of a comparison are paired by both.
Users and seeds are both samples. The variance of D's mean has two parts. From users, V_u: the
variance over users of D's mean over seeds, divided by U. From seeds, s2 / S: s2 is the variance
over seeds of D's mean over users, less the users' noise in it, which V_u holds already. For a
difference D is ``x - r``, for a ratio ``(x - theta r) / mean(r)``.

With one seed the interval is over users only, since it says nothing about other seeds. One user
gives no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit
from scipy.stats import binom

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence bounds; infinite where the data say nothing."""

    value: float
    low: float
    high: float


def mean_interval(values: Any, *, level: float = LEVEL) -> Interval:
    """Mean of per-user values, (U,) or (S, U).

    Raises:
        ValueError: if there are no values, or one is NaN or infinite; so do all functions here.
    """
    (arm,) = as_arms([values])
    return _interval(arm.mean(), arm, level, positive=bool((arm >= 0).all()))


def difference_interval(candidate: Any, reference: Any, *, level: float = LEVEL) -> Interval:
    """``mean(candidate) - mean(reference)``, paired by user and seed."""
    one, other = as_arms([candidate, reference])
    return _interval(one.mean() - other.mean(), one - other, level)


def ratio_interval(candidate: Any, reference: Any, *, level: float = LEVEL) -> Interval:
    """``mean(candidate) / mean(reference)``, paired by user and seed.

    Raises:
        ValueError: if the reference's mean is 0.
    """
    one, other = as_arms([candidate, reference])
    bottom = other.mean()
    if not bottom:
        raise ValueError("the reference's mean is 0: a ratio to it has no meaning")
    ratio = one.mean() / bottom
    positive = bool((one >= 0).all() and (other >= 0).all())
    return _interval(ratio, (one - ratio * other) / bottom, level, positive=positive)


def interaction_interval(
    one: Any, other: Any, both: Any, reference: Any, *, level: float = LEVEL
) -> Interval:
    """The loss of two changes together, less the sum of their single losses; paired.

    A loss is a share of the reference's mean, ``1 - mean(x) / mean(reference)``. So this is
    ``mean(one + other - both - reference) / mean(reference)``: 0 where the losses add up, above 0
    where one change costs more once the other one is made.

    Raises:
        ValueError: if the reference's mean is 0.
    """
    first, second, joint, base = as_arms([one, other, both, reference])
    bottom = base.mean()
    if not bottom:
        raise ValueError("the reference's mean is 0: a ratio to it has no meaning")
    contrast = (first - joint) + (second - base)  # exactly 0 where the second change has no effect
    share = contrast.mean() / bottom
    return _interval(share, (contrast - share * base) / bottom, level)


def mean_intervals(values: Any, *, level: float = LEVEL) -> list[Interval]:
    """Mean of each of M per-user quantities, (U, M)."""
    (table,) = as_arms([values])
    return [Interval(*each) for each in zip(*mean_bounds(table, level=level).tolist(), strict=True)]


def mean_bounds(table: np.ndarray, *, level: float = LEVEL) -> np.ndarray:
    """Mean, low and high of each of M per-user quantities (U, M): (3, M)."""
    users, means = len(table), table.mean(axis=0)
    if users == 1:
        reach = np.full_like(means, np.inf)
    else:
        error = table.std(axis=0, ddof=1) / math.sqrt(users)
        reach = stdtrit(users - 1, (1 + level) / 2) * error
    low = means - reach
    clipped = np.where((table >= 0).all(axis=0) & (users > 1), np.maximum(low, 0), low)
    return np.stack([means, clipped, means + reach])


def median_ratio(candidate: Any, reference: Any, *, level: float = LEVEL) -> Interval:
    """Median over paired rounds of ``reference / candidate``: the speed-up of the candidate.

    Its interval lies between two order statistics, the k-th from below and from above, with
    ``P(Bin(n, 1/2) < k) <= (1 - level) / 2``: times have no shape to rely on. Of less than six
    rounds at 95 % it is infinite.

    Args:
        candidate: seconds in each round, (n,), above 0.
        reference: seconds in the same rounds, (n,): what slows a whole round down cancels.
        level: confidence.
    """
    ratios = np.sort(np.asarray(reference, np.float64) / np.asarray(candidate, np.float64))  # (n,)
    k = int(binom.ppf((1 - level) / 2, len(ratios), 0.5))
    low, high = (ratios[k - 1], ratios[-k]) if k else (0.0, math.inf)
    return Interval(float(np.median(ratios)), float(low), float(high))


def as_arms(arms: Sequence[Any]) -> list[np.ndarray]:
    """Check that all arms are finite and of one shape; each becomes float64 (S, U)."""
    checked = [np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in arms]
    shapes = [arm.shape for arm in checked]
    if len(set(shapes)) > 1:
        raise ValueError(f"paired values need one shape (seeds, users), got {shapes}")
    if checked[0].ndim != 2 or not checked[0].size:
        raise ValueError(f"expected (seeds, users) with at least one of each, got {shapes[0]}")
    if not all(np.isfinite(arm).all() for arm in checked):
        raise ValueError("values hold NaN or infinity")
    return checked


class Spread(NamedTuple):
    """The variance of a mean over a table (S, U), by source; of two tables, the covariance."""

    users: Any  # V_u, variance of the mean from the sample of users
    seeds: Any  # s2, variance of a single seed's mean; 0 for one seed
    noise: Any  # the users' noise in s2


def spread(one: np.ndarray, other: np.ndarray) -> Spread:
    """The spread of a table of deviations with itself, or with another one; from two users on."""
    n_seeds, n_users = one.shape
    a, b = one - one.mean(), other - other.mean()
    by_user, by_seed = a.mean(axis=0) @ b.mean(axis=0), a.mean(axis=1) @ b.mean(axis=1)
    seeds = noise = 0.0
    if n_seeds > 1:
        # sums of squares of a two-way table: all, less users', less seeds'
        left = np.vdot(a, b) - n_seeds * by_user - n_users * by_seed
        seeds = by_seed / (n_seeds - 1)
        noise = left / ((n_seeds - 1) * (n_users - 1)) / n_users
    return Spread(by_user / (n_users - 1) / n_users, seeds, noise)


def standard_error(of: Spread, *, n_users: int, n_seeds: int) -> tuple[Any, Any]:
    """Standard error of a mean over users and seeds, and its degrees of freedom.

    ``V = V_u + max(0, s2 - noise) / S``: in mean squares of the two-way random table that is
    ``(MS_users + MS_seeds - MS_rest) / (S U)``, and the degrees are Satterthwaite's (1946).
    """
    users, seeds, noise = of
    variance = users + np.maximum(0, seeds - noise) / n_seeds
    square = users**2 / (n_users - 1) + (seeds / n_seeds) ** 2 / max(1, n_seeds - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.where(square > 0, variance**2 / square, np.inf)
    return np.sqrt(variance), np.maximum(df, n_seeds - 1)


def _interval(
    value: float, deviations: np.ndarray, level: float, *, positive: bool = False
) -> Interval:
    """The interval of ``value``, the mean of ``deviations`` (S, U) but for a constant."""
    n_seeds, n_users = deviations.shape
    if n_users == 1:
        return Interval(float(value), -math.inf, math.inf)
    of = Spread(*np.maximum(0, spread(deviations, deviations)))
    error, df = standard_error(of, n_users=n_users, n_seeds=n_seeds)
    reach = float(stdtrit(df, (1 + level) / 2)) * error
    low = value - reach
    # shares and metrics can't be below 0
    return Interval(float(value), float(max(low, 0.0) if positive else low), float(value + reach))
