"""What is recommended, against naive computations, and the top lists against whole sorts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.prepared import order_log
from depthprobe.data.splits import Split, leave_one_out, temporal
from depthprobe.evaluation.metrics import (
    TrainingPopularity,
    coverage,
    exposure,
    gini,
    list_metrics,
    popularity_ratio,
    training_popularity,
)
from depthprobe.evaluation.ranks import best_in_blocks, top_lists
from depthprobe.models.recommender import best_columns
from depthprobe.study import Protocol

INF = float("inf")


@given(
    width=st.integers(1, 700),
    k=st.integers(1, 12),
    kinds=st.integers(1, 400),
    seed=st.integers(0, 99),
)
@settings(max_examples=200)
def test_blocks_give_what_a_stable_sort_gives(width: int, k: int, kinds: int, seed: int) -> None:
    """Few kinds of scores tie within blocks, across them, and across the last place."""
    k = min(k, width)
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, kinds, (5, width), generator=draw).float()
    scores[torch.rand(5, width, generator=draw) < 0.1] = -INF
    scores[0] = -INF
    columns, values = best_in_blocks(scores, k)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k])
    # among equal scores of -inf past the end there is no column; all others are the stable ones
    kept = values > -INF
    assert torch.equal(columns[kept], expected.indices[:, :k][kept])
    assert (columns < width)[kept].all()


@pytest.mark.parametrize("width", [20_000, 20_001, 20_127])
def test_blocks_of_a_large_catalogue(width: int) -> None:
    scores = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    scores[:, -1] = 9.0  # in the block that is not whole
    columns, values = best_in_blocks(scores, 10)
    expected = best_columns(scores, 10)
    assert torch.equal(columns, expected[0])
    assert torch.equal(values, expected[1])
    assert (columns[:, 0] == width - 1).all()


def test_top_lists_end_where_nothing_is_left() -> None:
    scores = torch.tensor([[1.0, 3.0, -INF], [-INF, -INF, -INF], [2.0, 2.0, 2.0]])
    assert top_lists(scores, 2).tolist() == [[2, 1], [0, 0], [1, 2]]
    assert top_lists(scores, 5).tolist() == [[2, 1, 0, 0, 0], [0] * 5, [1, 2, 3, 0, 0]]


LISTS = np.array([[1, 2, 3], [1, 2, 0], [1, 5, 3], [1, 0, 0]])  # of six items
COUNTS = [4, 2, 2, 0, 1, 0]


def test_by_hand() -> None:
    counts = exposure(LISTS, 6)
    assert counts.tolist() == COUNTS
    assert coverage(counts) == 4 / 6
    # ascending 0 0 1 2 2 4 with weights -5 -3 -1 1 3 5: 27 / (6 * 9)
    assert gini(counts) == pytest.approx(27 / 54, abs=1e-15)
    # popularity 10, 5, 1, 1, 2, 0: (40 + 10 + 2 + 2) / 9 = 6, and users took 4 on average
    taken = TrainingPopularity(np.array([10, 5, 1, 1, 2, 0]), usual=4.0)
    assert popularity_ratio(counts, taken) == pytest.approx(1.5, abs=1e-15)
    assert list_metrics(counts, taken) == {
        "coverage@10": 4 / 6,
        "gini@10": pytest.approx(0.5),
        "popularity@10": pytest.approx(1.5),
    }


def test_ends_of_the_scales() -> None:
    assert gini(np.full(50, 3)) == pytest.approx(0, abs=1e-15)
    alone = np.zeros(50, dtype=int)
    alone[7] = 9
    assert gini(alone) == pytest.approx(1 - 1 / 50, abs=1e-15)
    assert coverage(alone) == 1 / 50


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(any))
def test_gini_is_half_the_relative_mean_difference(counts: list[int]) -> None:
    pairs = [abs(a - b) for a, b in itertools.product(counts, repeat=2)]
    mean = sum(counts) / len(counts)
    expected = sum(pairs) / len(pairs) / 2 / mean
    assert gini(np.array(counts)) == pytest.approx(expected, abs=1e-12)


def make_split(*, users: int = 40) -> Split:
    draw = np.random.default_rng(0)
    rows = [(25 * draw.random(draw.integers(3, 9)) ** 2).astype(int) for _ in range(users)]
    owner = np.repeat(np.arange(users), [len(row) for row in rows])
    items = [f"{item:02d}" for item in np.concatenate(rows)]
    return leave_one_out(order_log(Log(encode_ids(owner), encode_ids(items))))


def test_what_was_taken_agrees_with_loops() -> None:
    split = make_split()
    found, sequences = training_popularity(split), split.sequences
    popularity = dict.fromkeys(range(1, sequences.n_items + 1), 0)
    for user in range(sequences.n_users):
        for item in split.train_history(user).tolist():
            popularity[item] += 1
    assert found.popularity.tolist() == list(popularity.values())
    means = []
    for user in split.test.users.tolist():
        own = split.train_history(user).tolist()
        means.append(sum(popularity[item] for item in own) / len(own))
    assert found.usual == pytest.approx(sum(means) / len(means), abs=1e-12)


def test_the_ratio_is_that_of_mean_popularities() -> None:
    split = make_split()
    taken = training_popularity(split)
    draw = np.random.default_rng(1)
    lists = np.stack([draw.permutation(split.sequences.n_items)[:10] + 1 for _ in range(30)])
    shown = np.mean([[taken.popularity[item - 1] for item in row] for row in lists])
    found = popularity_ratio(exposure(lists, split.sequences.n_items), taken)
    assert found == pytest.approx(shown / taken.usual, abs=1e-12)


def test_users_without_training_do_not_count() -> None:
    """Under the temporal split a user may have begun after training ended."""
    users = ["a"] * 4 + ["b"] * 3 + ["c"] * 2
    items = ["x", "y", "z", "x"] + ["x", "y", "z"] + ["x", "y"]
    times = np.array([0, 1, 5, 9, 6, 7, 9, 0, 1])
    log = order_log(Log(encode_ids(users), encode_ids(items), times=times))
    split = temporal(
        log, Protocol(split="temporal", split_at=("1970-01-01T00:00:05", "1970-01-01T00:00:08"))
    )
    assert split.test.users.tolist() == [0, 1]
    taken = training_popularity(split)  # a and c train on x, y; b on nothing
    assert taken.popularity.tolist() == [2, 2, 0]
    assert taken.usual == 2
    nobody = TrainingPopularity(taken.popularity, math.nan)
    assert list_metrics(np.array([1, 0, 0]), nobody).keys() == {"coverage@10", "gini@10"}


def test_nothing_recommended_is_refused_or_empty() -> None:
    taken = TrainingPopularity(np.ones(3), 1.0)
    nothing = exposure(np.zeros((4, 10), np.int32), 3)
    assert list_metrics(nothing, taken) == {}
    for function in (coverage, gini):
        with pytest.raises(ValueError, match="of some recommended item"):
            function(nothing)
    with pytest.raises(ValueError, match="expected above 0"):
        popularity_ratio(np.ones(3), TrainingPopularity(np.ones(3), math.nan))
