"""Numbers as a report prints them."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import pytest

from depthprobe.evaluation.statistics import Interval
from depthprobe.methods import METHODS
from depthprobe.report.drawing import figure_style
from depthprobe.report.style import (
    accuracy,
    bounds,
    count,
    method_info,
    percent,
    round_count,
    significant,
    times_faster,
)

STYLES = {name: method_info(name) for name, method in METHODS.items() if not method.table}


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


def test_methods_differ_in_marker_and_colour() -> None:
    # skip is never in a figure of these
    lines = [s for m, s in STYLES.items() if m != "skip"]
    assert len({s.marker for s in lines}) == len(lines)
    assert len({s.colour for s in lines}) == len(lines)
    assert method_info("elastic").label == "elastic"


@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
def test_colours_stand_out_from_paper(style: Any) -> None:
    red, green, blue = matplotlib.colors.to_rgb(style.colour)

    def linear(channel: float) -> float:
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    luminance = 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)
    assert 1.05 / (luminance + 0.05) >= 3  # WCAG 2.2, 1.4.11, against white


def test_the_style_leaves_no_trace() -> None:
    before = dict(matplotlib.rcParams)
    with figure_style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert dict(matplotlib.rcParams) == before
