from __future__ import annotations

import numpy as np
import pytest

from depthprobe.evaluation import statistics
from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import (
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    median_ratio,
    resampled_means,
)

DRAW = np.random.default_rng(0)
REFERENCE = DRAW.gamma(1.0, 1.0, size=(3, 200))
CANDIDATE = 0.9 * REFERENCE + DRAW.normal(0, 0.3, size=(3, 200))


def test_values_by_hand() -> None:
    candidate, reference = [1.0, 0.0, 0.5], [1.0, 1.0, 0.0]
    assert bootstrap_ratio(candidate, reference).value == pytest.approx(0.75)
    assert bootstrap_difference(candidate, reference).value == pytest.approx(-0.5 / 3)
    assert bootstrap_mean(candidate).value == pytest.approx(0.5)


def test_agrees_with_a_plain_loop() -> None:
    """The same quantiles as drawing rows and columns with replacement, one by one."""
    draw = np.random.default_rng(5)
    ratios = []
    for _ in range(4000):
        picked = np.ix_(draw.integers(3, size=3), draw.integers(200, size=200))
        ratios.append(CANDIDATE[picked].mean() / REFERENCE[picked].mean())
    found = bootstrap_ratio(CANDIDATE, REFERENCE, resamples=4000)
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert found.value == pytest.approx(CANDIDATE.mean() / REFERENCE.mean())
    assert found.low == pytest.approx(low, abs=0.004)
    assert found.high == pytest.approx(high, abs=0.004)


@pytest.mark.parametrize("rows", [1, 3])
def test_identical_arms_are_certain(rows: int) -> None:
    arm = REFERENCE[:rows]
    ratio, difference = bootstrap_ratio(arm, arm), bootstrap_difference(arm, arm)
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_pairing_cancels_what_both_arms_share() -> None:
    shifted = REFERENCE[0] - 0.1
    paired = bootstrap_difference(shifted, REFERENCE[0])
    assert (paired.low, paired.high) == pytest.approx((-0.1, -0.1), abs=1e-12)
    apart = bootstrap_difference(DRAW.permutation(shifted), REFERENCE[0])
    assert apart.high - apart.low > 0.1


def test_seeds_widen_the_interval() -> None:
    lucky = REFERENCE + np.array([[-0.5], [0.0], [0.5]])
    both, users = bootstrap_mean(lucky), bootstrap_mean(lucky.mean(axis=0))
    assert both.high - both.low > 1.5 * (users.high - users.low)
    # a lucky seed of both arms cancels in their difference
    assert bootstrap_difference(lucky, lucky - 0.2).low == pytest.approx(-0.0 + 0.2)


def test_resampled_variance_is_that_of_the_mean() -> None:
    values = REFERENCE[:1]
    pairs = list(resampled_means([values], resamples=20_000, seed=1))
    both, users = (np.concatenate(part)[:, 0] for part in zip(*pairs, strict=True))
    assert np.array_equal(both, users)  # one seed: nothing else to draw
    assert both.mean() == pytest.approx(values.mean(), abs=0.002)
    assert both.std() == pytest.approx(values.std() / np.sqrt(200), rel=0.03)


def test_coverage_of_95_per_cent_intervals() -> None:
    draw = np.random.default_rng(11)
    trials, covered = 1000, np.zeros(3)
    for trial in range(trials):
        reference = draw.gamma(2.0, 0.5, size=200)  # mean 1
        candidate = 0.8 * reference + draw.exponential(0.1, size=200)  # mean 0.9
        options = {"resamples": 300, "seed": trial}
        mean = bootstrap_mean(reference, **options)
        ratio = bootstrap_ratio(candidate, reference, **options)
        difference = bootstrap_difference(candidate, reference, **options)
        covered += [
            mean.low <= 1 <= mean.high,
            ratio.low <= 0.9 <= ratio.high,
            difference.low <= -0.1 <= difference.high,
        ]
    assert ((covered / trials >= 0.93) & (covered / trials <= 0.97)).all(), covered / trials


def ndcg(draw: np.random.Generator, users: int, *, gain: float = 0.0) -> np.ndarray:
    """NDCG@10 of a teacher and of a model, (2, U): paired, three of four 0, few values at all."""
    ease = draw.normal(size=users)
    noise = 0.4 * draw.normal(size=(2, users)) - np.array([[0.0], [gain]])
    ranks = np.ceil(np.exp(np.clip(3.5 - 1.6 * ease + noise, 0, 8)))
    return np.stack([per_user_metric(each, "NDCG@10") for each in ranks])


@pytest.mark.parametrize("seeds", [1, 2])
def test_groups_are_drawn_as_their_users_are(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many users with few values: the same distribution, whether drawn by group or one by one."""
    draw = np.random.default_rng(3)
    arms = list(np.stack([ndcg(draw, 3000) for _ in range(seeds)], axis=1))  # 2 of (S, U)
    found = []
    for many in (10**9, 100):
        monkeypatch.setattr(statistics, "MANY", many)
        drawn = resampled_means(arms, resamples=20_000, seed=1)
        found.append([np.concatenate(part) for part in zip(*drawn, strict=True)])
    groups = statistics._alike(arms)
    assert groups is not None
    assert len(groups[0]) < 1500  # one of a group, and who is in none
    assert len(groups[1]) > 1
    for apart, grouped in zip(*found, strict=True):
        assert grouped.shape == apart.shape
        np.testing.assert_allclose(grouped.mean(axis=0), apart.mean(axis=0), atol=2e-4)
        np.testing.assert_allclose(grouped.std(axis=0), apart.std(axis=0), rtol=0.03)
        change = [draws[:, 1] - draws[:, 0] for draws in (apart, grouped)]
        quantiles = [np.quantile(each, [0.025, 0.5, 0.975]) for each in change]
        np.testing.assert_allclose(quantiles[1], quantiles[0], atol=0.03 * np.ptp(quantiles[0]))


def test_groups_by_hand() -> None:
    """Two values in two arms make groups of 20 and 18; the rest, too few, stay by themselves."""
    one = np.array([0.0] * 40 + [1.0] * 3)[None]
    two = np.array([0.0] * 20 + [1.0] * 18 + [2.0] * 5)[None]
    groups = statistics._alike([one, two])
    assert groups is not None
    chosen, sizes = groups
    assert sizes.tolist() == [20, 18]
    assert [(one[0, u], two[0, u]) for u in chosen[:2]] == [(0, 0), (0, 1)]
    assert chosen[2:].tolist() == [38, 39, 40, 41, 42]
    weights = statistics._weights_by_group(np.random.default_rng(0), 50, 43, sizes, 7)
    assert weights.shape == (50, 7)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert statistics._alike([np.arange(100.0)[None]]) is None  # nobody is like another


def test_the_seed_decides_the_draws() -> None:
    assert bootstrap_mean(REFERENCE[0], seed=1) == bootstrap_mean(REFERENCE[0], seed=1)
    assert bootstrap_mean(REFERENCE[0], seed=1) != bootstrap_mean(REFERENCE[0], seed=2)


def test_too_few_hits_say_nothing() -> None:
    """Three hits of ten: 2.8 % of the resamples have none, and no ratio."""
    reference = np.array([1.0] * 3 + [0.0] * 7)
    found = bootstrap_ratio(reference * 0.5, reference, resamples=5000)
    assert (found.value, found.low, found.high) == (0.5, -np.inf, np.inf)
    assert bootstrap_ratio([0.4], [0.5]).low == -np.inf  # one user


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="reference's mean is 0"):
        bootstrap_ratio([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"one shape .*\(1, 2\), \(1, 3\)"):
        bootstrap_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="NaN"):
        bootstrap_mean([1.0, np.nan])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])


def test_median_ratio_by_hand() -> None:
    found = median_ratio([1.0, 2.0, 1.0], [4.0, 6.0, 2.0])  # 4, 3, 2 times as fast
    assert (found.value, found.low, found.high) == (3, 2, 4)
    one = median_ratio([1.0], [2.0])
    assert (one.value, one.low, one.high) == (2, 0, np.inf)


def test_median_ratio_cancels_slow_rounds() -> None:
    load = DRAW.uniform(1, 10, size=30)  # another program slows whole rounds
    found = median_ratio(0.1 * load, 0.4 * load * DRAW.normal(1, 0.01, size=30))
    assert found.low > 3.95
    assert found.high < 4.05
