"""Does a cheap score order candidates as the measured damage does?

A candidate is a block, a part of one, or a span. Its damage is the accuracy that users lose without
it, which costs a pass over all users; its score is nearly free. Only the order matters, since it
decides what is cut: hence Spearman's and Kendall's rank correlations (tau-b, Kendall 1945). The
damages have noise of their own; their reliability (Spearman 1910, Brown 1910) measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from depthprobe.evaluation.statistics import LEVEL, as_arms

FEWEST = 3  # fewest candidates: with two a correlation is always 1 or -1
SPLITS = 200  # random halves of the users; the choice moves a reliability by 0.01 to 0.05
RESAMPLES = 1000
COLUMNS = ["score", "candidates", "users", "reliability"] + [
    f"{name}{bound}" for name in ("spearman", "kendall") for bound in ("", "_low")
]


def trust(
    scores: Mapping[str, Any],
    reference: Any,
    outcomes: Any,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlations of each score with the measured damage, and their one-sided lower bounds.

    The damage of a candidate is the mean over users of ``reference - outcome``, computed again in
    each bootstrap draw of users. So a bound holds for these candidates and other users. It ignores
    the error of the score itself.

    There is no upper bound: noise in the damage hides an order, and a resample carries the users'
    noise twice. For the same reason a correlation that is not above 0 has no bound: -1. The users'
    :func:`reliability` says how high a correlation can be.

    Args:
        scores: by name (M,), higher for a candidate believed to be more important.
        reference: a per-user metric of the full model, (U,), such as NDCG@10.
        outcomes: the same without each candidate, (U, M).
        resamples: draws of the bootstrap.
        level: confidence of a lower bound.
        seed: of the draws and splits.

    Returns:
        One row a score, with :data:`COLUMNS`. Resamples with equal damages count as -1.
    """
    (losses,) = as_arms([np.asarray(reference, np.float64)[:, None] - np.asarray(outcomes)])
    users, candidates = losses.shape
    rng = np.random.default_rng(seed)
    draws = (rng.integers(users, size=users) for _ in range(resamples if users > 1 else 0))
    counts = (np.bincount(drawn, minlength=users) for drawn in draws)
    whole = _whole_numbers(losses)
    # the damage, then that of each resample; the unit does not change ranks
    damages = np.stack([weights @ whole for weights in (np.ones(users), *counts)])  # (1 + R, M)
    sound = reliability(losses, seed=seed)
    rows: list[dict[str, Any]] = []
    for name, values in scores.items():
        row = {"score": name, "candidates": candidates, "users": users, "reliability": sound}
        for kind, found in zip(("spearman", "kendall"), correlations(values, damages), strict=True):
            value, drawn = float(found[0]), np.nan_to_num(found[1:], nan=-1.0)
            low = np.quantile(drawn, 1 - level, method="lower") if value > 0 and len(drawn) else -1
            row |= {kind: value, f"{kind}_low": value if math.isnan(value) else float(low)}
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def correlations(score: Any, damage: Any) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rho and Kendall's tau-b, both (R,), of a score (M,) with rows of damages (R, M).

    NaN for fewer than 3 candidates, and where the score or the row is constant or holds NaN.
    """
    values, rows = np.asarray(score, np.float64), np.asarray(damage, np.float64)
    if len(values) < FEWEST:
        return np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    rows, values = _centred_ranks(rows), _centred_ranks(values)
    # scipy's kendalltau would take 0.3 ms for each of a thousand rows; this does all at once
    agreeing, untied, untied_score = np.zeros(len(rows)), np.zeros(len(rows)), 0.0
    for place, value in enumerate(values):  # the pairs of one candidate with each other
        signs, of_score = np.sign(rows - rows[:, [place]]), np.sign(values - value)
        agreeing += signs @ of_score
        untied += np.abs(signs).sum(axis=1)
        untied_score += np.abs(of_score).sum()
    return _linear(rows, values), _share(agreeing, untied * untied_score)


def reliability(losses: Any, *, splits: int = SPLITS, seed: int = 0) -> float:
    """How reliably these users order the candidates by damage: split halves, scaled to all.

    Each random half of the users has its own damages. Spearman's rho between the two halves,
    averaged over splits, is the reliability r of half of the users. That of all is ``2 r / (1 +
    r)`` (Spearman-Brown; a formula for linear correlations, so with ranks an approximation). About
    ``sqrt(reliability)`` is the highest correlation that a score can be expected to have, unless it
    was measured on the same users. With few candidates it is rough: damages of nothing but noise
    give 0.2 on average for four candidates, and above 0.7 in one of twenty cases.

    From 0 to 1; 0 too where halves disagree more than by chance, or a half has equal damages. NaN
    for fewer than 2 users or 3 candidates, and where the damages of all users are equal.
    ``losses`` are by user and candidate, (U, M); a damage is a mean over users.
    """
    table = np.asarray(losses, np.float64)
    users, candidates = table.shape
    if users < 2 or candidates < FEWEST:
        return math.nan
    whole, rng = _whole_numbers(table), np.random.default_rng(seed)
    first = np.empty((splits, candidates))
    for place in range(splits):
        half = np.zeros(users)
        half[rng.choice(users, users // 2, replace=False, shuffle=False)] = 1
        first[place] = half @ whole
    total = whole.sum(axis=0)
    if not np.ptp(total):
        return math.nan
    one, other = _centred_ranks(first), _centred_ranks(total - first)
    half_sound = float(np.nan_to_num(_linear(one, other)).mean())
    return 2 * half_sound / (1 + half_sound) if half_sound > 0 else 0.0


def _whole_numbers(losses: np.ndarray) -> np.ndarray:
    """Losses (U, M) as whole numbers of a small unit, so that every sum over users is exact.

    Then equal damages stay tied in any order of addition, and one half is exactly all less the
    other.
    """
    # float64 holds whole numbers up to 2^53; the sum of all is below 2^52, and rounding adds U / 2
    largest = np.abs(losses).max(initial=0)
    exponent = 52 - int(np.frexp(largest)[1]) - len(losses).bit_length()
    whole: np.ndarray = np.rint(np.ldexp(losses, exponent))
    return whole


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, less their mean: multiples of 1/2, so their sums are exact."""
    ranks: np.ndarray = rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2
    return ranks


def _linear(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Linear correlation of centred rows, (R, M) and (R, M) or (M,); NaN where one is constant."""
    return _share((one * other).sum(axis=-1), (one**2).sum(axis=-1) * (other**2).sum(axis=-1))


def _share(part: np.ndarray, square: np.ndarray) -> np.ndarray:
    """``part / sqrt(square)``; NaN where that is 0."""
    share: np.ndarray = part / np.sqrt(np.where(square > 0, square, np.nan))
    return share
