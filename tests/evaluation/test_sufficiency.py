from __future__ import annotations

import numpy as np
import pytest

from depthprobe.evaluation.statistics import bootstrap_ratio
from depthprobe.evaluation.sufficiency import Sufficiency, sufficient_depth


def world(
    keeps: dict[tuple[str, int], float],
    *,
    users: int = 4000,
    noise: float = 0.05,
    seed: int = 0,
    seeds: int = 1,
) -> tuple[dict[tuple[str, int], np.ndarray], np.ndarray]:
    """A teacher, and candidates that keep a share of its mean, give or take noise by user."""
    draw = np.random.default_rng(seed)
    teacher = draw.gamma(2.0, 0.5, size=(seeds, users))
    return {
        name: teacher * (share + draw.normal(0, noise, size=(seeds, users)))
        for name, share in keeps.items()
    }, teacher


def solve(keeps: dict[tuple[str, int], float], **options: float) -> Sufficiency:
    return sufficient_depth(*world(keeps, **options))  # type: ignore[arg-type]


def test_smallest_that_is_shown() -> None:
    keeps = {
        ("finetune", 8): 1.0,
        ("finetune", 4): 0.999,
        ("distill", 4): 1.001,
        ("finetune", 2): 0.95,
        ("distill", 2): 0.98,
        ("early-exit", 7): 0.5,
    }
    found = solve(keeps)
    assert (found.method, found.depth) == ("distill", 4)  # of two at a depth the better
    assert found.users_needed is None
    assert found.users == 4000
    assert [(row.depth, row.method) for row in found.rows] == [
        (2, "distill"), (2, "finetune"), (4, "distill"), (4, "finetune"), (7, "early-exit"),
        (8, "finetune"),
    ]  # fmt: skip
    for row in found.rows:
        share = keeps[row.method, row.depth]
        assert row.kept.low < share < row.kept.high
        assert row.shown == (share > 0.99)
        assert row.shown == (row.lower >= 0.99)
        assert row.lower < row.kept.low  # six candidates: beyond 2.5 %


def test_rows_agree_with_the_ratio() -> None:
    candidates, teacher = world({("a", 1): 0.97, ("b", 2): 1.0}, users=500)
    found = sufficient_depth(candidates, teacher, resamples=1000)
    for row in found.rows:
        assert row.kept == bootstrap_ratio(candidates[row.method, row.depth], teacher, seed=0)


def test_none_is_shown() -> None:
    found = solve({("finetune", 1): 0.8, ("finetune", 2): 0.9})
    assert (found.method, found.depth, found.users_needed, found.undecided) == (None,) * 4


def test_the_margin_decides() -> None:
    candidates, teacher = world({("finetune", 1): 0.96})
    assert sufficient_depth(candidates, teacher, margin=0.05).depth == 1
    assert sufficient_depth(candidates, teacher, margin=0.03).depth is None


def test_users_needed_would_decide() -> None:
    """Undecided at 400 users; at the number asked for, about one half of the worlds decide."""
    found = solve({("distill", 2): 0.995, ("distill", 4): 1.0}, users=400, noise=0.1, seed=4)
    assert found.depth in (None, 4)
    assert found.undecided is not None
    assert found.users_needed is not None
    # by hand: z(97.5 %) * se(users) = gap, for the row that is undecided
    row = next(row for row in found.rows if (row.method, row.depth) == found.undecided)
    spread = (row.kept.high - row.kept.low) / (2 * 1.96)
    expected = 400 * (1.96 * spread / (row.kept.value - 0.99)) ** 2
    assert found.users_needed == pytest.approx(expected, rel=0.15)
    same, teacher = world(
        {("distill", 2): 0.995, ("distill", 4): 1.0}, users=400, noise=0.1, seed=4
    )
    times = int(np.ceil(1.2 * found.users_needed / 400))
    more = {name: np.tile(values, times) for name, values in same.items()}
    again = sufficient_depth(more, np.tile(teacher, times))
    assert next(r for r in again.rows if (r.method, r.depth) == found.undecided).shown


def test_only_shallower_candidates_are_asked_about() -> None:
    candidates, teacher = world({("a", 2): 1.0}, noise=0.02)
    rough, _ = world({("b", 4): 0.995}, noise=1.0, seed=0)
    found = sufficient_depth({**candidates, **rough}, teacher)
    assert found.depth == 2
    assert found.users_needed is None


def test_more_users_do_not_help_against_seeds() -> None:
    draw = np.random.default_rng(0)
    teacher = draw.gamma(2.0, 0.5, size=(4, 2000))
    shaky = teacher * np.array([[0.9], [1.1], [0.95], [1.07]])  # by seed and not by user
    found = sufficient_depth({("finetune", 1): shaky}, teacher)
    assert found.rows[0].kept.value > 0.99
    assert found.depth is None
    assert found.users_needed is None


def test_wrong_claims_are_rare() -> None:
    """Ten candidates, all just outside the margin: one is claimed in at most 5 % of the worlds."""
    wrong = 0
    for seed in range(200):
        keeps = {("finetune", depth): 0.99 for depth in range(1, 11)}
        candidates, teacher = world(keeps, users=300, seed=seed)
        wrong += sufficient_depth(candidates, teacher, resamples=200).depth is not None
    assert wrong <= 200 * 0.05 + 2.5 * (200 * 0.05 * 0.95) ** 0.5


def test_bad_input_is_refused() -> None:
    values = np.ones((1, 5))
    with pytest.raises(ValueError, match="reference's mean is 0, expected a number above 0"):
        sufficient_depth({("a", 1): values}, np.zeros((1, 5)))
    with pytest.raises(ValueError, match="one shape"):
        sufficient_depth({("a", 1): values}, np.ones((2, 5)))
    with pytest.raises(ValueError, match="margin is 1"):
        sufficient_depth({("a", 1): values}, values, margin=1.0)
    with pytest.raises(ValueError, match="NaN"):
        sufficient_depth({("a", 1): values * np.nan}, values)


def test_no_candidates_and_few_users() -> None:
    assert sufficient_depth({}, np.ones((1, 5))).rows == ()
    lone = sufficient_depth({("a", 1): [1.0]}, [1.0])
    assert lone.depth is None  # one user shows nothing
    assert lone.rows[0].lower == -np.inf


@pytest.mark.parametrize("seed", range(6))
def test_users_needed_are_more_than_have_not_sufficed(seed: int) -> None:
    """Just short of the margin the number is derived from the bound that fell short."""
    candidates, teacher = world({("heal", 1): 1.0}, users=300, noise=0.1, seed=seed, seeds=3)
    first = sufficient_depth(candidates, teacher).rows[0]
    margin = 1 - first.lower - 1e-6  # the bound lies a millionth below the floor
    found = sufficient_depth(candidates, teacher, margin=margin)
    assert not found.rows[0].shown
    assert found.users_needed in (301, 302)
    wider = sufficient_depth(
        candidates, teacher, margin=margin - 0.1 * (first.kept.value - 1 + margin)
    )
    assert wider.users_needed is None or wider.users_needed > 330
