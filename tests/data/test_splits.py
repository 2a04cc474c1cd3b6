from __future__ import annotations

import numpy as np
import pytest

from depthprobe.data.log import Log
from depthprobe.data.prepared import order_log
from depthprobe.data.splits import Split, leave_one_out
from depthprobe.data.storage import Sequences
from depthprobe.study import BadInput


def make(rows: list[list[int]]) -> Sequences:
    """Item k has the raw id k, so it is item k if 1..I are all there."""
    users = [f"{user:04d}" for user, row in enumerate(rows) for _ in row]
    return order_log(Log(np.array(users), np.array([str(i) for row in rows for i in row])))


ROWS = [[1, 2, 3, 4, 5], [2, 1], [3], [5, 4, 3], [1, 1, 2, 1]]


@pytest.fixture
def split() -> Split:
    return leave_one_out(make(ROWS))


def test_hand_worked(split: Split) -> None:
    assert split.users.tolist() == [0, 3, 4]
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
    assert split.history("test", 3, 99).tolist() == [5, 4]
    assert split.train_history(0, 1).tolist() == [3]
    assert split.seen("validation", 0).tolist() == [1, 2, 3]
    assert split.seen("test", 4).tolist() == [1, 1, 2]


def test_each_user_is_cut_without_gap_or_overlap(split: Split) -> None:
    for place, user in enumerate(split.users):
        parts = [
            split.train_history(user).tolist(),
            [split.targets("validation")[place]],
            [split.targets("test")[place]],
        ]
        assert sum(parts, []) == ROWS[user]
        assert split.history("validation", user).tolist() == parts[0]
        assert split.history("test", user).tolist() == parts[0] + parts[1]


def test_test_targets_never_train() -> None:
    """Each user's last item is a marker that nobody has anywhere else; likewise the one before."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 12, size=200)
    rows = [draw.integers(1, 100, size=n).tolist() for n in lengths]
    rows = [[*row, 1000 + u, 2000 + u] for u, row in enumerate(rows)]
    sequences = make(rows)
    split = leave_one_out(sequences)
    number = {int(raw): place + 1 for place, raw in enumerate(sequences.item_ids.tolist())}
    tests = {number[2000 + user] for user in range(200)}
    validations = {number[1000 + user] for user in range(200)}
    trained = {i for user in range(200) for i in split.train_history(user, 50).tolist()}
    assert len(trained) > 50
    assert not trained & (tests | validations)
    stopped = {
        i
        for user in range(200)
        for i in sequences.items[sequences.offsets[user] : split.train_stop[user]].tolist()
    }
    assert stopped == trained
    assert set(split.targets("test").tolist()) == tests
    for user in split.users:
        assert not set(split.history("validation", user).tolist()) & (tests | validations)
        assert not set(split.history("test", user).tolist()) & tests
        assert not set(split.seen("test", user).tolist()) & tests


def test_bad_questions(split: Split) -> None:
    with pytest.raises(ValueError, match="expected one of validation, test"):
        split.targets("train")
    with pytest.raises(ValueError, match="user 1 has fewer than 3"):
        split.history("test", 1)
    with pytest.raises(ValueError, match="max_history is -1"):
        split.train_history(0, -1)
    with pytest.raises(BadInput, match="3 interactions"):
        leave_one_out(make([[1, 2], [3]]))
