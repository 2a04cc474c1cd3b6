from __future__ import annotations

import numpy as np
import pytest

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.prepared import Ties, order_log
from depthprobe.data.statistics import NO_TIMES, as_date, quantiles
from depthprobe.data.storage import Sequences

DAY = 86_400


def make(rows: list[list[int]], times: np.ndarray | None = None, ties: Ties = "file") -> Sequences:
    users = encode_ids(user for user, row in enumerate(rows) for _ in row)
    items = encode_ids(str(item) for row in rows for item in row)
    return order_log(Log(users, items, times=times), ties=ties)


def random_rows(seed: int = 0, n_items: int = 300) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.permutation(n_items)[: draw.integers(4, 12)].tolist() for _ in range(80)]


def said(sequences: Sequences) -> str:
    return " | ".join(sequences.warnings)


def test_by_hand() -> None:
    times = np.array([0, 1, 1, 5, 2.5, 9, 9.5]) * DAY
    found = make([[1, 2, 1, 3], [2, 2, 2]], times).statistics
    assert found == {
        "users": 2,
        "items": 3,
        "interactions": 7,
        "mean_length": 3.5,
        "median_length": 3.5,
        "max_length": 4,
        "density": pytest.approx(7 / 6),
        "repeats": pytest.approx(3 / 7),
        "shared_times": pytest.approx(1 / 5),
        "ties": "as in the file",
        "first": "1970-01-01",
        "last": "1970-01-10",
    }
    assert "first" not in make([[1, 2], [2, 1]]).statistics


def test_quantiles() -> None:
    found = quantiles(np.arange(101))
    assert found == {
        "min": 0, "5 %": 5, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "max": 100,
    }  # fmt: skip


def test_dates() -> None:
    assert as_date(951_782_400) == "2000-02-29"
    assert as_date(1e30).endswith("s")


def test_no_times_alone_says_nothing_of_sorting() -> None:
    assert make(random_rows()).warnings == (NO_TIMES,)


@pytest.mark.parametrize("down", [False, True])
def test_sequences_sorted_by_id_are_found(down: bool) -> None:
    goes = "falls" if down else "rises"
    rows = [sorted(row, reverse=down) for row in random_rows()]
    whole = "the order may be that of ids, not of time"
    assert f"the item id {goes} in 100 % of the steps, by chance in about half: {whole}" in said(
        make(rows)
    )
    # ids that sort as texts do: 10 before 9
    rows = [sorted(row, key=str, reverse=down) for row in random_rows()]
    assert f"the text of the item id {goes} in 100 % of the steps" in said(make(rows))


@pytest.mark.parametrize("at_the_end", [False, True])
def test_padding_is_found(at_the_end: bool) -> None:
    rows = [[0] * (12 - len(row)) + [item + 1 for item in row] for row in random_rows()]
    rows = [row[::-1] if at_the_end else row for row in rows]
    assert "the item 0 follows itself" in said(make(rows))
    # an item like any other, taken twice in a row by somebody
    once = [[0, *(item + 1 for item in row)] for row in random_rows()]
    assert make([[0, *once[0]], *once[1:]]).warnings == (NO_TIMES,)
    assert "follows itself" not in said(make([[7, 7, 7, item] for item in range(60)]))


def test_a_mixture_of_two_orders_is_found() -> None:
    # a run of four is sorted, then comes another, as where times are those of a form
    rows = [sorted(row[:4]) + sorted(row[4:8]) for row in random_rows() if len(row) >= 8]
    found = said(make(rows))
    assert "a part of the order may be that of ids, not of time" in found
    assert "100%" not in found
    # seven steps tell nothing
    assert make([[1, 2, 3, 4], [1, 2, 3, 4, 5]]).warnings == (NO_TIMES,)


def test_day_level_times_are_found_and_their_ties_looked_at() -> None:
    rows = [sorted(row) for row in random_rows()]
    n = sum(map(len, rows))
    coarse = np.zeros(n, dtype=np.int64)
    assert "100 % of neighbours in a sequence have the same time" in said(make(rows, coarse))
    within = "within equal times, the item id rises in 100 % of the steps"
    assert within in said(make(rows, coarse))
    assert within in said(make(random_rows(), coarse, ties="item"))
    assert "their order is random, seed 0" in said(make(rows, coarse, ties="random"))
    assert "item id" not in said(make(rows, coarse, ties="random"))
    fine = np.arange(n)
    assert make(rows, fine).warnings == ()  # sorted by true times: ids that rise are no fault
    few = fine.copy()
    few[1] = few[0]
    assert make(rows, few).warnings == ()


def test_copies_are_counted() -> None:
    rows = random_rows()
    rows[3] = [7, 8, 7, 9, 7, 8]  # all at one time: three are copies
    rows[4] = [5, 5, 6, 6]  # at four times: none
    times = np.arange(sum(map(len, rows)))
    start = sum(map(len, rows[:3]))
    times[start : start + 6] = start
    told = "3 interactions repeat another one of the same user, item and time"
    assert make(rows, times, ties="random").warnings == (told,)
    assert told.replace("3", "5") in said(make(rows[3:5], np.zeros(10)))


def test_times_below_a_second_are_no_ties() -> None:
    rows = random_rows()
    n = sum(map(len, rows))
    sequences = make(rows, np.arange(n) / 1000)
    assert sequences.warnings == ()
    assert sequences.times is not None
    assert set(sequences.times.tolist()) == set(range(n // 1000 + 1))
