from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, top_k_accuracy_score

from depthprobe.evaluation.metrics import check_metrics, metrics_from_ranks, per_user_metric
from depthprobe.evaluation.ranks import rank_targets
from depthprobe.evaluation.statistics import bootstrap_mean

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


@given(HALVES)
def test_means_of_per_user_values(ranks: list[float]) -> None:
    for name, value in metrics_from_ranks(ranks, ks=(1, 2, 7)).items():
        values = per_user_metric(ranks, name)
        assert values.shape == (len(ranks),)
        assert value == pytest.approx(values.mean(), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_agrees_with_sklearn(k: int) -> None:
    draw = np.random.default_rng(k)
    scores = draw.permuted(np.tile(np.arange(30.0), (50, 1)), axis=1)  # no ties
    targets = draw.integers(30, size=50)
    relevance = np.eye(30)[targets]
    found = metrics_from_ranks(rank_targets(scores, targets), ks=(k,))
    assert found[f"NDCG@{k}"] == pytest.approx(ndcg_score(relevance, scores, k=k), abs=1e-12)
    hits = top_k_accuracy_score(targets, scores, k=k, labels=np.arange(30))
    assert found[f"HR@{k}"] == pytest.approx(hits, abs=1e-12)


def test_agrees_with_trec_eval() -> None:
    draw = np.random.default_rng(0)
    scores = draw.permuted(np.tile(np.arange(200.0), (300, 1)), axis=1)  # no ties
    targets = draw.integers(200, size=300)
    eval_set = {str(user): {str(item): 1} for user, item in enumerate(targets)}
    answered = {
        str(user): {str(item): score for item, score in enumerate(row.tolist())}
        for user, row in enumerate(scores)
    }
    measures = {"ndcg_cut.1,5,10", "success.1,5,10", "recip_rank"}
    told = list(pytrec_eval.RelevanceEvaluator(eval_set, measures).evaluate(answered).values())
    names = {"NDCG@{}": "ndcg_cut_{}", "HR@{}": "success_{}"}
    expected = {
        own.format(k): np.mean([user[theirs.format(k)] for user in told])
        for own, theirs in names.items()
        for k in (1, 5, 10)
    } | {"MRR": np.mean([user["recip_rank"] for user in told])}
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


def test_random_scores_hit_at_chance() -> None:
    draw = np.random.default_rng(0)
    ranks = rank_targets(draw.random((20_000, 200)), draw.integers(200, size=20_000))
    hits = metrics_from_ranks(ranks)["HR@10"]
    assert abs(hits - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5
    found = bootstrap_mean(per_user_metric(ranks, "HR@10"), level=0.999)
    assert found.value == hits
    assert found.low < 10 / 200 < found.high
    assert found.high - found.low < 0.012


@given(HALVES)
def test_bounds_hold_for_all_ranks(ranks: list[float]) -> None:
    check_metrics(metrics_from_ranks(ranks, ks=(1, 2, 3, 5, 10)))
    check_metrics(metrics_from_ranks(ranks, ks=(5, 10)))  # without HR@1
    check_metrics(metrics_from_ranks(np.ceil(ranks), ks=(1, 2, 3, 5, 10)), whole=True)


def test_bounds_are_sharp() -> None:
    """One group of ranks at a bound's place reaches it."""
    for rank, whole in ((1.5, False), (2, True), (5, True), (5.5, False), (6, True)):
        met = metrics_from_ranks([1, rank])
        check_metrics(met, whole=whole)
        moved = 0
        for name in ("NDCG@5", "MRR"):
            for step in (-1e-6, 1e-6):
                try:
                    check_metrics({**met, name: met[name] + step}, whole=whole)
                except ValueError:
                    moved += 1
        assert moved >= 1, rank


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"HR@1": 0.5}, "HR@1 = 0.5 is above HR@5"),
        ({"NDCG@10": 0.1}, "NDCG@5 = 0.18 is above NDCG@10"),
        ({"NDCG@5": 0.27}, r"NDCG@5 = 0\.27 is above"),
        ({"NDCG@10": 0.7, "HR@10": 1.2}, "HR@10 = 1.2 is above 1"),
        ({"MRR": 0.01}, r"is above MRR = 0\.01"),
        ({"MRR": 0.5}, r"MRR = 0\.5 is above"),
        ({"MRR": float("nan")}, "nan"),
        ({"HR@5": -0.1}, "0 is above HR@5|HR@1"),
    ],
)
def test_impossible_tables_are_refused(changed: dict[str, float], said: str) -> None:
    table = {"HR@1": 0.1, "HR@5": 0.3, "HR@10": 0.4, "NDCG@5": 0.18, "NDCG@10": 0.22, "MRR": 0.2}
    check_metrics(table, whole=True)
    with pytest.raises(ValueError, match=said):
        check_metrics({**table, **changed}, whole=True)


def test_a_published_row_that_breaks_the_bound() -> None:
    """NDCG@5 <= HR@1 + 0.631 (HR@5 - HR@1) for whole ranks: 13.08 + 0.631 * 3.86 is 15.52."""
    row = {"HR@1": 0.1308, "HR@5": 0.1694, "NDCG@5": 0.1501}
    check_metrics(row, whole=True, tolerance=1e-4)
    with pytest.raises(ValueError, match="NDCG@5"):
        check_metrics({**row, "NDCG@5": 0.156}, whole=True, tolerance=1e-4)


def test_bad_input_is_refused() -> None:
    for ranks, said in (
        ([1, 0.5], "rank 1 is 0.5"),
        ([math.nan], "rank 0"),
        ([math.inf], "rank 0"),
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
