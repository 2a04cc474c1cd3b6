"""Metrics of ranks against trec_eval and sklearn, of lists against plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import pytrec_eval
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.prepared import order_log
from depthprobe.data.splits import leave_one_out, temporal
from depthprobe.evaluation.metrics import (
    TrainingPopularity,
    check_metrics,
    exposure,
    gini,
    list_metrics,
    metrics_from_ranks,
    per_user_metric,
    training_popularity,
)
from depthprobe.evaluation.ranks import rank_targets
from depthprobe.study import Protocol

HALVES = st.lists(st.integers(2, 60).map(lambda twice: twice / 2), min_size=1, max_size=40)


def test_hand_worked() -> None:
    found = metrics_from_ranks([1, 2, 3, 7, 20, 1.5, 10.5])
    log3, log4, log8, log25 = math.log2(3), 2, 3, math.log2(2.5)
    assert found == pytest.approx(
        {
            "HR@1": 1 / 7,
            "HR@5": 4 / 7,
            "HR@10": 5 / 7,  # 10.5 is not within 10
            "NDCG@1": 1 / 7,
            "NDCG@5": (1 + 1 / log3 + 1 / log4 + 1 / log25) / 7,
            "NDCG@10": (1 + 1 / log3 + 1 / log4 + 1 / log8 + 1 / log25) / 7,
            "MRR": (1 + 1 / 2 + 1 / 3 + 1 / 7 + 1 / 20 + 1 / 1.5 + 1 / 10.5) / 7,
        },
        abs=1e-15,
    )


def test_other_cuts_and_kinds() -> None:
    ranks = [1.0, 4.0, 2.5]
    assert metrics_from_ranks(ranks, ks=[3]).keys() == {"HR@3", "NDCG@3", "MRR"}
    for same in (np.array(ranks), torch.tensor(ranks, requires_grad=True), tuple(ranks)):
        assert metrics_from_ranks(same) == metrics_from_ranks(ranks)


def test_agrees_with_trec_eval() -> None:
    draw = np.random.default_rng(0)
    scores = draw.permuted(np.tile(np.arange(200.0), (300, 1)), axis=1)  # no ties
    targets = draw.integers(200, size=300)
    relevant = {str(user): {str(item): 1} for user, item in enumerate(targets)}
    answered = {
        str(user): {str(item): score for item, score in enumerate(row.tolist())}
        for user, row in enumerate(scores)
    }
    measures = {"ndcg_cut.1,5,10", "success.1,5,10", "recip_rank"}
    per_user = list(pytrec_eval.RelevanceEvaluator(relevant, measures).evaluate(answered).values())
    names = {"NDCG@{}": "ndcg_cut_{}", "HR@{}": "success_{}"}
    expected = {
        own.format(k): np.mean([user[theirs.format(k)] for user in per_user])
        for own, theirs in names.items()
        for k in (1, 5, 10)
    } | {"MRR": np.mean([user["recip_rank"] for user in per_user])}
    assert metrics_from_ranks(rank_targets(scores, targets)) == pytest.approx(expected, abs=1e-12)


def test_agrees_with_sklearn_over_ties_within_a_list() -> None:
    """Ties that a cut does not part: sklearn's gain is that of the mean over orders, for hits."""
    draw = np.random.default_rng(0)
    scores = draw.integers(4, size=(200, 12)).astype(float)
    targets = draw.integers(12, size=200)
    ranks = rank_targets(scores, targets).numpy()
    for row, target, rank in zip(scores, targets, ranks, strict=True):
        places = [1 + (row > row[target]).sum(), (row >= row[target]).sum()]
        assert rank == np.mean(places)  # the middle of the places that the tied items share
        found = ndcg_score(np.eye(12)[[target]], row[None])
        own = np.mean([1 / np.log2(place + 1) for place in range(places[0], places[1] + 1)])
        assert found == pytest.approx(own, abs=1e-12)
        # the gain at the mean rank is below the mean of the gains: ties are never a way up
        assert per_user_metric([rank], "NDCG@12")[0] <= found + 1e-12


@given(HALVES)
def test_bounds_hold_for_all_ranks(ranks: list[float]) -> None:
    check_metrics(metrics_from_ranks(ranks, ks=(1, 2, 3, 5, 10)))
    check_metrics(metrics_from_ranks(ranks, ks=(5, 10)))  # without HR@1


def test_bounds_are_sharp() -> None:
    """One group of ranks at a bound's place reaches it."""
    for rank in (1.5, 5, 5.5):
        met = metrics_from_ranks([1, rank])
        check_metrics(met)
        moved = 0
        for name in ("NDCG@5", "MRR"):
            for step in (-1e-6, 1e-6):
                try:
                    check_metrics({**met, name: met[name] + step})
                except ValueError:
                    moved += 1
        assert moved >= 1, rank


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"HR@1": 0.5}, "HR@1 = 0.5 is above HR@5"),
        ({"NDCG@10": 0.1}, "NDCG@5 = 0.18 is above NDCG@10"),
        ({"NDCG@5": 0.27, "NDCG@10": 0.28}, r"NDCG@5 = 0\.27 is above"),
        ({"NDCG@10": 0.7, "HR@10": 1.2}, "HR@10 = 1.2 is above 1"),
        ({"MRR": 0.01}, r"is above MRR = 0\.01"),
        ({"MRR": 0.5}, r"MRR = 0\.5 is above"),
        ({"MRR": float("nan")}, "nan"),
        ({"HR@5": -0.1}, "0 is above HR@5|HR@1"),
    ],
)
def test_impossible_tables_are_refused(changed: dict[str, float], said: str) -> None:
    table = {"HR@1": 0.1, "HR@5": 0.3, "HR@10": 0.4, "NDCG@5": 0.18, "NDCG@10": 0.22, "MRR": 0.2}
    check_metrics(table)
    with pytest.raises(ValueError, match=said):
        check_metrics({**table, **changed})


def test_a_target_that_is_never_served_is_worth_nothing() -> None:
    for name in ("HR@1", "HR@100000", "NDCG@10", "MRR"):
        assert per_user_metric([math.inf, 1], name).tolist() == [0, 1]
        assert metrics_from_ranks([math.inf, 1], (1, 10, 100_000))[name] == 0.5


def test_bad_input_is_refused() -> None:
    for ranks, said in (
        ([1, 0.5], "rank 1 is 0.5"),
        ([math.nan], "rank 0"),
        ([-math.inf], "rank 0"),
    ):
        with pytest.raises(ValueError, match=said):
            metrics_from_ranks(ranks)
    with pytest.raises(ValueError, match="no ranks"):
        metrics_from_ranks([])
    with pytest.raises(ValueError, match="expected ranks"):
        metrics_from_ranks([[1, 2]])
    for name in ("HR", "HR@", "HR@0", "HR@-1", "MAP@5", "MRR@5", "HR@1.5"):
        with pytest.raises(ValueError, match="expected HR@K"):
            per_user_metric([1], name)
    with pytest.raises(ValueError, match="HR@0"):
        metrics_from_ranks([1], ks=(0,))


def test_list_metrics_by_hand() -> None:
    lists = np.array([[1, 2, 3], [1, 2, 0], [1, 5, 3], [1, 0, 0]])  # of six items
    counts = exposure(lists, 6)
    assert counts.tolist() == [4, 2, 2, 0, 1, 0]
    # popularity 10, 5, 1, 1, 2, 0: (40 + 10 + 2 + 2) / 9 = 6, and users chose 4 on average
    training = TrainingPopularity(np.array([10, 5, 1, 1, 2, 0]), usual=4.0)
    assert list_metrics(counts, training) == {
        "coverage@10": 4 / 6,
        # ascending 0 0 1 2 2 4 with weights -5 -3 -1 1 3 5: 27 / (6 * 9)
        "gini@10": pytest.approx(27 / 54, abs=1e-15),
        "popularity@10": pytest.approx(1.5, abs=1e-15),
    }
    assert list_metrics(np.zeros(6, int), training) == {}
    nobody = TrainingPopularity(training.popularity, math.nan)
    assert list_metrics(counts, nobody).keys() == {"coverage@10", "gini@10"}


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(any))
def test_gini_is_half_the_relative_mean_difference(counts: list[int]) -> None:
    pairs = [abs(a - b) for a, b in itertools.product(counts, repeat=2)]
    expected = sum(pairs) / len(pairs) / 2 / (sum(counts) / len(counts))
    assert gini(np.array(counts)) == pytest.approx(expected, abs=1e-12)
    assert gini(np.eye(50)[7]) == pytest.approx(1 - 1 / 50, abs=1e-15)  # the end of its scale


def test_training_popularity_agrees_with_loops() -> None:
    draw = np.random.default_rng(0)
    rows = [(25 * draw.random(draw.integers(3, 9)) ** 2).astype(int) for _ in range(40)]
    owner = np.repeat(np.arange(40), [len(row) for row in rows])
    items = [f"{item:02d}" for item in np.concatenate(rows)]
    split = leave_one_out(order_log(Log(encode_ids(owner), encode_ids(items))))
    training, sequences = training_popularity(split), split.sequences
    popularity = dict.fromkeys(range(1, sequences.n_items + 1), 0)
    for user in range(sequences.n_users):
        for item in split.train_history(user).tolist():
            popularity[item] += 1
    assert training.popularity.tolist() == list(popularity.values())
    means = []
    for user in split.test.users.tolist():
        own = split.train_history(user).tolist()
        means.append(sum(popularity[item] for item in own) / len(own))
    assert training.usual == pytest.approx(sum(means) / len(means), abs=1e-12)


def test_users_without_training_do_not_count() -> None:
    """Under the temporal split a user may have begun after training ended."""
    users = ["a"] * 4 + ["b"] * 3 + ["c"] * 2
    items = ["x", "y", "z", "x"] + ["x", "y", "z"] + ["x", "y"]
    times = np.array([0, 1, 5, 9, 6, 7, 9, 0, 1])
    log = order_log(Log(encode_ids(users), encode_ids(items), times=times))
    points = ("1970-01-01T00:00:05", "1970-01-01T00:00:08")
    split = temporal(log, Protocol(split="temporal", split_at=points))
    assert split.test.users.tolist() == [0, 1]
    training = training_popularity(split)  # a and c train on x, y; b on nothing
    assert training.popularity.tolist() == [2, 2, 0]
    assert training.usual == 2
