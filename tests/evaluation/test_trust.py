from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from depthprobe.evaluation.trust import correlations, reliability, trust

COLUMNS = ["spearman", "spearman_low", "kendall", "kendall_low"]


def world(
    damage: np.ndarray, *, noise: float, users: int = 301, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A reference (U,) and outcomes (U, M) whose damages are these, give or take noise by user."""
    draw = np.random.default_rng(seed)
    reference = draw.gamma(2.0, 0.5, size=users)
    lost = damage + draw.normal(0, noise, size=(users, len(damage)))
    return reference, reference[:, None] - lost


@given(st.data())
def test_agrees_with_scipy(data: st.DataObject) -> None:
    candidates = data.draw(st.integers(3, 8))
    # few values: many ties
    row = st.lists(st.integers(-2, 2).map(float), min_size=candidates, max_size=candidates)
    score = data.draw(row)
    damage = data.draw(st.lists(row, min_size=1, max_size=4))
    spearman, kendall = correlations(score, damage)
    for place, values in enumerate(damage):
        if len(set(score)) == 1 or len(set(values)) == 1:
            assert np.isnan(spearman[place])
            assert np.isnan(kendall[place])
        else:
            assert spearman[place] == pytest.approx(spearmanr(score, values)[0], abs=1e-12)
            assert kendall[place] == pytest.approx(kendalltau(score, values)[0], abs=1e-12)


def test_infinities_are_values_and_nan_is_none() -> None:
    damage = [[0, 1, np.inf, np.inf], [0, 1, np.nan, 2], [0, 1, 2, 3]]
    spearman, kendall = correlations([-np.inf, 1, 2, 3], damage)
    assert spearman[0] == pytest.approx(spearmanr([0, 1, 2, 3], [0, 1, 2, 2])[0])
    assert kendall[0] == pytest.approx(kendalltau([0, 1, 2, 3], [0, 1, 2, 2])[0])
    assert np.isnan([spearman[1], kendall[1]]).all()
    assert (spearman[2], kendall[2]) == pytest.approx((1, 1))


def test_equal_candidates_stay_tied_in_every_resample() -> None:
    """A rounding that told them apart would lower some resamples' tau-b."""
    damage = np.array([0.0, 1.0, 2.0, 3.0])
    reference, outcomes = world(damage, noise=0.01)
    outcomes = outcomes[:, [0, 1, 2, 3, 1, 1]]
    found = trust({"tied": damage[[0, 1, 2, 3, 1, 1]]}, reference, outcomes)
    np.testing.assert_allclose(found.loc[0, COLUMNS].astype(float), 1)


def test_agrees_with_a_plain_bootstrap() -> None:
    draw = np.random.default_rng(3)
    damage = draw.normal(size=8)
    reference, outcomes = world(damage, noise=6.0)
    score = damage + draw.normal(size=8)
    drawn = []
    for _ in range(1000):
        users = draw.integers(301, size=301)
        lost = (reference[users, None] - outcomes[users]).mean(axis=0)
        drawn.append((spearmanr(score, lost)[0], kendalltau(score, lost)[0]))
    found = trust({"score": score}, reference, outcomes, resamples=2000).iloc[0]
    lost = (reference[:, None] - outcomes).mean(axis=0)
    assert found.spearman == pytest.approx(spearmanr(score, lost)[0])
    assert found.kendall == pytest.approx(kendalltau(score, lost)[0])
    low = np.quantile(drawn, 0.05, axis=0)
    # the values are few: one step of rho or tau apart at most
    assert (found.spearman_low, found.kendall_low) == pytest.approx(tuple(low), abs=0.08)
    assert found.spearman_low < found.spearman


@pytest.mark.parametrize("noise", [1.0, 10.0])
def test_lower_bounds_hold_where_damages_are_far_apart_and_where_they_are_not(noise: float) -> None:
    """Of 200 worlds: standard errors of a tenth of the damages' spread, and as large as it."""
    below = np.zeros(2)
    for seed in range(200):
        draw = np.random.default_rng(seed)
        damage = draw.normal(size=10)
        score = damage + draw.normal(size=10)
        truth = np.array([spearmanr(score, damage)[0], kendalltau(score, damage)[0]]) + 1e-12
        reference, outcomes = world(damage, noise=noise, users=100, seed=seed)
        row = trust({"score": score}, reference, outcomes, resamples=200).iloc[0]
        below += np.array([row.spearman_low, row.kendall_low]) <= truth
    assert (below >= 0.93 * 200).all(), below


def test_more_users_raise_the_bound_and_the_seed_counts() -> None:
    damage = np.linspace(0, 1, 10)
    score = {"score": damage + np.random.default_rng(0).normal(0, 0.2, size=10)}

    def reach(users: int) -> float:
        row = trust(score, *world(damage, noise=3.0, users=users)).iloc[0]
        return float(row.kendall - row.kendall_low)

    assert reach(3000) < 0.7 * reach(300)
    few = world(damage, noise=3.0)
    one, two = trust(score, *few, seed=1), trust(score, *few, seed=2)
    assert one.equals(trust(score, *few, seed=1))
    assert not one.equals(two)
    reversed_score = {"score": -score["score"]}
    assert trust(reversed_score, *few).iloc[0].kendall_low == -1  # not above 0: nothing is known


def test_scores_share_the_draws_and_do_not_touch_each_other() -> None:
    damage = np.linspace(0, 1, 6)
    few = world(damage, noise=3.0)
    rough = np.array([1.0, 0.0, 2.0, 2.0, 1.0, 3.0])
    both = trust({"a": damage, "b": rough, "again": 2 * damage}, *few)
    assert both.loc[[0], COLUMNS].equals(trust({"a": damage}, *few)[COLUMNS])
    assert both.loc[0, COLUMNS].equals(both.loc[2, COLUMNS].rename(0))


def test_what_says_nothing_is_nan() -> None:
    damage = np.array([0.0, 1.0, 2.0])
    reference, outcomes = world(damage, noise=0.1)
    found = trust({"bad": [0, np.nan, 1], "good": damage}, reference, outcomes)
    assert found.loc[0, COLUMNS].isna().all()
    assert found.loc[1, COLUMNS].notna().all()
    for candidates in (1, 2):
        few = trust({"few": damage[:candidates]}, reference, outcomes[:, :candidates])
        assert few.loc[0, "candidates"] == candidates
        assert few.loc[0, COLUMNS].isna().all()
    alike = trust({"score": damage}, reference, np.repeat(reference[:, None], 3, axis=1))
    assert alike.loc[0, COLUMNS].isna().all()
    assert trust({}, reference, outcomes).columns.tolist() == found.columns.tolist()


def test_bounds_where_users_say_nothing() -> None:
    damage = np.array([0.0, 1.0, 2.0])
    one = trust({"score": damage}, [1.0], 1 - damage[None]).loc[0]
    assert one[COLUMNS].tolist() == [1, -1, 1, -1]
    # one of 20 users is touched: a third of the resamples miss it, and have no correlation
    reference, outcomes = np.ones(20), np.ones((20, 3))
    outcomes[7] -= damage
    rare = trust({"score": damage}, reference, outcomes).loc[0]
    assert rare[COLUMNS].tolist() == [1, -1, 1, -1]


def naive_reliability(losses: np.ndarray, *, splits: int, seed: int) -> float:
    """Split by split, with means and scipy; a half without an order counts as 0."""
    draw, users = np.random.default_rng(seed), len(losses)
    found = []
    for _ in range(splits):
        order = draw.permutation(users)
        one, other = (losses[half].mean(axis=0) for half in np.split(order, [users // 2]))
        flat = len(set(one)) == 1 or len(set(other)) == 1
        found.append(0.0 if flat else spearmanr(one, other)[0])
    half = np.mean(found)
    return float(max(0, 2 * half / (1 + half)))


@pytest.mark.parametrize("users", [2, 41])
def test_reliability_agrees_with_a_loop_over_splits(users: int) -> None:
    draw = np.random.default_rng(users)
    # quarters: sums are exact in the naive loop too, and there are many ties
    losses = np.array([0, 0, 1, 2, 3]) + draw.integers(-6, 7, size=(users, 5)) / 4
    found = reliability(losses, splits=2000)
    assert 0 < found < 1
    assert found == pytest.approx(naive_reliability(losses, splits=800, seed=1), abs=0.06)


def test_reliability_of_noise_is_near_0_and_of_clear_damages_near_1() -> None:
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(200, 300))
    assert reliability(noise) < 0.15
    assert reliability(noise + np.linspace(0, 50, 300)) > 0.99
    assert reliability(0.01 * noise[:, :4] + np.arange(4)) == 1
    # what one half says is the opposite of the other's: not below 0
    assert reliability([[0, 1, 2], [2, 1, 0], [0, 0, 0.5]]) == 0


@pytest.mark.parametrize("linear", [0.2, 0.5, 0.8])
def test_a_known_reliability_is_found_and_its_root_is_the_highest_correlation(
    linear: float,
) -> None:
    """Normal damages and noise: rho is ``6 / pi * asin(r / 2)`` of the linear correlation r."""
    draw = np.random.default_rng(0)
    users, damage = 200, draw.normal(size=1500)
    spread = np.sqrt(users * (1 / linear - 1))
    losses = damage + draw.normal(0, spread, size=(users, 1500))
    found = reliability(losses, splits=20)
    half = 6 / np.pi * np.arcsin(linear / (2 - linear) / 2)
    assert found == pytest.approx(2 * half / (1 + half), abs=0.05)
    assert found == pytest.approx(linear, abs=0.06)
    truth = correlations(damage, losses.mean(axis=0)[None])[0][0]  # of the best score that is
    assert truth == pytest.approx(np.sqrt(found), abs=0.04)


def test_equal_damages_stay_tied_in_each_half() -> None:
    """Sums in floating point, or one half as the rest of all, would tell them apart by rounding."""
    draw = np.random.default_rng(0)
    losses = np.zeros((301, 7))
    losses[:, 3:] = draw.choice([0.1, 0.3, 0.7], size=(301, 1)) + [[0, 0, 1, 1]]
    for order in (np.arange(7), draw.permutation(7)):
        assert reliability(losses[:, order]) == 1
        assert reliability(losses[:, order] * 1e-300) == 1
    # where no user of a half is touched, its damages are 0 and not nearly so
    rare = np.zeros((30, 4))
    rare[:3, 1:] = [[0.1, 0.2, 0.7], [0.3, 0.2, 0.4], [0.9, 0.8, 0.7]]
    expected = naive_reliability(rare, splits=800, seed=1)
    assert reliability(rare, splits=2000) == pytest.approx(expected, abs=0.06)


def test_reliability_does_not_depend_on_the_unit() -> None:
    losses = np.arange(5) + np.random.default_rng(0).normal(0, 9, size=(101, 5))
    whole = reliability(losses)
    assert reliability(losses * 2.0**-40) == whole
    assert reliability(losses, seed=1) != whole


def test_where_a_reliability_says_nothing() -> None:
    draw = np.random.default_rng(0)
    assert np.isnan(reliability(draw.normal(size=(1, 5))))
    assert np.isnan(reliability(draw.normal(size=(50, 2))))
    assert np.isnan(reliability(np.ones((50, 5))))
    # all rests on one user: the other half has no order, whatever the split
    rare = np.zeros((20, 3))
    rare[7] = [0, 1, 2]
    assert reliability(rare) == 0


def test_trust_says_how_reliable_the_damages_are() -> None:
    damage = np.linspace(0, 1, 6)
    few = world(damage, noise=8.0)
    found = trust({"a": damage, "flat": np.ones(6)}, *few, resamples=10)
    expected = reliability(few[0][:, None] - few[1])
    assert 0 < expected < 1
    assert found["reliability"].tolist() == [expected] * 2
    assert found.columns.tolist().index("reliability") == 3
    later = trust({"a": damage}, *few, resamples=10, seed=3).loc[0, "reliability"]
    assert later == reliability(few[0][:, None] - few[1], seed=3)
    none = trust({"a": damage[:2]}, few[0], few[1][:, :2], resamples=10)
    assert none["reliability"].isna().all()


def test_values_that_are_no_numbers_are_refused() -> None:
    reference, outcomes = world(np.arange(3.0), noise=0.1)
    with pytest.raises(ValueError, match="NaN"):
        trust({"cka": [1, 2, 3]}, reference * np.nan, outcomes)
