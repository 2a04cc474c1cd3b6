from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.evaluation.metrics import overlap, rank_biased_overlap

Lists = tuple[list[list[int]], list[list[int]]]


def naive_overlap(a: list[int], b: list[int]) -> float:
    first, second = set(a) - {0}, set(b) - {0}
    longer = max(len(first), len(second))
    return len(first & second) / longer if longer else 1.0


def naive_rbo(a: list[int], b: list[int], p: float) -> float:
    """Equation 30 as it is printed."""
    first, second = ([item for item in each if item] for each in (a, b))
    k = len(first)
    if not k:
        return 1.0
    shared = [len(set(first[:d]) & set(second[:d])) for d in range(1, k + 1)]
    series = sum(x / d * p**d for d, x in enumerate(shared, start=1))
    return shared[-1] / k * p**k + (1 - p) / p * series


@st.composite
def two_lists(draw: st.DrawFn, *, equal_lengths: bool = True) -> Lists:
    """Rows of two lists over few items, so that they share many, with 0s at the end."""
    k = draw(st.integers(1, 6))

    def one(length: int) -> list[int]:
        items = draw(st.permutations(range(1, 9)))[:length]
        return [*items, *[0] * (k - length)]

    a, b = [], []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(0, k))
        a.append(one(length))
        b.append(one(length if equal_lengths else draw(st.integers(0, k))))
    return a, b


@given(two_lists(equal_lengths=False))
def test_overlap_agrees_with_sets(lists: Lists) -> None:
    a, b = lists
    found = overlap(a, b)
    assert found.tolist() == [naive_overlap(*rows) for rows in zip(a, b, strict=True)]
    assert np.array_equal(found, overlap(b, a))


@given(two_lists(), st.floats(0.01, 0.99))
def test_rbo_agrees_with_a_loop(lists: Lists, p: float) -> None:
    a, b = lists
    found = rank_biased_overlap(a, b, p)
    expected = [naive_rbo(*rows, p) for rows in zip(a, b, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert np.array_equal(found, rank_biased_overlap(b, a, p))
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_allclose(rank_biased_overlap(a, a, p), 1, rtol=0, atol=1e-12)


@given(two_lists(), st.floats(0.01, 0.99))
def test_nothing_shared(lists: Lists, p: float) -> None:
    a, b = (np.array(each) for each in lists)
    apart = np.where(b > 0, b + 100, 0)
    empty = (b == 0).all(axis=1)
    assert np.array_equal(overlap(a, apart), empty)
    assert np.array_equal(rank_biased_overlap(a, apart, p), empty)


def test_rbo_by_hand() -> None:
    """[1 2 3] and [2 1 4] at p = 1/2: shared 0, 2, 2, so agreement 0, 1, 2/3.

    ``2/3 / 8 + 1 * (0 / 2 + 1 / 4 + 2/3 / 8) = 1/12 + 1/4 + 1/12 = 5/12``
    """
    assert rank_biased_overlap([1, 2, 3], [2, 1, 4], 0.5) == pytest.approx(5 / 12, abs=1e-15)
    # the last items exchanged cost least, the first most
    whole = [1, 2, 3, 4]
    costs = [
        1 - float(rank_biased_overlap(whole, other))
        for other in ([1, 2, 4, 3], [1, 3, 2, 4], [2, 1, 3, 4])
    ]
    assert costs == pytest.approx([0.1 * 0.81 / 3, 0.1 * 0.9 / 2, 0.1], abs=1e-12)


def test_overlap_by_hand() -> None:
    a = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    b = [[4, 3, 2, 1], [1, 5, 6, 7], [1, 2, 4, 0], [1, 2, 3, 4], [0, 0, 0, 0]]
    assert overlap(a, b).tolist() == [1, 0.25, 2 / 3, 0.25, 1]


def test_leading_dimensions_are_broadcast() -> None:
    rng = np.random.default_rng(0)
    lists = np.stack([rng.permutation(20)[:10] + 1 for _ in range(24)]).reshape(4, 6, 10)
    for function in (overlap, rank_biased_overlap):
        found = function(lists, lists[:, -1:])
        assert found.shape == (4, 6)
        for row, expected in zip(lists, found, strict=True):
            for each, value in zip(row, expected, strict=True):
                assert function(each, row[-1]) == value
        assert (found[:, -1] > 1 - 1e-12).all()
        assert (found[:, :-1] < 1).all()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([[1, 2]], [[1, 2, 3]], "one K, got"),
        (1, 1, "one K, got"),
        ([[]], [[]], "one K, got"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "expected integers"),
        ([[1, 1]], [[1, 2]], "twice"),
        ([[1, 2]], [[0, 2]], "follows a 0"),
        ([[1, 2]] * 2, [[1, 2]] * 3, "shape mismatch"),
    ],
)
def test_bad_lists_are_refused(a: object, b: object, message: str) -> None:
    for function in (overlap, rank_biased_overlap):
        with pytest.raises(ValueError, match=message):
            function(a, b)


def test_rbo_refuses_what_it_is_not_for() -> None:
    with pytest.raises(ValueError, match="equal length"):
        rank_biased_overlap([[1, 2]], [[1, 0]])
    for p in (0, 1, 90):
        with pytest.raises(ValueError, match=f"p is {p}"):
            rank_biased_overlap([[1, 2]], [[1, 2]], p)
