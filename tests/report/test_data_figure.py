"""The figure of a log: the panels it has data for, and that they show the log's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.dates import date2num, num2date

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.prepared import order_log
from depthprobe.data.statistics import length_bins, popularity, top_shares
from depthprobe.data.storage import Sequences
from depthprobe.errors import BadInput
from depthprobe.report.data_figure import data_figure, save_data_figure
from depthprobe.study import Protocol

DAY = 86_400
LENGTHS = (1, 3, 4, 5, 9, 16)


def make(*, times: bool = True) -> Sequences:
    """Users of the given lengths, one interaction a day each, all from the first day."""
    users = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    days = np.concatenate([np.arange(length) for length in LENGTHS])
    return order_log(
        Log(
            users=encode_ids(users.tolist()),
            items=encode_ids(days.tolist()),
            times=days * DAY if times else None,
        )
    )


def test_a_log_without_times_has_two_panels_and_no_empty_one() -> None:
    assert [ax.get_title(loc="left") for ax in data_figure(make()).axes] == [
        "Users by length of history", "Interactions of each item", "Interactions over time"
    ]  # fmt: skip
    assert len(data_figure(make(times=False)).axes) == 2


def test_panels_show_the_numbers() -> None:
    sequences = make()
    lengths, items, times = data_figure(sequences).axes
    assert [bar.get_height() for bar in lengths.patches] == [1, 0, 2, 1, 2]
    assert items.lines[0].get_ydata().tolist() == sorted(popularity(sequences), reverse=True)
    training, held_out = (patch.get_data() for patch in times.patches)
    # leave-one-out: two of each user with three or more
    assert training.values.sum() == sum(LENGTHS) - 2 * 5
    assert held_out.values.sum() == sum(LENGTHS)  # it stands on what trains
    assert np.array_equal(held_out.baseline, training.values)


@pytest.mark.parametrize(
    ("counts", "scale"), [((12, 11), "linear"), ((90, 2), "linear"), ((100, 10), "log")]
)
def test_counts_of_items_have_numbers_beside_them(counts: tuple[int, int], scale: str) -> None:
    items = np.repeat(["a", "b"], counts).tolist()
    log = Log(users=encode_ids(list(range(len(items)))), items=encode_ids(items))
    ax = data_figure(order_log(log)).axes[1]
    assert ax.get_yscale() == scale
    low, high = ax.get_ylim()
    assert sum(low <= tick <= high for tick in ax.get_yticks()) >= 2


def test_a_temporal_split_marks_its_points() -> None:
    protocol = Protocol(split="temporal", split_at=("1970-01-04", "1970-01-05"))
    times = data_figure(make(), protocol).axes[2]
    marked = [num2date(date2num(line.get_xdata()[0])).day for line in times.lines]
    assert marked == [4, 5]
    assert [text.get_text().strip() for text in times.texts] == ["validation", "test"]


def test_what_can_t_be_split_as_asked_is_refused_and_else_drawn_without() -> None:
    short = order_log(Log(users=encode_ids("ab"), items=encode_ids("xy"), times=np.array([1, 2])))
    times = data_figure(short).axes[2]
    assert times.get_legend() is None
    with pytest.raises(BadInput, match="3 interactions"):
        data_figure(short, Protocol())


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_log_gives_the_same_bytes(tmp_path: Path, ending: str) -> None:
    paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
    for path in paths:
        assert save_data_figure(make(), path) == path
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_length_bins_by_hand() -> None:
    assert length_bins(np.array(LENGTHS)) == [(1, 1, 1), (2, 2, 0), (3, 4, 2), (5, 8, 1),
                                              (9, 16, 2)]  # fmt: skip
    assert length_bins(np.array([2**20, 2**20 + 1])) == [
        (2**19 + 1, 2**20, 1), (2**20 + 1, 2**21, 1)
    ]  # fmt: skip


def test_top_shares_by_hand() -> None:
    taken = np.array([1] * 90 + [10] * 9 + [20])  # 200 interactions
    assert top_shares(taken) == [
        (1, 1, 0.1), (5, 5, 0.3), (10, 10, 0.55), (25, 25, 0.625), (50, 50, 0.75)
    ]  # fmt: skip
    assert [count for _, count, _ in top_shares(np.ones(3))] == [1, 1, 1, 1, 2]
