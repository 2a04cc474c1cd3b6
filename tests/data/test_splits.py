from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.prepared import order_log
from depthprobe.data.splits import Part, Split, leave_one_out, make_split
from depthprobe.data.storage import Sequences
from depthprobe.errors import BadInput
from depthprobe.study import Protocol

DAY = 86_400


def make(rows: list[list[int]], **columns: Any) -> Sequences:
    """One row a user; item k has the raw id k, so it is item k if 1..I are all there."""
    users = encode_ids(f"{user:04d}" for user, row in enumerate(rows) for _ in row)
    return order_log(Log(users, encode_ids(i for row in rows for i in row), **columns), ties="file")


ROWS = [[1, 2, 3, 4, 5], [2, 1], [3], [5, 4, 3], [1, 1, 2, 1]]


@pytest.fixture
def split() -> Split:
    return leave_one_out(make(ROWS))


def test_leave_one_out_by_hand(split: Split) -> None:
    assert split.validation.users.tolist() == split.test.users.tolist() == [0, 3, 4]
    assert split.targets("validation").tolist() == [4, 4, 2]
    assert split.targets("test").tolist() == [5, 3, 1]
    assert split.targets("test").dtype == np.int32
    assert [split.train_history(u, 9).tolist() for u in range(5)] == [
        [1, 2, 3],
        [2, 1],  # too short to be evaluated: all of it trains
        [3],
        [5],
        [1, 1],
    ]
    assert split.history("validation", 0, 2).tolist() == [2, 3]
    assert split.history("test", 0, 2).tolist() == [3, 4]
    assert split.history("test", 0, 0).tolist() == []
    assert split.history("test", 1, 99).tolist() == [5, 4]
    assert split.history("test", 2).tolist() == [1, 1, 2]
    assert split.train_history(0, 1).tolist() == [3]
    assert split.warnings == ("2 of 5 users train only: fewer than 3 interactions",)
    assert split.statistics == {
        "training_interactions": 9,
        "training_items": 4,
        "validation_users": 3,
        "test_users": 3,
        "cold_test_targets": 0,
        "repeated_test_targets": 1,
    }


def test_seen_items_are_left_out_where_targets_hardly_repeat() -> None:
    rows = [[user + 1, user + 2, user + 3, user + 4] for user in range(200)]
    few = make([*rows[:198], [1, 2, 3, 1], [4, 4, 4, 4]])
    many = make([*rows[:197], [1, 2, 3, 1], [4, 4, 4, 4], [5, 6, 7, 7]])
    for sequences, chosen, left_out in (
        (make(rows), "auto", True), (few, "auto", True), (many, "auto", False),
        (few, False, False), (many, True, True),
    ):  # fmt: skip
        split = make_split(sequences, Protocol(filter_seen=chosen))  # type: ignore[arg-type]
        assert split.filter_seen == left_out
        assert split.statistics["seen_items"] == ("left out" if left_out else "ranked too")
        said = " ".join(split.warnings)
        assert ("each is a miss" in said) == (left_out and "had before" in said)
        assert ("seen items stay in" in said) == (not left_out)


def test_targets_within_a_tie_are_counted() -> None:
    rows = [([1, 2, 3, 4], [0, 1, 5, 5]), ([1, 2, 4, 3], [0, 1, 1, 5]), ([2, 3, 1], [1, 2, 3])]
    split = leave_one_out(timed(rows))
    assert split.statistics["tied_test_targets"] == 1
    # under a temporal split the one after counts too
    later = timed([([1, 2, 3, 4], [0, 1, 8, 8]), ([2, 3, 4], [1, 2, 8]), ([1, 2, 3], [1, 5, 6])])
    protocol = Protocol(split="temporal", split_at=("1970-01-06", "1970-01-08"))
    assert make_split(later, protocol).statistics["tied_test_targets"] == 1


def test_cold_targets_are_counted_and_stay() -> None:
    split = leave_one_out(make([[1, 2, 3], [1, 2, 4], [1, 2, 1, 2]]))
    assert split.statistics["cold_test_targets"] == 2
    assert split.targets("test").tolist() == [3, 4, 2]
    assert split.warnings[0].startswith("2 of 3 test targets (67 %)")


TIMED = [
    ([1, 2, 3, 4], [0, 10, 20, 30]),
    ([2, 1, 2], [1, 2, 29]),  # nothing in validation
    ([3, 4], [12, 21]),  # no history before validation: cold there, known at the test
    ([4, 1], [22, 23]),  # only after the test begins: cold
    ([1, 2, 3], [3, 11, 13]),  # nothing in test
]


def timed(rows: list[tuple[list[int], list[int]]]) -> Sequences:
    times = np.array([time for _, row in rows for time in row]) * DAY
    return make([items for items, _ in rows], times=times)


def test_temporal_by_hand() -> None:
    split = make_split(
        timed(TIMED), Protocol(split="temporal", split_at=("1970-01-11", "1970-01-21"))
    )
    assert [split.train_history(user).tolist() for user in range(5)] == [[1], [2, 1], [], [], [1]]
    assert split.validation.users.tolist() == [0, 4]
    assert split.targets("validation").tolist() == [2, 2]
    assert [split.history("validation", q).tolist() for q in range(2)] == [[1], [1]]
    assert split.test.users.tolist() == [0, 1, 2]
    assert split.targets("test").tolist() == [3, 2, 4]
    assert [split.history("test", q).tolist() for q in range(3)] == [[1, 2], [2, 1], [3]]
    assert split.statistics == {
        "training_interactions": 4,
        "training_items": 2,
        "validation_users": 2,
        "test_users": 3,
        "cold_test_targets": 2,
        "repeated_test_targets": 1,
        "seen_items": "ranked too",
        "validation_begins": "1970-01-11",
        "test_begins": "1970-01-21",
        "cold_validation_users": 1,
        "cold_test_users": 1,
    }
    assert split.warnings[0] == "1 users begin after the test does: cold, not evaluated"
    quantiles = make_split(timed(TIMED), Protocol(split="temporal", split_at=("0.36", "0.64")))
    assert quantiles.statistics["test_begins"] == "1970-01-21"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_temporal_targets_are_those_of_a_loop(data: st.DataObject) -> None:
    rows = [
        (data.draw(st.lists(st.integers(1, 6), min_size=n, max_size=n)), sorted(times))
        for times in data.draw(
            st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=8), min_size=2, max_size=8)
        )
        for n in [len(times)]
    ]
    sequences = timed(rows)
    first, second = 10, 25
    try:
        split = make_split(
            sequences, Protocol(split="temporal", split_at=("1970-01-11", "1970-01-26"))
        )
    except BadInput:
        return
    ids = sequences.item_ids.astype(int)
    held_out: dict[Part, list[tuple[int, list[int], int]]] = {"validation": [], "test": []}
    bounds: list[tuple[Part, int, int]] = [("validation", first, second), ("test", second, 99)]
    for user, (items, times) in enumerate(rows):
        known = [item for item, time in zip(items, times, strict=True) if time < first]
        assert ids[split.train_history(user) - 1].tolist() == known
        for part, begin, end in bounds:
            before = [item for item, time in zip(items, times, strict=True) if time < begin]
            after = [i for i, t in zip(items, times, strict=True) if begin <= t < end]
            if before and after:
                held_out[part].append((user, before, after[0]))
    for part, expected in held_out.items():
        found = [
            (int(user), ids[split.history(part, q) - 1].tolist(), int(ids[target - 1]))
            for q, (user, target) in enumerate(
                zip(split.part(part).users, split.targets(part), strict=True)
            )
        ]
        assert found == expected


def test_given_keeps_the_parts_apart() -> None:
    rows = [[1, 2, 3, 4, 5], [2, 1, 4], [3, 1], [1, 2]]
    parts = np.array([0, 0, 1, 2, 2, 0, 1, 2, 0, 2, 2, 2], dtype=np.int8)
    # user 0 trains on something later than its test
    times = np.array([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 1, 2])
    sequences = make(rows, parts=parts, times=times)
    split = make_split(sequences, Protocol(split="given"))
    assert [split.train_history(user).tolist() for user in range(4)] == [[2, 1], [2], [3], []]
    assert split.validation.users.tolist() == [0, 1]
    assert split.targets("validation").tolist() == [3, 1]
    assert split.test.users.tolist() == [0, 1, 2]
    assert split.targets("test").tolist() == [4, 4, 1]
    assert split.history("test", 0).tolist() == [2, 1, 3]
    warnings = " | ".join(split.warnings)
    assert "2 test interactions are not evaluated" in warnings
    assert "1 users are in the test file alone" in warnings
    assert "1 users train on interactions later than their test" in warnings


def test_parts_whose_users_are_all_others() -> None:
    sequences = make(
        [[1, 2, 3], [1, 2], [3], [4]], parts=np.array([0, 0, 1, 0, 1, 2, 2], dtype=np.int8)
    )
    with pytest.raises(BadInput, match="test item .its 2 users are in no file before"):
        make_split(sequences, Protocol(split="given"))


PROTOCOLS = [
    Protocol(),
    Protocol(split="temporal", split_at=("0.5", "0.75")),
    Protocol(split="given"),
]


def marked(protocol: Protocol) -> Split:
    """A log in which every held-out interaction is a marker item that nobody has anywhere else."""
    draw = np.random.default_rng(0)
    n_users, length = 60, 8
    times = np.tile(np.arange(length), n_users) * DAY
    rows = draw.integers(1, 40, size=(n_users, length))
    rows[:20] = np.arange(1, 41).reshape(20, 2).repeat(4, axis=1)  # every item is there
    begins = {"leave-one-out": (length - 2, length - 1), "temporal": (4, 6), "given": (4, 6)}
    first, second = begins[protocol.split]
    rows[:, first:second] = 1000
    rows[:, second:] = 5000
    parts = np.tile(np.digitize(np.arange(length), [first, second]), n_users).astype(np.int8)
    sequences = make(rows.tolist(), times=times, parts=parts)
    return make_split(sequences, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.split)
def test_no_held_out_interaction_reaches_training(protocol: Protocol) -> None:
    split = marked(protocol)
    ids = split.sequences.item_ids.astype(int)
    trained = [ids[split.train_history(user) - 1] for user in range(60)]
    assert sum(map(len, trained)) == split.statistics["training_interactions"] > 200
    assert not {1000, 5000} & set(np.concatenate(trained).tolist())
    assert set(ids[split.targets("validation") - 1].tolist()) == {1000}
    assert set(ids[split.targets("test") - 1].tolist()) == {5000}
    for q in range(60):
        assert not {1000, 5000} & set(ids[split.history("validation", q) - 1].tolist())
        assert 5000 not in ids[split.history("test", q) - 1]


def test_users_too_short_to_split() -> None:
    with pytest.raises(BadInput, match="no user has 3 interactions, .*: the most are 2$"):
        leave_one_out(make([[1, 2], [3]]))


@pytest.mark.parametrize(
    ("points", "fault"),
    [
        (("0.9", "0.8"), "validation before test"),
        (("0.5", "0.5"), "validation before test"),
        (("yesterday", "0.8"), "expected a date as .*, got 'yesterday'"),
        (("0.5", "1.5"), "between 0 and 1"),
        (("٠.٥", "0.8"), "expected a date as .*, got '٠.٥'"),
        (("0.5_0", "0.8"), "expected a date as .*, got '0.5_0'"),
        (
            ("2030-01-01", "2031-01-01"),
            r"known users between them and after them \(the log: 1970-01-\d\d to 1970-",
        ),
        (("1960-01-01", "1970-01-15"), "known users between them"),
    ],
)
def test_bad_points(points: tuple[str, str], fault: str) -> None:
    with pytest.raises(BadInput, match=fault) as caught:
        make_split(timed(TIMED), Protocol(split="temporal", split_at=points))
    assert caught.value.field == "protocol.split_at"


def test_a_split_that_the_log_does_not_allow() -> None:
    with pytest.raises(BadInput, match="a log with times"):
        make_split(make(ROWS), Protocol(split="temporal"))
    with pytest.raises(BadInput, match="training, validation and test files"):
        make_split(make(ROWS), Protocol(split="given"))
    with pytest.raises(BadInput, match="two training items"):
        leave_one_out(make([[1, 2, 3], [1, 2, 3]]))
    with pytest.raises(BadInput, match="split_at"):
        Protocol(split="temporal", split_at=("0.8",))
