"""Percentile bootstrap intervals: paired over users, crossed with seeds.

Users are resampled exactly (multinomial weights, Efron 1979) and, where there are several seeds,
seeds independently of them, as both are samples: a crossed or "pigeonhole" bootstrap (Owen 2007,
arXiv 0704.0719). All arms of a comparison share each draw, so what makes a user easy or a seed
lucky for both cancels. With S seeds the seeds' part of the variance comes out (S - 1) / S of its
size: intervals over two or three seeds are somewhat too short in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

WEIGHT_BYTES = 4 * 2**20  # of weights at once: they stay in a cache while the arms read them
MANY = 2**16  # users: above, drawing each of them takes a millisecond or more
LARGE = 16  # users of a group: drawing its size takes about as long as ten of them


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence bounds; infinite where the data say nothing."""

    value: float
    low: float
    high: float


def bootstrap_mean(
    values: Any, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of per-user values, shape (U,), or (S, U) with a row a seed.

    Raises:
        ValueError: if there are no values, or one is NaN or infinite.
    """
    return _bootstrap([values], lambda means: means[..., 0], resamples, level, seed)


def bootstrap_means(
    values: Any, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Mean of each of M per-user quantities, (U, M), by the same draws of users.

    Raises:
        ValueError: if there are no values, or one is NaN or infinite.
    """
    (table,) = as_arms([values])  # (U, M)
    if len(table) == 1:
        return [Interval(float(value), -np.inf, np.inf) for value in table[0]]
    chunks = weight_chunks(len(table), resamples=resamples, seed=seed)
    draws = np.concatenate([weights @ table for weights in chunks])  # (R, M)
    bounds = percentile_bounds(draws, level=level)
    found = np.stack([table.mean(axis=0), *bounds], axis=1).tolist()
    return [Interval(*each) for each in found]


def weight_chunks(n_users: int, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Multinomial weights of bootstrap draws over users, with sum 1: (C, U), R rows in all."""
    rng = np.random.default_rng(seed)
    chunk = max(1, WEIGHT_BYTES // (8 * n_users))
    for start in range(0, resamples, chunk):
        yield _weights(rng, min(chunk, resamples - start), n_users)


def bootstrap_difference(
    candidate: Any,
    reference: Any,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """``mean(candidate) - mean(reference)``, paired by user and seed; arguments (S, U) or (U,).

    Raises:
        ValueError: if the shapes differ, or a value is NaN or infinite.
    """
    arms = [candidate, reference]
    return _bootstrap(arms, lambda means: means[..., 0] - means[..., 1], resamples, level, seed)


def bootstrap_ratio(
    candidate: Any,
    reference: Any,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """``mean(candidate) / mean(reference)``, paired by user and seed; arguments (S, U) or (U,).

    A resample in which the reference's mean is 0 counts against both bounds, so that they become
    infinite where such resamples are frequent.

    Raises:
        ValueError: if the shapes differ, a value is NaN or infinite, or the reference's mean is 0.
    """
    if not np.any(np.mean(as_arms([candidate, reference])[1])):
        raise ValueError("the reference's mean is 0: a ratio to it has no meaning")
    return _bootstrap([candidate, reference], _ratio, resamples, level, seed)


def median_ratio(
    candidate: Any,
    reference: Any,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Median over paired rounds of ``reference / candidate``: the speed-up of the candidate.

    Args:
        candidate: seconds in each round, (n,).
        reference: seconds in the same rounds, (n,): what slows a whole round down cancels.
        resamples: bootstrap draws of rounds.
        level: two-sided confidence.
        seed: of the draws.

    Raises:
        ValueError: if the shapes differ or a time is not above 0.
    """
    times = np.asarray(candidate, np.float64), np.asarray(reference, np.float64)
    if times[0].ndim != 1 or times[0].shape != times[1].shape or not times[0].size:
        raise ValueError(f"expected two (n,) of times, got {times[0].shape} and {times[1].shape}")
    if not all(np.all((t > 0) & np.isfinite(t)) for t in times):
        raise ValueError("expected times above 0")
    ratios = times[1] / times[0]  # (n,)
    if len(ratios) == 1:
        return Interval(float(ratios[0]), 0.0, float("inf"))
    draws = np.random.default_rng(seed).integers(len(ratios), size=(resamples, len(ratios)))
    return interval(float(np.median(ratios)), np.median(ratios[draws], axis=1), level=level)


def as_arms(arms: Sequence[Any]) -> list[np.ndarray]:
    """Check that all arms are finite and of one shape; each becomes float64 (S, U).

    Raises:
        ValueError: saying what was found.
    """
    checked = []
    for values in arms:
        if hasattr(values, "detach"):  # a tensor; this module needs no torch
            values = values.detach().cpu()
        checked.append(np.atleast_2d(np.asarray(values, dtype=np.float64)))
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
        chosen, sizes = groups
        arms = [arm[:, chosen] for arm in arms]  # (S, K + users apart)
    # equal arms have equal means to the last bit: in one product of all they need not
    keys = [hashlib.sha256(arm.tobytes()).digest() for arm in arms]
    distinct = dict(zip(keys, arms, strict=True))
    owner = [list(distinct).index(key) for key in keys]
    rows = np.concatenate(list(distinct.values()))  # (distinct arms * S, U)
    chunk = max(1, WEIGHT_BYTES // (8 * rows.shape[1]))
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        users = (
            _weights(rng, count, n_users)  # (C, U)
            if groups is None
            else _weights_by_group(rng, count, n_users, sizes, rows.shape[1] - len(sizes))
        )
        seeds = _weights(rng, count, n_seeds) if n_seeds > 1 else np.ones((count, 1))  # (C, S)
        means = (users @ rows.T).reshape(count, -1, n_seeds)[:, owner]  # (C, A, S)
        yield np.einsum("cas,cs->ca", means, seeds), means.mean(axis=2)


def interval(value: float, draws: np.ndarray, *, level: float) -> Interval:
    """The percentile interval of bootstrap draws, shape (R,); bounds are draws, never between."""
    low, high = percentile_bounds(draws[:, None], level=level)[:, 0].tolist()
    return Interval(value, low, high)


def percentile_bounds(draws: np.ndarray, *, level: float) -> np.ndarray:
    """Percentile bounds of M quantities from draws (R, M): low and high, (2, M).

    Bounds are draws, never between. NaN counts against both.

    Raises:
        ValueError: if ``level`` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a number between 0 and 1")
    tail = (1 - level) / 2
    return np.stack([_quantiles(draws, tail), -_quantiles(-draws, tail)])


def lower_bound(draws: np.ndarray, tail: float) -> float:
    """The ``tail`` quantile of draws, shape (R,); NaN draws count as -inf."""
    return float(_quantiles(draws[:, None], tail)[0])


def _quantiles(draws: np.ndarray, tail: float) -> np.ndarray:
    """The ``tail`` quantile of each column of (R, M); NaN draws count as -inf."""
    rows = np.ascontiguousarray(draws.T)  # (M, R)
    rows = np.where(np.isnan(rows), -np.inf, rows)
    # "lower" does not interpolate, which would make NaN of infinite draws
    place = math.floor((rows.shape[1] - 1) * tail)
    return np.asarray(np.partition(rows, place, axis=1)[:, place])


def _bootstrap(
    arms: Sequence[Any],
    statistic: Callable[[np.ndarray], np.ndarray],
    resamples: int,
    level: float,
    seed: int,
) -> Interval:
    """Interval of ``statistic``, a function of means (..., A)."""
    checked = as_arms(arms)
    value = float(statistic(np.array([arm.mean() for arm in checked])))
    if checked[0].shape[1] == 1:
        return Interval(value, -np.inf, np.inf)
    drawn = resampled_means(checked, resamples=resamples, seed=seed)
    return interval(value, np.concatenate([statistic(both) for both, _ in drawn]), level=level)


def _ratio(means: np.ndarray) -> np.ndarray:
    """NaN where the reference, the last arm, is 0."""
    bottom = means[..., 1]
    ratio: np.ndarray = means[..., 0] / np.where(bottom == 0, np.nan, bottom)
    return ratio


def _alike(arms: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """Groups of users with the same values in all arms; None where they hold less than half.

    Returns:
        One user of each group, then all that are in none; and the sizes of the groups, (K,).
    """
    codes = np.zeros(arms[0].shape[1], np.int64)
    for values in (row for arm in arms for row in arm):
        kinds, own = np.unique(values, return_inverse=True)
        codes = codes * len(kinds) + own
        _, firsts, codes, sizes = np.unique(
            codes, return_index=True, return_inverse=True, return_counts=True
        )
        large = sizes >= LARGE
        if 2 * sizes[large].sum() < len(codes):
            return None
    apart = np.flatnonzero(~large[codes])
    return np.concatenate([firsts[large], apart]), sizes[large]


def _weights_by_group(
    rng: np.random.Generator, count: int, n_users: int, sizes: np.ndarray, apart: int
) -> np.ndarray:
    """Multinomial weights of K groups and of the users in none, (count, K + apart), sum 1."""
    weights = np.empty((count, len(sizes) + apart))
    shares = np.append(sizes, apart) / n_users
    drawn = rng.multinomial(n_users, shares, size=count)  # (count, K + 1)
    weights[:, : len(sizes)] = drawn[:, :-1]
    if apart:
        for row, left in zip(weights, drawn[:, -1], strict=True):
            row[len(sizes) :] = np.bincount(rng.integers(apart, size=left), minlength=apart)
    return weights / n_users


def _weights(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Multinomial weights with sum 1, float64 (count, size): how often each is drawn, / size."""
    draws = rng.integers(size, size=(count, size))
    draws += np.arange(count)[:, None] * size
    weights: np.ndarray = np.bincount(draws.ravel(), minlength=count * size).reshape(count, size)
    return weights / size


# Can a cheap score be trusted: does it order candidates as the measured damage does?
#
# A candidate is a block, a part of one, or a span. Its damage is what users lose without it, and it
# costs a pass over all of them; its score is nearly free. Only the order matters, since the order
# decides what is cut: Spearman's and Kendall's rank correlations (tau-b, Kendall 1945). How well
# the
# damages order the candidates at all is their reliability (Spearman 1910, Brown 1910).

FEWEST = 3  # candidates: two are in order or not, and a correlation of 1 says nothing
SPLITS = 200  # of the users: their chance moves a reliability by 0.01 to 0.05
AT_ONCE = 4096  # users whose damages and halves are in work at the same time
COLUMNS = [
    "score",
    "candidates",
    "users",
    "reliability",
    "spearman",
    "spearman_low",
    "spearman_high",
    "kendall",
    "kendall_low",
    "kendall_high",
]


def trust(
    scores: Mapping[str, Any],
    reference: Any,
    outcomes: Any,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlations of each score with the measured damage, and their intervals.

    The damage of a candidate is the mean over users of ``reference - outcome``. Intervals are
    percentile bootstraps over users, with the same draws for all scores: the damage is computed
    again in each, and the scores and candidates stay what they are. So they hold for these
    candidates and other users, and leave out that the score itself was estimated.

    Noise in the damage hides an order, and a resample carries the users' noise twice. Where many
    neighbours in the order of damage are no farther apart than their standard errors, the estimate
    is too near to 0 and the interval nearer still, most of all for a good score: the bound at 0's
    side then holds and the other one does not. Such a low correlation may be the users' fault:
    their :func:`reliability` says how high a correlation can be.

    Args:
        scores: by name (M,), higher for a candidate believed to be more important.
        reference: a per-user metric of the whole model, (U,), such as NDCG@10.
        outcomes: the same without each candidate, (U, M).
        resamples: bootstrap draws.
        level: two-sided confidence.
        seed: of the draws, and of the splits of the users.

    Returns:
        One row a score: score, candidates (M), users (U), reliability (of the damages, so the same
        in each row), then spearman and kendall, each with _low and _high. These are NaN for a
        score that holds NaN or is constant, for fewer than 3 candidates, and where all damages are
        equal. Resamples with equal damages count against both bounds.

    Raises:
        ValueError: if shapes disagree, or a metric is NaN or infinite.
    """
    whole, without = np.asarray(reference, np.float64), np.asarray(outcomes, np.float64)
    if whole.ndim != 1 or without.ndim != 2 or len(whole) != len(without):
        raise ValueError(
            f"expected reference (U,) and outcomes (U, M), got {whole.shape} and {without.shape}"
        )
    users, candidates = without.shape
    table = {name: np.asarray(values, np.float64) for name, values in scores.items()}
    for name, values in table.items():
        if values.shape != (candidates,):
            raise ValueError(f"score {name!r} is {values.shape}, expected ({candidates},)")
    damages, sound = np.empty((1, 0)), math.nan
    if candidates:
        lost = np.subtract(whole, without.T, order="C")  # (M, U)
        arms = as_arms(list(lost))  # M of (1, U)
        sound = reliability(lost.T, seed=seed)
        damage = np.stack([arm.mean(axis=1) for arm in arms], axis=1)  # (1, M)
        drawn = resampled_means(arms, resamples=resamples, seed=seed)
        # the damage itself first, then each resample's
        damages = np.concatenate([damage, *(both for both, _ in drawn)])  # (1 + R, M)
    rows: list[dict[str, Any]] = []
    for name, values in table.items():
        spearman, kendall = correlations(values, damages)
        rows.append(
            {"score": name, "candidates": candidates, "users": users, "reliability": sound}
            | _with_bounds("spearman", spearman, users, level)
            | _with_bounds("kendall", kendall, users, level)
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def reliability(losses: Any, *, splits: int = SPLITS, seed: int = 0) -> float:
    """How well these users order the candidates by damage: split halves, stepped up to all users.

    The users are split at random into two halves (one has a user more where the count is odd),
    each half has its own damages, and Spearman's rho between the two, averaged over splits, is the
    reliability r of half of the users. That of all is ``2 r / (1 + r)`` (Spearman-Brown). The
    formula is one for linear correlations, so with ranks it is an approximation.

    It is the squared correlation of the damages with those that endlessly many such users would
    give: about ``sqrt(reliability)`` is the highest correlation that a score can be expected to
    have, unless it was measured on the same users and shares their noise. With few candidates it
    is rough: damages of nothing but noise give 0.2 on average for four candidates, and above 0.7 in
    one of twenty cases; 0.1 and 0.3 for fifty. It knows of chance between users only, not of the
    chance in training a variant.

    Args:
        losses: by user and candidate, (U, M); a damage is a mean over users.
        splits: how many; the average is over these.
        seed: of the splits.

    Returns:
        From 0 to 1. 0 too where halves disagree more than by chance, since no share is negative.
        A half in which all damages are equal orders nothing and counts as a correlation of 0. NaN
        for fewer than 2 users or 3 candidates, and where the damages of all users are equal.

    Raises:
        ValueError: if the shape is another, or a loss is NaN or infinite.
    """
    table = np.asarray(losses, np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(f"expected finite losses (U, M), got {table.shape}")
    users, candidates = table.shape
    if users < 2 or candidates < FEWEST:
        return math.nan
    first, second = _halves(table, splits, seed)
    if not np.ptp(first[0] + second[0]):
        return math.nan
    middle = (candidates + 1) / 2
    one, other = (pd.DataFrame(half).rank(axis=1).to_numpy() - middle for half in (first, second))
    found = _share((one * other).sum(axis=1), (one**2).sum(axis=1) * (other**2).sum(axis=1))
    half = float(np.nan_to_num(found).mean())
    return 2 * half / (1 + half) if half > 0 else 0.0


def correlations(score: Any, damage: Any) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rho and Kendall's tau-b of a score with each row of damages.

    Tied values share their mean rank in rho. Infinities are allowed: only the order is read.

    Args:
        score: (M,).
        damage: (R, M), each row another measurement of all candidates: a resample, a seed.

    Returns:
        Two (R,) float64; NaN for fewer than 3 candidates, and where the score or the row is
        constant or holds NaN.

    Raises:
        ValueError: if the shapes disagree.
    """
    values, rows = np.asarray(score, np.float64), np.asarray(damage, np.float64)
    if values.ndim != 1 or rows.ndim != 2 or rows.shape[1] != len(values):
        raise ValueError(
            f"expected a score (M,) and damages (R, M), got {values.shape} and {rows.shape}"
        )
    n_rows, candidates = rows.shape
    nothing = np.full(n_rows, np.nan)
    if candidates < FEWEST or np.isnan(values).any():
        return nothing, nothing.copy()
    # twice each rank, less its mean, is the sum of the signs of the differences to all others
    # (tied ranks too), and whole numbers, so that no rounding enters before the division
    ranks, of_score = np.empty_like(rows), np.empty_like(values)
    agreeing, untied = np.zeros(n_rows), np.zeros(n_rows)
    untied_score = 0.0
    for place in range(candidates):
        signs = _signs(rows[:, place, None], rows)  # (R, M)
        of_this = _signs(values[place], values)  # (M,)
        ranks[:, place], of_score[place] = signs.sum(axis=1), of_this.sum()
        agreeing += signs @ of_this
        untied += np.abs(signs).sum(axis=1)
        untied_score += np.abs(of_this).sum()
    spearman = _share(ranks @ of_score, (ranks**2).sum(axis=1) * (of_score**2).sum())
    kendall = _share(agreeing, untied * untied_score)
    unknown = np.isnan(rows).any(axis=1)
    spearman[unknown] = kendall[unknown] = np.nan
    return spearman, kendall


def _halves(table: np.ndarray, splits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the users of each half, of losses (U, M): two (splits, M), in units of their own.

    Losses become whole numbers, so small that every sum of them is exact: in whatever order they
    are added, equal damages stay tied, and a half is the rest of all.
    """
    users, candidates = table.shape
    rng = np.random.default_rng(seed)
    chosen = np.zeros((splits, users), bool)
    for row in chosen:
        row[rng.choice(users, users // 2, replace=False, shuffle=False)] = True
    # float64 holds whole numbers up to 2^53; the sum of all is below 2^52, and rounding adds U / 2
    largest = max(table.max(), -table.min())
    exponent = 52 - int(np.frexp(largest)[1]) - users.bit_length()
    first, total = np.zeros((splits, candidates)), np.zeros(candidates)
    for start in range(0, users, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        whole = np.rint(np.ldexp(table[part], exponent))  # (at once, M)
        first += chosen[:, part].astype(np.float64) @ whole
        total += whole.sum(axis=0)
    return first, total - first


def _signs(value: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 where others are below, -1 where above; a difference would make NaN of equal infinities."""
    return (value > others).astype(np.float64) - (value < others)


def _share(part: np.ndarray, square: np.ndarray) -> np.ndarray:
    """``part / sqrt(square)``; NaN where that is 0."""
    share: np.ndarray = part / np.sqrt(np.where(square > 0, square, np.nan))
    return share


def _with_bounds(name: str, found: np.ndarray, users: int, level: float) -> dict[str, float]:
    """The first of (1 + R,) correlations, and bounds from the others."""
    value, low, high = float(found[0]), -1.0, 1.0
    if math.isnan(value):
        low = high = value
    elif users > 1:
        bounds = interval(value, found[1:], level=level)
        low, high = max(low, bounds.low), min(high, bounds.high)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
