"""Greedy removal equals a naive loop over cut models, and finds what was planted."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from depthprobe.evaluation.ranks import EvalSet, evaluate, mean_ndcg
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.probing.greedy import Removal, greedy, nearest_spans

CPU = torch.device("cpu")


def cut_score(teacher: Recommender, eval_set: EvalSet, kept: list[int]) -> float:
    cut = copy.deepcopy(teacher)
    keep_blocks(cut.backbone, kept)
    return mean_ndcg(evaluate(cut, eval_set, device=CPU)["full"])


def naive(teacher: Recommender, eval_set: EvalSet, *, lazy: bool) -> Removal:
    left = list(range(teacher.depth))
    order, scores, evaluated = [], [cut_score(teacher, eval_set, left)], 0
    stale: dict[int, float] = {}
    while len(left) > 1:
        now: dict[int, float] = {}
        first = not stale or not lazy
        while True:
            waiting = left if first else [min(left, key=lambda b: (stale[b], -b))]
            first = False
            if waiting[0] in now:
                break
            for block in waiting:
                now[block] = cut_score(teacher, eval_set, [b for b in left if b != block])
                stale[block] = scores[-1] - now[block]
                evaluated += 1
        (gone,) = waiting
        left.remove(gone)
        order.append(gone)
        scores.append(now[gone])
    return Removal(tuple(order), tuple(scores), evaluated)


@pytest.mark.parametrize("lazy", [True, False])
def test_equals_a_naive_loop(teacher: Recommender, few: EvalSet, lazy: bool) -> None:
    removal = greedy(teacher, few, device=CPU, lazy=lazy)
    assert removal == naive(teacher, few, lazy=lazy)
    assert removal.kept(5) == (0, 1, 2, 3, 4)
    for depth in range(1, 5):
        score = cut_score(teacher, few, list(removal.kept(depth)))
        assert removal.scores[5 - depth] == score
    if not lazy:
        assert removal.evaluated == 5 + 4 + 3 + 2


def peaked(teacher: Recommender, eval_set: EvalSet) -> EvalSet:
    """What the teacher at full depth answers best: its own first choice is each target."""
    best = evaluate(teacher, replace(eval_set, seen=None, lists=True), device=CPU)["top-10"][:, 0]
    return replace(eval_set, targets=best, seen=None, negatives=None)


def test_finds_a_block_that_does_nothing(teacher: Recommender, eval_set: EvalSet) -> None:
    idle = find_blocks(teacher.backbone)[2]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    removal = greedy(teacher, peaked(teacher, eval_set), device=CPU)
    assert removal.removed[0] == 2
    assert removal.scores[0] == removal.scores[1]


class Shift(nn.Module):
    """In place of an MLP: adds the same vector everywhere."""

    def __init__(self, by: torch.Tensor) -> None:
        super().__init__()
        self.by = nn.Parameter(by)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.by.expand_as(state)


def test_finds_two_blocks_that_undo_each_other(teacher: Recommender, eval_set: EvalSet) -> None:
    blocks = find_blocks(teacher.backbone)
    by = 5 * torch.randn(16, dtype=torch.float64)
    with torch.no_grad():
        for index, sign in ((1, 1), (2, -1)):
            blocks[index].self_attn.o_proj.weight.zero_()
            blocks[index].mlp = Shift(sign * by)
    removal = greedy(teacher, peaked(teacher, eval_set), device=CPU, lazy=False)
    place = {block: order for order, block in enumerate((*removal.removed, -1))}
    first, second = sorted((place.get(1, 4), place.get(2, 4)))
    assert second == first + 1  # once one has gone, the other does nothing but harm
    assert removal.scores[second + 1] > removal.scores[first + 1]


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
