"""Evaluation against a loop over users, and that every model answers the same questions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.prepared import order_log
from depthprobe.data.splits import leave_one_out
from depthprobe.evaluation.ranks import EvalSet, evaluate, make_eval_set, mean_ndcg, rank_targets

CPU = torch.device("cpu")


class LastItem:
    """Scores depend on the last item alone."""

    def __init__(self) -> None:
        self.table = torch.randn(31, 4, dtype=torch.float64)

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
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


def test_equals_a_loop_over_users(eval_set: EvalSet) -> None:
    model = LastItem()
    found = evaluate(model, eval_set, device=CPU)["full"]
    for user in range(40):
        scores = model.table[int(eval_set.histories[user][-1])] @ model.table.T
        exclude = torch.zeros(1, 31, dtype=torch.bool)
        exclude[0, 0] = True
        assert eval_set.seen is not None
        exclude[0, eval_set.seen[user].astype(np.int64)] = True
        target = torch.tensor([int(eval_set.targets[user])])
        assert found[user] == rank_targets(scores[None], target, exclude).item()


def test_history_is_the_latest_items_before_the_target(eval_set: EvalSet) -> None:
    assert eval_set.seen is not None
    assert {len(history) for history in eval_set.histories} == {3}
    assert {len(seen) for seen in eval_set.seen} == {7}
    for history, seen, target in zip(
        eval_set.histories, eval_set.seen, eval_set.targets, strict=True
    ):
        assert history.tolist() == seen[-3:].tolist()
        assert target not in seen


def test_limit_draws_the_same_users_each_time() -> None:
    users = np.repeat(np.arange(40), 4).astype(str)
    items = np.tile(np.arange(4), 40).astype(str)
    sequences = order_log(Log(users=encode_ids(users), items=encode_ids(items)))
    split = leave_one_out(sequences)
    drawn = [
        make_eval_set(split, "validation", max_history=3, filter_seen=False, limit=9)
        for _ in range(2)
    ]
    assert drawn[0].users.tolist() == drawn[1].users.tolist()
    assert len(set(drawn[0].users.tolist())) == 9


def test_mean_ndcg_by_hand() -> None:
    assert mean_ndcg(np.array([1, 3, 11])) == pytest.approx((1 + 0.5 + 0) / 3)


def test_lists_are_the_best_items_not_seen(eval_set: EvalSet) -> None:
    model = LastItem()
    found = evaluate(model, replace(eval_set, lists=True), device=CPU)
    assert found.keys() == {"full", "top-10"}
    assert found["full"].tolist() == evaluate(model, eval_set, device=CPU)["full"].tolist()
    lists = found["top-10"]
    assert (lists.shape, lists.dtype) == ((40, 10), np.int32)
    assert eval_set.seen is not None
    for user, (seen, row) in enumerate(zip(eval_set.seen, lists.tolist(), strict=True)):
        scores = model.table[int(eval_set.histories[user][-1])] @ model.table.T
        order = scores[1:].sort(descending=True, stable=True).indices + 1
        best = [item for item in order.tolist() if item not in set(seen.tolist())]
        assert row == best[:10]
