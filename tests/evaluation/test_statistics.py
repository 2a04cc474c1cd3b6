"""Intervals against hand-worked tables, scipy, and worlds in which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from depthprobe.evaluation.statistics import (
    Spread,
    difference_interval,
    interaction_interval,
    mean_interval,
    mean_intervals,
    median_ratio,
    ratio_interval,
    spread,
    standard_error,
)

DRAW = np.random.default_rng(0)
REFERENCE = DRAW.gamma(1.0, 1.0, size=(3, 200))
CANDIDATE = 0.9 * REFERENCE + DRAW.normal(0, 0.3, size=(3, 200))


def test_values_by_hand() -> None:
    candidate, reference = [1.0, 0.0, 0.5], [1.0, 1.0, 0.0]
    assert ratio_interval(candidate, reference).value == pytest.approx(0.75)
    assert difference_interval(candidate, reference).value == pytest.approx(-0.5 / 3)
    assert mean_interval(candidate).value == pytest.approx(0.5)


def test_a_table_of_two_seeds_and_three_users_by_hand() -> None:
    """Means by user 1, 2, 6 and by seed 2, 4; what is left is -1, 0, 1 and 1, 0, -1."""
    table = np.array([[-1.0, 1.0, 6.0], [3.0, 3.0, 6.0]])
    found = spread(table, table)
    assert found.users == pytest.approx(7 / 3)  # (4 + 1 + 9) / 2 / 3
    assert found.seeds == pytest.approx(2)  # (1 + 1) / 1
    assert found.noise == pytest.approx(4 / 2 / 3)  # left over, by its degrees and users
    error, df = standard_error(found, n_users=3, n_seeds=2)
    variance = 7 / 3 + (2 - 2 / 3) / 2
    assert error == pytest.approx(variance**0.5)
    assert df == pytest.approx(variance**2 / ((7 / 3) ** 2 / 2 + 1))
    reach = stats.t.ppf(0.975, df) * error
    found_mean = mean_interval(table)
    assert (found_mean.low, found_mean.high) == pytest.approx((3 - reach, 3 + reach))


def test_mean_squares_are_those_of_a_two_way_table() -> None:
    """``V = (MS_users + MS_seeds - MS_rest) / (S U)``, with the sums of squares written out."""
    n_seeds, n_users = CANDIDATE.shape
    grand = CANDIDATE.mean()
    users, seeds = CANDIDATE.mean(axis=0), CANDIDATE.mean(axis=1)
    left = CANDIDATE - users - seeds[:, None] + grand
    of_users = n_seeds * ((users - grand) ** 2).sum() / (n_users - 1)
    of_seeds = n_users * ((seeds - grand) ** 2).sum() / (n_seeds - 1)
    of_rest = (left**2).sum() / (n_users - 1) / (n_seeds - 1)
    error, _ = standard_error(spread(CANDIDATE, CANDIDATE), n_users=n_users, n_seeds=n_seeds)
    expected = of_users + max(0, of_seeds - of_rest)
    assert error**2 == pytest.approx(expected / n_seeds / n_users)


def test_one_seed_is_the_t_test_of_scipy() -> None:
    one, other = CANDIDATE[0], REFERENCE[0]
    paired = stats.ttest_rel(one, other).confidence_interval(0.9)
    found = difference_interval(one, other, level=0.9)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high))
    alone = stats.ttest_1samp(other, 0).confidence_interval(0.95)
    found = mean_interval(other)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
    table = np.stack([one, other], axis=1)
    assert mean_intervals(table)[1].low == pytest.approx(alone.low)


@pytest.mark.parametrize("rows", [1, 3])
def test_identical_arms_are_certain(rows: int) -> None:
    arm = REFERENCE[:rows]
    ratio, difference = ratio_interval(arm, arm), difference_interval(arm, arm)
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_pairing_cancels_what_both_arms_share() -> None:
    shifted = REFERENCE[0] - 0.1
    paired = difference_interval(shifted, REFERENCE[0])
    assert (paired.low, paired.high) == pytest.approx((-0.1, -0.1), abs=1e-12)
    apart = difference_interval(DRAW.permutation(shifted), REFERENCE[0])
    assert apart.high - apart.low > 0.1


def test_seeds_widen_the_interval() -> None:
    lucky = REFERENCE + np.array([[-0.5], [0.0], [0.5]])
    both, users = mean_interval(lucky), mean_interval(lucky.mean(axis=0))
    assert both.high - both.low > 5 * (users.high - users.low)
    # a lucky seed of both arms cancels in their difference
    assert difference_interval(lucky, lucky - 0.2).low == pytest.approx(0.2)
    error, df = standard_error(Spread(0.0, 9.0, 0.0), n_users=50, n_seeds=3)
    assert (error, df) == pytest.approx((3**0.5, 2))  # all from seeds: S - 1


def test_no_share_and_no_metric_goes_below_0() -> None:
    rare = np.zeros(50)
    rare[0] = 1
    assert mean_interval(rare).low == ratio_interval(rare, 1 - rare).low == 0
    assert mean_intervals(rare[:, None])[0].low == 0
    assert mean_interval(rare - 0.01).low < -0.01
    assert difference_interval(rare, 0 * rare).low < 0


@pytest.mark.parametrize("luck", [0.0, 0.1, 0.3])
def test_coverage_with_and_without_luck_of_seeds(luck: float) -> None:
    """Three seeds; luck is 0, 1 and 3 times what users add with one seed."""
    draw = np.random.default_rng(11)
    worlds, covered = 800, np.zeros(3)
    for _ in range(worlds):
        reference = draw.gamma(2.0, 0.5, size=200) * np.ones((3, 1))  # mean 1
        candidate = 0.8 * reference + draw.exponential(0.1, size=(3, 200))  # mean 0.9
        candidate += luck * 0.7 * draw.normal(size=(3, 1))
        reference = reference + luck * 0.7 * draw.normal(size=(3, 1))
        mean = mean_interval(reference)
        ratio = ratio_interval(candidate, reference)
        difference = difference_interval(candidate, reference)
        covered += [
            mean.low <= 1 <= mean.high,
            ratio.low <= 0.9 <= ratio.high,
            difference.low <= -0.1 <= difference.high,
        ]
    assert ((covered / worlds >= 0.915) & (covered / worlds <= 0.985)).all(), covered / worlds


def test_losses_that_add_up_have_no_interaction() -> None:
    one, other = REFERENCE - 0.2, REFERENCE * 0.9
    found = interaction_interval(one, other, one + other - REFERENCE, REFERENCE)
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)
    # of means 4, 3, 2 and, of both, 0: losses of 1 and 2 quarters, together of 4 and not 3
    by_hand = interaction_interval([3.0, 3.0], [2.0, 2.0], [0.0, 0.0], [4.0, 4.0])
    assert by_hand.value == pytest.approx(0.25)
    # other users, and not only these, may lose less by both: no bound at 0
    rare = np.zeros(50)
    rare[0] = 1
    assert interaction_interval(rare, 1 + 0 * rare, 0 * rare, 1 + 0 * rare).low < 0


def test_an_interaction_is_the_ratio_of_its_contrast() -> None:
    """The same as :func:`ratio_interval` of the contrast of the four arms."""
    draw = np.random.default_rng(2)
    one, other, both = (CANDIDATE - draw.gamma(1, size=(3, 200)) for _ in range(3))
    found = interaction_interval(one, other, both, REFERENCE)
    expected = ratio_interval((one - both) + (other - REFERENCE), REFERENCE)
    assert found == expected
    with pytest.raises(ValueError, match="mean is 0"):
        interaction_interval(one, other, both, 0 * REFERENCE)


@pytest.mark.parametrize("truth", [0.0, 0.05])
@pytest.mark.parametrize("luck", [0.0, 0.03])
def test_coverage_of_an_interaction(truth: float, luck: float) -> None:
    """Three seeds; an arm shares the luck of the one it is made of, and may have its own."""
    draw, worlds, covered = np.random.default_rng(17), 800, 0
    for _ in range(worlds):
        shared = 0.1 * draw.normal(size=(2, 3, 1))  # of the teacher and of the shallow model
        own = luck * draw.normal(size=(4, 3, 1))
        teacher = draw.gamma(2.0, 0.5, size=200) + shared[0]  # mean 1
        shallow = 0.9 * teacher - shared[0] + shared[1] + draw.normal(0, 0.1, size=(3, 200))
        lost = draw.exponential(0.02, size=(2, 3, 200))
        more = truth * draw.gamma(1.0, 1.0, size=200)
        arms = (shallow, teacher - lost[0], shallow - lost[1] - more, teacher)
        found = interaction_interval(*(arm + each for arm, each in zip(arms, own, strict=True)))
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / worlds <= 0.99, covered / worlds


def test_median_of_rounds_lies_between_order_statistics() -> None:
    seconds = np.arange(1.0, 16.0)
    found = median_ratio(np.ones(15), DRAW.permutation(seconds))
    # P(Bin(15, 1/2) <= 3) = 1.8 %: the fourth from below and from above
    assert (found.value, found.low, found.high) == (8, 4, 12)
    few = median_ratio([1.0, 1.0], [2.0, 4.0])
    assert (few.value, few.low, few.high) == (3, 0, np.inf)


def test_bad_values_are_refused() -> None:
    for values in ([], [[]], [1.0, np.nan], [np.inf], np.ones((2, 2, 2))):
        with pytest.raises(ValueError, match="expected|NaN"):
            mean_interval(values)
    with pytest.raises(ValueError, match="one shape"):
        difference_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="mean is 0"):
        ratio_interval([1.0, 2.0], [0.0, 0.0])


def test_one_user_says_nothing_about_others() -> None:
    for found in (mean_interval([0.5]), mean_interval([[0.5], [0.7]]), *mean_intervals([[0.5]])):
        assert (found.low, found.high) == (-np.inf, np.inf)
