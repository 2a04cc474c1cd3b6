"""Numbers as people read them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.evaluation.statistics import Interval
from depthprobe.formatting import (
    accuracy,
    bounds,
    count,
    in_percent,
    part_percent,
    percent,
    plain_percent,
    round_count,
    rounded,
    significant,
    times,
    times_faster,
    with_bounds,
)

ANY = st.floats(width=64)
# what no page may hold: an exponent, a zero with a minus, and what is no number
WRONG = re.compile(r"e[+-]?\d|(?<!\d)-0(\.0*)?(?![.\d])|nan|inf", re.IGNORECASE)


@given(ANY, ANY, ANY)
def test_whatever_a_number_is_its_text_is_one(value: float, low: float, high: float) -> None:
    found = Interval(value, low, high)
    for text in (
        significant(value), rounded(value, 4), accuracy(value), percent(value, sign=True),
        count(value), bounds(found, 1), in_percent(found, sign=True), with_bounds(found, sign=True),
        times(found),
    ):  # fmt: skip
        assert not WRONG.search(text), text


@given(st.integers(0, 10**7), st.integers(1, 10**7))
def test_only_all_is_a_hundred_per_cent_and_only_none_is_zero(part: int, whole: int) -> None:
    text = part_percent(min(part, whole) / whole)
    assert not WRONG.search(text)
    assert (text == "100 %") == (part >= whole)
    assert (text == "0 %") == (part == 0)


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.0, "0 %"), (0.12, "12 %"), (1 / 3000, "0.033 %"), (2999 / 3000, "99.967 %"),
     (0.04, "4 %"), (0.5, "50 %"), (1e-9, "0.0000001 %")],
)  # fmt: skip
def test_a_part_of_a_whole(share: float, text: str) -> None:
    assert part_percent(share) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.01, "1 %"), (1 - 0.07, "93 %"), (1e-7, "0.00001 %"), (0.9999999, "99.99999 %"),
     (0.123456789, "12.3456789 %"), (1.0, "100 %")],
)  # fmt: skip
def test_a_setting_has_the_digits_that_it_was_given(share: float, text: str) -> None:
    assert plain_percent(share) == text


def test_a_rounded_number_has_no_idle_zeros() -> None:
    values = (0.5, 12.34, 999.9, 9.999, 123_456.0, 0.00001, -0.0)
    assert [rounded(v) for v in values] == ["0.5", "12.3", "1,000", "10", "123,456", "0.00001", "0"]


def test_significant_digits_are_never_in_exponent_form() -> None:
    values = (0.048632, 12.345, 1240.4, 0.0, -3.14159, math.nan, 1e-5)
    texts = ["0.0486", "12.3", "1,240", "0", "-3.14", "–", "0.0000100"]
    assert [significant(value) for value in values] == texts


def test_counts_carry_their_unit() -> None:
    values = (812, 12_400, 6_631_000, 1.2e9, None)
    assert [count(value) for value in values] == ["812", "12.4 k", "6.63 M", "1.20 B", "–"]
    assert [round_count(value) for value in (0.5, 7, 20_000)] == ["0.5", "7", "20 k"]


def test_metrics_and_shares() -> None:
    assert accuracy(0.0486321) == "0.0486"
    assert accuracy(None) == "–"
    assert percent(0.9921) == "99.2 %"
    assert bounds(Interval(0.99, 0.981, 1.003), 1, scale=100) == "[98.1, 100.3]"
    assert bounds(Interval(0.05, math.nan, math.nan), 4) == ""
    # near zero an end still shows its side
    assert bounds(Interval(0.1, -0.00004, 0.0026), 4) == "[-0.00004, 0.0026]"
    assert bounds(Interval(-0.002, -0.0043, 0.000003), 4) == "[-0.0043, 0.000003]"
    assert bounds(Interval(0.0, -1e-12, 0.0), 4) == "[0.0000, 0.0000]"


def test_a_speed_is_said_only_as_far_as_its_interval_goes() -> None:
    assert times_faster(Interval(4.0, 3.9, 4.1)) == "4.0× faster [3.9, 4.1]"
    assert times_faster(Interval(0.5, 0.4, 0.8)) == "2.00× slower [1.25, 2.50]"
    assert times_faster(Interval(1.02, 0.99, 1.05)) == "about as fast [0.99, 1.05]"
    of_two_rounds = times_faster(Interval(2.5, 0.0, math.inf))
    assert of_two_rounds == "2.50× as fast [too few rounds]"
