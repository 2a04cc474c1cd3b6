"""Slices of users by hand, and their means against means over each slice alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.prepared import order_log
from depthprobe.data.splits import leave_one_out, temporal
from depthprobe.evaluation.slices import (
    FEWEST,
    GROUPS,
    Family,
    by_label,
    by_length,
    families,
    popularity_groups,
    slice_means,
)
from depthprobe.evaluation.statistics import mean_intervals
from depthprobe.study import Protocol


def test_histories_by_length() -> None:
    found = by_length(np.array([1, 2, 3, 4, 5, 8, 9, 16, 17, 1]))
    assert found.labels == ("1", "2", "3-4", "5-8", "9-16", "17-32")
    assert found.codes.tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 0]
    # bins that nobody is in are no slices
    assert by_length(np.array([2, 9, 9])).slices == ["history:2", "history:9-16"]


@pytest.mark.parametrize(
    ("popularity", "groups"),
    [
        # 10 of 50 are 20 %: the first two hold 12; the last ten items hold 10
        ([6, 6, *[4] * 7, *[1] * 10, 0], "hh" + "m" * 7 + "t" * 10 + "c"),
        ([5, 5, 5, 5], "mmmm"),  # nothing sets them apart
        ([90, 5, 5], "htt"),  # the head alone holds more than 20 %, the tail less
        ([1, 1, 8], "tth"),
        ([9, 3, 3, 3, 3, 1], "httttt"),  # one 3 is needed, and the others stay with it
        ([30, 2, 1, 1], "httt"),  # 2 is needed for the last 20 %
        ([10, 70, 10], "tht"),
        ([3, 0, 0], "mcc"),
        ([0, 0], "cc"),
        ([4, 60, 4, 5], "thtt"),
    ],
)
def test_head_middle_and_tail_by_hand(popularity: list[int], groups: str) -> None:
    found = popularity_groups(np.array(popularity))
    assert "".join(GROUPS[place][0] for place in found) == groups


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_groups_agree_with_their_definition(popularity: list[int]) -> None:
    """The head holds 20 % at least, and less without its last level; the tail likewise."""
    counts = np.array(popularity)
    found, total = popularity_groups(counts), sum(popularity)
    assert ((found == 3) == (counts == 0)).all()
    for place, turn in ((0, -1), (2, 1)):
        own = np.unique(counts[found == place])[::turn]  # the level that was added last comes last
        if len(own) > 1:
            held = counts[found == place].sum()
            assert held - counts[counts == own[-1]].sum() < 0.2 * total
    levels = len(set(popularity) - {0})
    assert set(found.tolist()) >= ({0, 2} if levels > 1 else set())
    ranked = found[np.argsort(-counts, kind="stable")]
    assert (np.diff(ranked) >= 0).all()  # from the head down, none out of turn


def test_families_of_a_split_by_hand() -> None:
    rows = {"a": "xyxz", "b": "xxyq", "c": "yzxyxx", "d": "pz"}
    users = [user for user, row in rows.items() for _ in row]
    log = order_log(Log(encode_ids(users), encode_ids("".join(rows.values()))))
    history, target = families(leave_one_out(log))
    assert history.slices == ["history:3-4", "history:5-8"]
    assert history.codes.tolist() == [0, 0, 1]
    # training: a xy, b xx, c yzxy, d pz; so x 4, y 3, z 2, p 1, q 0; p and z hold 30 %, p 10 %
    assert target.slices == ["target:head", "target:tail", "target:cold"]
    assert [target.labels[code] for code in target.codes] == ["tail", "cold", "head"]


def test_cold_targets_of_a_temporal_split() -> None:
    users = ["a"] * 4 + ["b"] * 4
    items = ["x", "y", "x", "new"] + ["x", "x", "y", "x"]
    times = np.array([0, 1, 6, 9, 0, 1, 6, 9])
    log = order_log(Log(encode_ids(users), encode_ids(items), times=times))
    points = ("1970-01-01T00:00:05", "1970-01-01T00:00:08")
    split = temporal(log, Protocol(split="temporal", split_at=points))
    _, target = families(split)
    assert [target.labels[code] for code in target.codes] == ["cold", "head"]
    assert (
        int((target.codes == target.labels.index("cold")).sum())
        == (split.statistics["cold_test_targets"])
    )


DRAW = np.random.default_rng(0)
VALUES = DRAW.random((300, 4))
CUTS = [
    Family("one", ("a", "b", "c"), DRAW.choice(3, 300, p=[0.6, 0.35, 0.05])),
    Family("two", ("x", "y"), DRAW.integers(2, size=300)),
]


def test_slices_agree_with_each_slice_alone() -> None:
    found = slice_means(VALUES, CUTS, level=0.9)
    assert list(found) == ["all", "one:a", "one:b", "one:c", "two:x", "two:y"]
    parts = {
        name: family.codes == code for family in CUTS for code, name in enumerate(family.slices)
    }
    for name, inside in {"all": np.ones(300, bool), **parts}.items():
        users, (value, low, high) = found[name]
        assert users == inside.sum()
        if users < FEWEST:
            np.testing.assert_allclose(value, VALUES[inside].mean(axis=0), rtol=0, atol=1e-12)
            assert np.isnan([low, high]).all()
            continue
        expected = [[i.value, i.low, i.high] for i in mean_intervals(VALUES[inside], level=0.9)]
        np.testing.assert_allclose(np.transpose([value, low, high]), expected, rtol=0, atol=1e-12)
    assert found["one:c"][0] < FEWEST


def test_slices_whose_users_are_alike_have_no_bounds() -> None:
    """No hit among fifty users does not mean that there is never one."""
    hits = np.zeros((100, 1))
    hits[:20] = 1
    found = slice_means(hits, [Family("cut", ("a", "b"), np.arange(100) // 50)])
    assert found["cut:a"][1][0] == [0.4]
    assert not np.isnan(found["cut:a"][1]).any()
    assert found["cut:b"][1][0] == [0]
    assert np.isnan(found["cut:b"][1][1:]).all()


def test_one_user_and_no_cuts() -> None:
    users, (value, low, high) = slice_means(np.array([[0.5, 1.0]]), [])["all"]
    assert (users, value.tolist()) == (1, [0.5, 1.0])
    assert (low == -np.inf).all()
    assert (high == np.inf).all()


def test_own_labels_are_the_most_frequent_and_the_rest() -> None:
    few = by_label("brand", ["b", "a", "b", "", "other", "unknown"])
    assert few.labels == ("b", "a", "other", "unknown")
    assert few.codes.tolist() == [0, 1, 0, 3, 2, 3]
    many = [str(place) for place in range(12) for _ in range(20 - place)]
    found = by_label("brand", many)
    assert found.labels == (*map(str, range(8)), "other")
    assert np.bincount(found.codes).tolist() == [*range(20, 12, -1), 12 + 11 + 10 + 9]
