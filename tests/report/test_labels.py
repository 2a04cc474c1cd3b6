"""Labels that don't cover each other."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from depthprobe.report.drawing import label_points, label_right, spread


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_spread_keeps_order_and_distance(wanted: list[float]) -> None:
    places = spread(sorted(wanted), 0.06)
    assert all(b - a >= 0.06 - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9


def test_spread_leaves_what_is_far_apart() -> None:
    assert spread([0.1, 0.5, 0.9], 0.06) == pytest.approx([0.1, 0.5, 0.9])


def test_spread_puts_a_crowd_around_its_mean() -> None:
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])


def test_point_labels_cover_neither_bars_nor_each_other() -> None:
    ax = Figure(figsize=(4, 3)).add_subplot()
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    points = [(0.3 + 0.02 * i, 0.5 + 0.03 * i) for i in range(5)]
    label_points(ax, [(x, y, str(i)) for i, (x, y) in enumerate(points)],
                 avoid=[(x, y - 0.1, y + 0.1) for x, y in points])  # fmt: skip
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) >= 2
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for x, y in points:
        centre = ax.transData.transform((x, y))
        assert not any(box.contains(*centre) for box in boxes)


def test_long_names_stay_inside_the_figure() -> None:
    figure = Figure(figsize=(4.7, 3.7))
    figure.subplots_adjust(right=0.78)
    ax = figure.add_subplot()
    label_right(ax, [(None, 0.2, "distilled: cos-norm-long", "k"), (0.9, 0.6, "teacher", "k")])
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in ax.texts)
    assert ax.get_position().x1 < 0.7
    both = Figure(figsize=(9.4, 3.7)).subplots(1, 2)
    place = both[0].get_position().x1
    label_right(both[0], [(None, 0.2, "distilled: cos-norm-long", "k")])
    assert both[0].get_position().x1 == place
