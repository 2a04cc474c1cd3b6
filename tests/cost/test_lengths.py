"""Counts at many lengths, from few, against all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.cost.lengths import FEW, at_lengths

LENGTHS = st.lists(st.integers(1, 300), unique=True, max_size=80).map(sorted)
FACTORS = st.integers(0, 10**9)


@given(LENGTHS, FACTORS, FACTORS, FACTORS)
def test_a_quadratic_needs_five_counts(lengths: list[int], a: int, b: int, c: int) -> None:
    asked = []

    def count(length: int) -> int:
        asked.append(length)
        return a + b * length + c * length**2

    assert at_lengths(count, lengths) == [a + b * n + c * n**2 for n in lengths]
    assert len(asked) == len(set(asked)) <= FEW


@given(LENGTHS, st.integers(2, 64), FACTORS, FACTORS)
def test_steps_are_seen(lengths: list[int], chunk: int, step: int, slope: int) -> None:
    def count(length: int) -> int:
        return -(-length // chunk) * step + slope * length**2

    assert at_lengths(count, lengths) == [count(n) for n in lengths]


@pytest.mark.parametrize("longest", [257, 256, 130])
def test_steps_as_regular_as_the_places_that_are_counted(longest: int) -> None:
    lengths = list(range(1, longest + 1))
    assert at_lengths(lambda n: (n + 63) // 64, lengths) == [(n + 63) // 64 for n in lengths]
