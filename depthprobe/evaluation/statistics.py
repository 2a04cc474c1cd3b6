"""Intervals: percentile bootstraps, paired over users, crossed with seeds.

The one place that makes an :class:`Interval`. Values are per user, (U,), or (S, U) with a row a
seed. ``bootstrap_mean``, ``bootstrap_means``, ``bootstrap_difference``, ``bootstrap_ratio`` and
``median_ratio`` are complete; who has a statistic of its own applies it to the means of
``resampled_means`` and hands the result to ``interval``.

Users are resampled exactly (multinomial weights, Efron 1979) and, where there are several seeds,
seeds independently of them, as both are samples: a crossed or "pigeonhole" bootstrap (Owen 2007,
arXiv 0704.0719). All arms of a comparison share each draw, so what makes a user easy or a seed
lucky for both cancels. With S seeds the seeds' part of the variance comes out (S - 1) / S of its
size: intervals over two or three seeds are somewhat too short in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
WEIGHT_BYTES = 4 * 2**20  # of weights at once: they stay in a cache while the arms read them
MANY = 2**16  # users: above, drawing each of them takes a millisecond or more
LARGE = 16  # users of a group: drawing its size takes about as long as ten of them


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence bounds; infinite where the data say nothing."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: Any, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Mean of per-user values, (U,) or (S, U).

    Raises:
        ValueError: if there are no values, or one is NaN or infinite; so do all functions here.
    """
    return _bootstrap([values], lambda means: means[..., 0], resamples, seed)


def bootstrap_difference(
    candidate: Any, reference: Any, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """``mean(candidate) - mean(reference)``, paired by user and seed."""
    return _bootstrap(
        [candidate, reference], lambda means: means[..., 0] - means[..., 1], resamples, seed
    )


def bootstrap_ratio(
    candidate: Any, reference: Any, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """``mean(candidate) / mean(reference)``, paired by user and seed.

    A resample in which the reference's mean is 0 counts against both bounds, so that they become
    infinite where such resamples are frequent. The reference's own mean must not be 0.
    """
    if not np.any(np.mean(reference)):
        raise ValueError("the reference's mean is 0: a ratio to it has no meaning")
    return _bootstrap([candidate, reference], lambda means: shares(means)[..., 0], resamples, seed)


def bootstrap_means(values: Any, *, resamples: int = 1000, seed: int = 0) -> list[Interval]:
    """Mean of each of M per-user quantities, (U, M), by the same draws of users."""
    (table,) = as_arms([values])  # (U, M)
    if len(table) == 1:
        return [Interval(float(value), -np.inf, np.inf) for value in table[0]]
    chunks = weight_chunks(len(table), resamples=resamples, seed=seed)
    draws = np.concatenate([weights @ table for weights in chunks])  # (R, M)
    bounds = percentile_bounds(draws, level=LEVEL)
    return [Interval(*each) for each in np.stack([table.mean(axis=0), *bounds], axis=1).tolist()]


def median_ratio(
    candidate: Any, reference: Any, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Median over paired rounds of ``reference / candidate``: the speed-up of the candidate.

    Args:
        candidate: seconds in each round, (n,), above 0.
        reference: seconds in the same rounds, (n,): what slows a whole round down cancels.
    """
    ratios = np.asarray(reference, np.float64) / np.asarray(candidate, np.float64)  # (n,)
    if len(ratios) == 1:
        return Interval(float(ratios[0]), 0.0, float("inf"))
    draws = np.random.default_rng(seed).integers(len(ratios), size=(resamples, len(ratios)))
    return interval(float(np.median(ratios)), np.median(ratios[draws], axis=1))


def _bootstrap(
    arms: Sequence[Any], statistic: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> Interval:
    """Interval of ``statistic``, a function of means (..., A)."""
    checked = as_arms(arms)
    value = float(statistic(np.array([arm.mean() for arm in checked])))
    if checked[0].shape[1] == 1:
        return Interval(value, -np.inf, np.inf)
    drawn = resampled_means(checked, resamples=resamples, seed=seed)
    return interval(value, np.concatenate([statistic(both) for both, _ in drawn]))


def shares(means: np.ndarray) -> np.ndarray:
    """Means over that of the last arm, (..., A) -> (..., A - 1); NaN where that is 0."""
    bottom = means[..., -1:]
    share: np.ndarray = means[..., :-1] / np.where(bottom == 0, np.nan, bottom)
    return share


def interval(value: float, draws: np.ndarray, *, level: float = LEVEL) -> Interval:
    """The percentile interval of bootstrap draws, (R,)."""
    low, high = percentile_bounds(draws[:, None], level=level)[:, 0].tolist()
    return Interval(value, low, high)


def percentile_bounds(draws: np.ndarray, *, level: float) -> np.ndarray:
    """Percentile bounds of M quantities from draws (R, M): low and high, (2, M).

    Bounds are draws, never between. NaN counts against both.
    """
    tail = (1 - level) / 2
    return np.stack([lower_bounds(draws, tail), -lower_bounds(-draws, tail)])


def lower_bounds(draws: np.ndarray, tail: float) -> np.ndarray:
    """The ``tail`` quantile of each column of (R, M); NaN draws count as -inf."""
    rows = np.ascontiguousarray(draws.T)  # (M, R)
    rows = np.where(np.isnan(rows), -np.inf, rows)
    # no interpolation, which would make NaN of infinite draws
    place = math.floor((rows.shape[1] - 1) * tail)
    return np.asarray(np.partition(rows, place, axis=1)[:, place])


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


def resampled_means(
    arms: Sequence[np.ndarray], *, resamples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Bootstrap means of A arms, each (S, U), in chunks of C resamples.

    Which of the users that have the same values in all arms is drawn makes no difference. So of
    many users, those who share theirs with others, such as an NDCG@10 of 0, are drawn as a group:
    how often any of them is drawn, at once. The same distribution, by other draws.

    Yields:
        (C, A) with users and seeds resampled, and (C, A) with users alone, from the same draws.
    """
    n_seeds, n_users = arms[0].shape
    rng = np.random.default_rng(seed)
    groups = _alike(arms) if n_users > MANY else None
    if groups is not None:
        arms = [arm[:, groups[0]] for arm in arms]  # (S, K + users apart)
    # equal arms have equal means to the last bit: in one product of all they need not
    keys = [hashlib.sha256(arm.tobytes()).digest() for arm in arms]
    distinct = dict(zip(keys, arms, strict=True))
    owner = [list(distinct).index(key) for key in keys]
    rows = np.concatenate(list(distinct.values()))  # (distinct arms * S, U)
    for count in _chunks(rows.shape[1], resamples):
        if groups is None:
            users = _weights(rng, count, n_users)  # (C, U)
        else:
            users = _weights_by_group(rng, count, n_users, groups[1], rows.shape[1])
        seeds = _weights(rng, count, n_seeds) if n_seeds > 1 else np.ones((count, 1))  # (C, S)
        means = (users @ rows.T).reshape(count, -1, n_seeds)[:, owner]  # (C, A, S)
        yield np.einsum("cas,cs->ca", means, seeds), means.mean(axis=2)


def weight_chunks(n_users: int, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Multinomial weights of bootstrap draws over users, with sum 1: (C, U), R rows in all."""
    rng = np.random.default_rng(seed)
    for count in _chunks(n_users, resamples):
        yield _weights(rng, count, n_users)


def _chunks(n_users: int, resamples: int) -> list[int]:
    """How many resamples are drawn at a time."""
    chunk = max(1, WEIGHT_BYTES // (8 * n_users))
    return [min(chunk, resamples - start) for start in range(0, resamples, chunk)]


def _weights(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Multinomial weights with sum 1, float64 (count, size): how often each is drawn, / size."""
    draws = rng.integers(size, size=(count, size))
    draws += np.arange(count)[:, None] * size
    weights: np.ndarray = np.bincount(draws.ravel(), minlength=count * size).reshape(count, size)
    return weights / size


def _alike(arms: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """Groups of users with the same values in all arms; None where they hold less than half.

    Returns:
        One user of each group, then all that are in none; and the sizes of the groups, (K,).
    """
    codes = np.zeros(arms[0].shape[1], np.int64)
    for values in (row for arm in arms for row in arm):
        kinds, own = np.unique(values, return_inverse=True)
        _, firsts, codes, sizes = np.unique(
            codes * len(kinds) + own, return_index=True, return_inverse=True, return_counts=True
        )
        large = sizes >= LARGE
        if 2 * sizes[large].sum() < len(codes):
            return None
    return np.concatenate([firsts[large], np.flatnonzero(~large[codes])]), sizes[large]


def _weights_by_group(
    rng: np.random.Generator, count: int, n_users: int, sizes: np.ndarray, width: int
) -> np.ndarray:
    """Multinomial weights of K groups, then of the users in none, (count, width), sum 1."""
    weights, apart = np.empty((count, width)), width - len(sizes)
    drawn = rng.multinomial(n_users, np.append(sizes, apart) / n_users, size=count)  # (C, K + 1)
    weights[:, : len(sizes)] = drawn[:, :-1]
    if apart:
        for row, left in zip(weights, drawn[:, -1], strict=True):
            row[len(sizes) :] = np.bincount(rng.integers(apart, size=left), minlength=apart)
    return weights / n_users
