"""Can a cheap score be trusted: does it order candidates as the measured damage does?

A candidate is a block, a part of one, or a span. Its damage is what users lose without it, and it
costs a pass over all of them; its score is nearly free. Only the order matters, since the order
decides what is cut: Spearman's and Kendall's rank correlations (tau-b, Kendall 1945). How well the
damages order the candidates at all is their reliability (Spearman 1910, Brown 1910).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from depthprobe.evaluation.statistics import as_arms, interval, resampled_means

FEWEST = 3  # candidates: two are in order or not, and a correlation of 1 says nothing
SPLITS = 200  # of the users: their chance moves a reliability by 0.01 to 0.05
AT_ONCE = 4096  # users whose damages and halves are in work at the same time
COLUMNS = ["score", "candidates", "users", "reliability"] + [
    f"{name}{bound}" for name in ("spearman", "kendall") for bound in ("", "_low", "_high")
]


def trust(
    scores: Mapping[str, Any],
    reference: Any,
    outcomes: Any,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlations of each score with the measured damage, and their intervals over users.

    The damage of a candidate is the mean over users of ``reference - outcome``, computed again in
    each bootstrap draw of users. So intervals hold for these candidates and other users, and leave
    out that the score itself was estimated.

    Noise in the damage hides an order, and a resample carries the users' noise twice. Where many
    damages are no farther apart than their standard errors, the estimate is too near to 0 and the
    interval nearer still: the bound at 0's side then holds and the other one does not. The users'
    :func:`reliability` says how high a correlation can be.

    Args:
        scores: by name (M,), higher for a candidate believed to be more important.
        reference: a per-user metric of the full model, (U,), such as NDCG@10.
        outcomes: the same without each candidate, (U, M).

    Returns:
        One row a score, with :data:`COLUMNS`. Resamples with equal damages count against both
        bounds of a correlation.
    """
    full, without = np.asarray(reference, np.float64), np.asarray(outcomes, np.float64)
    users, candidates = without.shape
    damages, sound = np.empty((1, 0)), math.nan
    if candidates:
        losses = np.subtract(full, without.T, order="C")  # (M, U)
        arms = as_arms(list(losses))  # M of (1, U)
        sound = reliability(losses.T, seed=seed)
        damage = np.stack([arm.mean(axis=1) for arm in arms], axis=1)  # (1, M)
        drawn = resampled_means(arms, resamples=resamples, seed=seed)
        # the damage itself first, then each resample's
        damages = np.concatenate([damage, *(both for both, _ in drawn)])  # (1 + R, M)
    rows: list[dict[str, Any]] = []
    for name, values in scores.items():
        spearman, kendall = correlations(values, damages)
        rows.append(
            {"score": name, "candidates": candidates, "users": users, "reliability": sound}
            | _with_bounds("spearman", spearman, users)
            | _with_bounds("kendall", kendall, users)
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def correlations(score: Any, damage: Any) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rho and Kendall's tau-b, both (R,), of a score (M,) with rows of damages (R, M).

    NaN for fewer than 3 candidates, and where the score or the row is constant or holds NaN.
    """
    values, rows = np.asarray(score, np.float64), np.asarray(damage, np.float64)
    if len(values) < FEWEST:
        return np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    rows, values = _centred_ranks(rows), _centred_ranks(values)
    # scipy's kendalltau takes 0.3 ms for each of the thousand rows: here all rows at a time
    agreeing, untied, untied_score = np.zeros(len(rows)), np.zeros(len(rows)), 0.0
    for place, value in enumerate(values):  # the pairs of one candidate with each other
        signs, of_score = np.sign(rows - rows[:, [place]]), np.sign(values - value)
        agreeing += signs @ of_score
        untied += np.abs(signs).sum(axis=1)
        untied_score += np.abs(of_score).sum()
    return _linear(rows, values), _share(agreeing, untied * untied_score)


def reliability(losses: Any, *, splits: int = SPLITS, seed: int = 0) -> float:
    """How well these users order the candidates by damage: split halves, stepped up to all users.

    Each random half of the users has its own damages, and Spearman's rho between the two, averaged
    over splits, is the reliability r of half of the users. That of all is ``2 r / (1 + r)``
    (Spearman-Brown; a formula for linear correlations, so with ranks an approximation). About
    ``sqrt(reliability)`` is the highest correlation that a score can be expected to have, unless
    it was measured on the same users. With few candidates it is rough: damages of nothing but
    noise give 0.2 on average for four candidates, and above 0.7 in one of twenty cases.

    From 0 to 1; 0 too where halves disagree more than by chance, or a half has equal damages. NaN
    for fewer than 2 users or 3 candidates, and where the damages of all users are equal.
    ``losses`` are by user and candidate, (U, M); a damage is a mean over users.
    """
    table = np.asarray(losses, np.float64)
    users, candidates = table.shape
    if users < 2 or candidates < FEWEST:
        return math.nan
    first, second = _halves(table, splits, seed)
    if not np.ptp(first[0] + second[0]):
        return math.nan
    half = float(np.nan_to_num(_linear(_centred_ranks(first), _centred_ranks(second))).mean())
    return 2 * half / (1 + half) if half > 0 else 0.0


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


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis less their mean: multiples of 1/2, so sums of them are exact."""
    ranks: np.ndarray = rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2
    return ranks


def _linear(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Linear correlation of centred rows, (R, M) and (R, M) or (M,); NaN where one is constant."""
    return _share((one * other).sum(axis=-1), (one**2).sum(axis=-1) * (other**2).sum(axis=-1))


def _share(part: np.ndarray, square: np.ndarray) -> np.ndarray:
    """``part / sqrt(square)``; NaN where that is 0."""
    share: np.ndarray = part / np.sqrt(np.where(square > 0, square, np.nan))
    return share


def _with_bounds(name: str, correlation: np.ndarray, users: int) -> dict[str, float]:
    """The first of (1 + R,) correlations, and bounds from the others."""
    value, low, high = float(correlation[0]), -1.0, 1.0
    if math.isnan(value):
        low = high = value
    elif users > 1:
        bounds = interval(value, correlation[1:])
        low, high = max(low, bounds.low), min(high, bounds.high)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
