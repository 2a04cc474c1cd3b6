"""Greedy removal equals a naive loop over cut models, and finds what was planted."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.evaluation.ranks import EvalSet, evaluate, mean_ndcg
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.probing.walk import Removal, greedy, nearest_spans

CPU = torch.device("cpu")


def cut_score(teacher: Recommender, eval_set: EvalSet, kept: list[int]) -> float:
    cut = copy.deepcopy(teacher)
    keep_blocks(cut.backbone, kept)
    return mean_ndcg(evaluate(cut, eval_set, device=CPU)["full"])


def naive(teacher: Recommender, eval_set: EvalSet) -> Removal:
    left = list(range(teacher.depth))
    order, scores, evaluated = [], [cut_score(teacher, eval_set, left)], 0
    stale: dict[int, float] = {}
    while len(left) > 1:
        now: dict[int, float] = {}
        waiting = left if not stale else [min(left, key=lambda b: (stale[b], -b))]
        while waiting[0] not in now:
            for block in waiting:
                now[block] = cut_score(teacher, eval_set, [b for b in left if b != block])
                stale[block] = scores[-1] - now[block]
                evaluated += 1
            waiting = [min(left, key=lambda b: (stale[b], -b))]
        (gone,) = waiting
        left.remove(gone)
        order.append(gone)
        scores.append(now[gone])
    return Removal(tuple(order), tuple(scores), evaluated)


def test_equals_a_naive_loop(teacher: Recommender, few: EvalSet) -> None:
    removal = greedy(teacher, few, device=CPU)
    assert removal == naive(teacher, few)
    assert removal.kept(5) == (0, 1, 2, 3, 4)
    for depth in range(1, 5):
        score = cut_score(teacher, few, list(removal.kept(depth)))
        assert removal.scores[5 - depth] == score


def test_one_block_is_left_as_it_is(plain: Recommender, few: EvalSet) -> None:
    keep_blocks(plain.backbone, [3])
    removal = greedy(plain, few, device=CPU)
    assert removal.removed == ()
    assert removal.kept(1) == (0,)


@given(st.integers(1, 9), st.data())
def test_every_span_once_and_the_nearest_first(blocks: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, blocks))
    first = data.draw(st.integers(0, blocks - length))
    angular = np.random.default_rng(blocks).random((blocks + 1, blocks + 1))
    spans = nearest_spans(angular, length, first=first)
    assert sorted(spans) == [(start, start + length) for start in range(first, blocks - length + 1)]
    distances = [angular[span] for span in spans]
    assert distances == sorted(distances)


@pytest.mark.parametrize(("length", "first"), [(0, 0), (4, 0), (3, 1)])
def test_no_such_span(length: int, first: int) -> None:
    with pytest.raises(ValueError, match="no run"):
        nearest_spans(np.zeros((4, 4)), length, first=first)
