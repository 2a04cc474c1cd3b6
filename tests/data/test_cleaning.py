"""The k-core against a naive loop, the other rules against dictionaries, every step counted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprobe.data.cleaning import Step, clean, k_core, newest, once, some
from depthprobe.errors import BadInput
from depthprobe.study import Cleaning

PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60)


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """By user, as the rules want it; the order within a user stays."""
    rows = np.array(sorted(pairs, key=lambda pair: pair[0]))
    return rows[:, 0], rows[:, 1]


def naive_core(pairs: list[tuple[int, int]], k: int) -> list[tuple[int, int]]:
    """One user or item at a time goes, whichever is met first, until nobody has to."""
    left = list(pairs)
    while True:
        users, items = (Counter(column) for column in zip(*left, strict=True)) if left else ({}, {})
        weak = next((("u", u) for u, n in users.items() if n < k), None) or next(
            (("i", i) for i, n in items.items() if n < k), None
        )
        if weak is None:
            return left
        place = 0 if weak[0] == "u" else 1
        left = [pair for pair in left if pair[place] != weak[1]]


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.integers(1, 5))
def test_k_core_is_the_naive_loops(pairs: list[tuple[int, int]], k: int) -> None:
    users, items = columns(pairs)
    keep = k_core(users, items, k)
    left = list(zip(users[keep].tolist(), items[keep].tolist(), strict=True))
    assert sorted(left) == sorted(naive_core(pairs, k))


def test_k_core_goes_on_after_the_first_round() -> None:
    """A chain in which each removal makes the next: filtering once would leave most of it."""
    chain = [(k, k) for k in range(9)] + [(k, k + 1) for k in range(9)]
    users, items = columns([*chain, (20, 30), (20, 31), (21, 30), (21, 31)])
    keep = k_core(users, items, 2)
    assert sorted(users[keep].tolist()) == [20, 20, 21, 21]


@given(PAIRS)
def test_once_is_a_dictionarys(pairs: list[tuple[int, int]]) -> None:
    users, items = columns(pairs)
    rows = list(enumerate(zip(users.tolist(), items.tolist(), strict=True)))
    first = {pair: row for row, pair in reversed(rows)}
    assert np.flatnonzero(once(users, items)).tolist() == sorted(first.values())
    last = {pair: row for row, pair in rows}
    assert np.flatnonzero(once(users, items, last=True)).tolist() == sorted(last.values())


@given(PAIRS, st.integers(1, 6))
def test_newest_is_a_slice(pairs: list[tuple[int, int]], count: int) -> None:
    users, _ = columns(pairs)
    expected = [
        row for user in set(users.tolist()) for row in np.flatnonzero(users == user)[-count:]
    ]
    assert np.flatnonzero(newest(users, count)).tolist() == sorted(expected)


@given(PAIRS, st.integers(1, 9))
def test_some_users_stay_whole_and_more_hold_fewer(
    pairs: list[tuple[int, int]], count: int
) -> None:
    users, _ = columns(pairs)
    kept = set(users[some(users, count)].tolist())
    assert len(kept) == min(count, len(set(users.tolist())))
    assert some(users, count).tolist() == [user in kept for user in users.tolist()]
    assert kept <= set(users[some(users, count + 1)].tolist())


def test_steps_are_counted_in_order() -> None:
    users = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    items = np.array([0, 1, 1, 2, 0, 1, 3, 0, 1, 2])
    ratings = np.array([5, 5, 4, 1, 3, 4, 3, 5, 3, 2.9])
    rules = Cleaning(min_rating=3, repeats="last", latest=2, core=2, users=1)
    keep, steps = clean(users, items, ratings, rules)
    assert steps == (
        Step("as read", 10, 3, 4),
        Step("rating 3 or more", 8, 3, 3),  # u0: 0 1 1, u1: 0 1 3, u2: 0 1
        Step("last of a repeat", 7, 3, 3),  # u0: 0 1
        Step("latest 2 of a user", 6, 3, 3),  # u1: 1 3
        Step("2-core", 4, 2, 2),  # 3 goes, then u1
        Step("1 users at most", 2, 1, 2),
    )
    assert np.flatnonzero(keep).tolist() in ([0, 2], [7, 8])
    assert clean(users, items, ratings, Cleaning())[1] == (Step("as read", 10, 3, 4),)


def test_nothing_left_names_the_rule() -> None:
    users, items = columns([(0, 0), (0, 1), (1, 0)])
    with pytest.raises(BadInput, match=r"data\.cleaning: expected .* 3 interactions, got '9-core'"):
        clean(users, items, None, Cleaning(core=9))
    with pytest.raises(BadInput, match="a log that has ratings"):
        clean(users, items, None, Cleaning(min_rating=1))
    with pytest.raises(BadInput, match="rating 6 or more"):
        clean(users, items, np.full(3, 5.0), Cleaning(min_rating=6))
