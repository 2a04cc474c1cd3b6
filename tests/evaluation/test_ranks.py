"""Ranks and lists against plain loops, and evaluation against one user at a time."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.prepared import order_log
from depthprobe.data.splits import leave_one_out
from depthprobe.evaluation.ranks import (
    EvalSet,
    evaluate,
    make_eval_set,
    mean_ndcg,
    rank_targets,
    rank_users,
    top_lists,
)

CPU = torch.device("cpu")
INF = float("inf")


def naive_rank(scores: list[float], target: int, keep: list[bool] | None = None) -> float:
    """Mean place of the target over all orders that agree with the scores."""
    above = tied = 0
    for item, score in enumerate(scores):
        if item == target or (keep is not None and not keep[item]):
            continue
        above += score > scores[target]
        tied += score == scores[target]
    return 1 + above + tied / 2


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([3, 2, 1], 0, 1),
        ([3, 2, 1], 2, 3),
        ([1, 1, 1, 1], 2, 2.5),  # constant scores: the middle, not the top
        ([5, 5, 1], 0, 1.5),
        ([5, 5, 1], 2, 3),
        ([-INF, 0, -INF], 0, 2.5),
        ([INF, INF, 0], 1, 1.5),
        ([7], 0, 1),
    ],
)
def test_hand_worked(scores: list[float], target: int, rank: float) -> None:
    ranks = rank_targets([scores], [target])
    assert ranks.tolist() == [rank]
    assert ranks.dtype == torch.float64


def test_excluded_items_are_not_counted_and_the_target_always_is() -> None:
    scores = torch.tensor([[4.0, 3.0, 3.0, 2.0]] * 3)
    exclude = torch.tensor([[True, False, False, False], [False, False, True, False], [True] * 4])
    before = scores.clone(), exclude.clone()
    assert rank_targets(scores, [1, 1, 1], exclude).tolist() == [1.5, 2, 1]
    assert torch.equal(scores, before[0])
    assert torch.equal(exclude, before[1])


@given(st.data())
def test_agrees_with_a_loop(data: st.DataObject) -> None:
    n_rows, n_items = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    value = st.sampled_from([-INF, -1.0, 0.0, 0.5, INF])  # few values: many ties
    row = st.lists(value, min_size=n_items, max_size=n_items)
    scores = data.draw(st.lists(row, min_size=n_rows, max_size=n_rows))
    targets = [data.draw(st.integers(0, n_items - 1)) for _ in range(n_rows)]
    keep = np.array(
        [[data.draw(st.booleans()) for _ in range(n_items)] for _ in range(n_rows)], dtype=bool
    )
    ranks = rank_targets(np.array(scores), np.array(targets), ~keep).tolist()
    assert ranks == [
        naive_rank(s, t, k) for s, t, k in zip(scores, targets, keep.tolist(), strict=True)
    ]
    assert all(1 <= rank <= n_items for rank in ranks)


def test_kinds_of_input_agree() -> None:
    scores = torch.randint(0, 5, (6, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6)
    expected = rank_targets(scores.double(), targets)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        assert torch.equal(rank_targets(scores.to(dtype), targets), expected)
    assert torch.equal(rank_targets(scores.numpy(), targets.numpy().astype(np.int32)), expected)
    assert torch.equal(rank_targets(scores.float().requires_grad_(), targets), expected)
    assert rank_targets(torch.zeros(0, 3), torch.zeros(0).long()).shape == (0,)


def test_bad_input_is_refused() -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan
    table = torch.zeros(2, 3)
    for targets in ([0.5, 1.0], [True, False]):
        with pytest.raises(ValueError, match="expected integers"):
            rank_targets(table, targets)
    for exclude in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"expected exclude \(2, 3\) bool"):
            rank_targets(table, [0, 1], exclude)
    with pytest.raises(ValueError, match="row 1 hold NaN"):
        rank_targets(scores, [0, 0, 0])
    good = torch.zeros(3, 4)
    for bad in ([0, 0], [[0, 0, 0]]):
        with pytest.raises(ValueError, match=r"expected scores \(B, I\) and targets"):
            rank_targets(good, bad)
    for bad in ([0, 0, 4], [0, -1, 0]):
        with pytest.raises(ValueError, match=r"expected 0\.\.3"):
            rank_targets(good, bad)


def case(users: int = 37, items: int = 50) -> dict[str, Any]:
    """Whole numbers, so that every product is exact and there are many ties."""
    draw = np.random.default_rng(0)
    seen = [draw.integers(1, items + 1, size=draw.integers(0, 9)) for _ in range(users)]
    targets = draw.integers(1, items + 1, size=users)
    seen[3] = np.array([targets[3], targets[3], 5, 5], dtype=np.int32)  # the target and repeats
    return {
        "vectors": torch.from_numpy(draw.integers(-2, 3, size=(users, 3))).float(),
        "item_matrix": torch.from_numpy(draw.integers(-2, 3, size=(items + 1, 3))).float(),
        "targets": targets,
        "negatives": draw.integers(1, items + 1, size=(users, 7)),
        "seen": seen,
    }


@pytest.mark.parametrize("use_seen", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 50 * 4 * 5, 2**20])
@pytest.mark.parametrize("top", [0, 3, 49, 60])
def test_users_agree_with_a_loop(use_seen: bool, chunk_bytes: int, top: int) -> None:
    given = case()
    if not use_seen:
        given["seen"] = None
    ranks = rank_users(**given, chunk_bytes=chunk_bytes, top=top)
    table = (given["vectors"] @ given["item_matrix"].T).numpy()
    expected: dict[str, list[Any]] = {"full": [], "sampled-7": []} | (
        {f"top-{top}": []} if top else {}
    )
    for user, (scores, target) in enumerate(zip(table.tolist(), given["targets"], strict=True)):
        left_out = {0, *(given["seen"][user].tolist() if use_seen else [])}
        keep = [item not in left_out for item in range(len(scores))]
        expected["full"].append(naive_rank(scores, target, keep))
        drawn = [i for i in given["negatives"][user].tolist() if i != target]
        expected["sampled-7"].append(naive_rank([scores[target], *(scores[i] for i in drawn)], 0))
        if top:
            best = sorted(np.flatnonzero(keep).tolist(), key=lambda item: -scores[item])[:top]  # noqa: B023
            expected[f"top-{top}"].append(best + [0] * (top - len(best)))
    assert any(rank % 1 for rank in expected["full"])  # ties there are
    assert {name: values.tolist() for name, values in ranks.items()} == expected


def test_users_agree_with_rank_targets() -> None:
    vectors, table = torch.randn(20, 16), torch.randn(301, 16)
    targets = torch.randint(1, 301, (20,))
    ranks = rank_users(vectors, table, targets)
    assert ranks.keys() == {"full"}
    assert torch.equal(ranks["full"], rank_targets(vectors @ table[1:].T, targets - 1))


def test_padding_is_never_ranked() -> None:
    table = torch.tensor([[100.0], [1.0], [2.0]])
    ranks = rank_users(torch.ones(1, 1), table, [2], top=2)
    assert ranks["full"].tolist() == [1]
    assert ranks["top-2"].tolist() == [[2, 1]]


def test_a_twin_of_the_target_ties_with_it() -> None:
    """Equal items have equal scores only within one product."""
    table = torch.randn(100, 64).repeat(3, 1)[:257]
    table = torch.cat([torch.zeros(1, 64), table])
    vectors = torch.randn(40, 64).double()
    ranks = rank_users(vectors, table.double(), torch.arange(1, 41))["full"]
    twins = torch.tensor([2.0 if item + 200 <= 257 else 1.0 for item in range(1, 41)])
    apart = ranks - twins / 2  # one more than those above: a whole number
    assert torch.equal(apart, apart.round())


def test_half_precision_is_raised_before_scoring() -> None:
    vectors, table = torch.randn(8, 32).bfloat16(), torch.randn(2001, 32).bfloat16()
    targets = torch.randint(1, 2001, (8,))
    assert torch.equal(
        rank_users(vectors, table, targets)["full"],
        rank_users(vectors.float(), table.float(), targets)["full"],
    )


def test_users_refuse_bad_input() -> None:
    vectors, table = torch.zeros(3, 2), torch.zeros(5, 2)
    for targets in ([0, 1, 1], [1, 5, 1]):
        with pytest.raises(ValueError, match=r"targets are .*expected 1\.\.4"):
            rank_users(vectors, table, targets)
    with pytest.raises(ValueError, match=r"seen items are 0\.\.0"):
        rank_users(vectors, table, [1, 1, 1], seen=[np.array([0])] * 3)
    vectors[2, 1] = torch.nan
    with pytest.raises(ValueError, match="row 2 hold NaN"):
        rank_users(vectors, table, [1, 1, 1], chunk_bytes=1)


def test_infinite_scores_are_no_nan() -> None:
    table = torch.tensor([[0.0], [0.0], [INF], [-INF], [1.0]])
    ranks = rank_users(torch.ones(3, 1), table, [1, 2, 3], top=4)
    assert ranks["full"].tolist() == [3, 1, 4]
    assert ranks["top-4"].tolist() == [[2, 4, 1, 0]] * 3  # what scores -inf is not recommended


def test_a_seen_target_is_ranked_but_not_recommended() -> None:
    table = torch.tensor([[0.0], [3.0], [2.0], [1.0]])
    ranks = rank_users(torch.ones(1, 1), table, [1], seen=[np.array([1, 3])], top=2)
    assert ranks["full"].tolist() == [1]
    assert ranks["top-2"].tolist() == [[2, 0]]


@given(
    width=st.integers(1, 700),
    k=st.integers(1, 12),
    kinds=st.integers(1, 400),
    seed=st.integers(0, 99),
)
@settings(max_examples=100)
def test_lists_are_those_of_a_stable_sort(width: int, k: int, kinds: int, seed: int) -> None:
    """Few kinds of scores tie within blocks, across them, and across the last place."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, kinds, (5, width), generator=draw).float()
    scores[torch.rand(5, width, generator=draw) < 0.1] = -INF
    scores[0] = -INF
    expected = scores.sort(dim=1, descending=True, stable=True)
    items = torch.where(expected.values > -INF, expected.indices + 1, 0)
    items = torch.cat([items, torch.zeros(5, k, dtype=torch.int64)], dim=1)
    assert torch.equal(top_lists(scores, k), items[:, :k])


@pytest.mark.parametrize("width", [20_000, 20_127])
def test_lists_of_a_large_catalogue(width: int) -> None:
    scores = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    scores[:, -1] = 9.0  # in the block that is not full
    lists = top_lists(scores, 10)
    assert torch.equal(lists, scores.topk(10, dim=1).indices + 1)
    assert (lists[:, 0] == width).all()


class LastItem:
    """Scores depend on the last item alone; memory for so many users at once."""

    def __init__(self, most: int = 1000) -> None:
        self.table = torch.randn(31, 4, dtype=torch.float64)
        self.most, self.sizes = most, list[int]()

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        self.sizes.append(len(histories))
        if len(histories) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.table[histories[torch.arange(len(histories)), lengths - 1]]

    def item_matrix(self) -> Tensor:
        return self.table


@pytest.fixture
def eval_set() -> EvalSet:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 8).astype(str)
    items = np.concatenate([rng.permutation(30)[:8] for _ in range(40)]).astype(str)
    sequences = order_log(Log(users=encode_ids(users), items=encode_ids(items)))
    return make_eval_set(leave_one_out(sequences), "test", max_history=3, filter_seen=True)


def test_a_target_among_the_items_left_out_is_a_miss(eval_set: EvalSet) -> None:
    targets = eval_set.targets.copy()
    assert eval_set.seen is not None
    targets[7] = eval_set.seen[7][2]
    negatives = np.full((40, 3), 30)
    repeated = replace(eval_set, targets=targets, negatives=negatives, lists=True)
    ranks = evaluate(LastItem(), repeated, device=CPU)
    assert {
        name: np.isinf(ranks[name]).nonzero()[0].tolist() for name in ("full", "sampled-3")
    } == {
        "full": [7],
        "sampled-3": [7],
    }
    assert targets[7] not in ranks["top-10"][7]
    kept = evaluate(LastItem(), replace(repeated, seen=None), device=CPU)
    assert np.isfinite(kept["full"]).all()


def test_evaluation_equals_a_loop_over_users(eval_set: EvalSet) -> None:
    model = LastItem()
    ranks = evaluate(model, replace(eval_set, lists=True), device=CPU)
    assert ranks.keys() == {"full", "top-10"}
    assert ranks["full"].tolist() == evaluate(model, eval_set, device=CPU)["full"].tolist()
    assert (ranks["top-10"].shape, ranks["top-10"].dtype) == ((40, 10), np.int32)
    assert eval_set.seen is not None
    for user, seen in enumerate(eval_set.seen):
        scores = model.table[int(eval_set.histories[user][-1])] @ model.table[1:].T
        exclude = torch.zeros(1, 30, dtype=torch.bool)
        exclude[0, seen.astype(np.int64) - 1] = True
        target = torch.tensor([int(eval_set.targets[user]) - 1])
        assert ranks["full"][user] == rank_targets(scores[None], target, exclude).item()
        scores[exclude[0]] = -INF
        assert ranks["top-10"][user].tolist() == top_lists(scores[None], 10)[0].tolist()


def test_history_is_the_latest_items_before_the_target(eval_set: EvalSet) -> None:
    assert eval_set.seen is not None
    rows = zip(eval_set.histories, eval_set.seen, eval_set.targets, strict=True)
    for history, seen, target in rows:
        assert (len(history), len(seen)) == (3, 7)
        assert history.tolist() == seen[-3:].tolist()
        assert target not in seen


def test_limit_draws_the_same_users_each_time() -> None:
    users = np.repeat(np.arange(40), 4).astype(str)
    items = np.tile(np.arange(4), 40).astype(str)
    split = leave_one_out(order_log(Log(users=encode_ids(users), items=encode_ids(items))))
    options = {"max_history": 3, "filter_seen": False, "limit": 9}
    one, two = (make_eval_set(split, "validation", **options) for _ in range(2))  # type: ignore[arg-type]
    assert one.users.tolist() == two.users.tolist()
    assert len(set(one.users.tolist())) == 9


@pytest.mark.parametrize("most", [1, 3, 13, 39])
def test_out_of_memory_halves_the_batch(
    eval_set: EvalSet, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = LastItem()
    expected = evaluate(model, replace(eval_set, lists=True), device=CPU)
    assert model.sizes == [40]
    model.most, model.sizes = most, []
    with caplog.at_level(logging.WARNING):
        ranks = evaluate(model, replace(eval_set, lists=True), device=CPU)
    for name, values in expected.items():
        np.testing.assert_array_equal(ranks[name], values)
    assert caplog.messages[0] == "out of memory with 40 users at once: now 20"
    assert sum(size > most for size in model.sizes) == len(caplog.messages)
    assert sum(size for size in model.sizes if size <= most) == 40


def test_out_of_memory_with_one_user_is_an_error(eval_set: EvalSet) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(LastItem(most=0), eval_set, device=CPU)


def test_later_batches_are_smaller_after_out_of_memory(eval_set: EvalSet) -> None:
    sizes, done = list[int](), list[int]()
    batches = eval_set.batches(device=CPU, size=16)
    for chosen, _, _ in batches:
        with batches.retry():
            sizes.append(len(chosen))
            if len(chosen) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            done += chosen.tolist()
    assert sizes == [16, 8, *[4] * 10]
    assert sorted(done) == list(range(40))


def test_mean_ndcg_by_hand() -> None:
    assert mean_ndcg(np.array([1, 3, 11])) == pytest.approx((1 + 0.5 + 0) / 3)
