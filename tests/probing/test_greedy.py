"""Greedy removal equals a naive loop over cut models, and finds what was planted."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from depthprobe.evaluation.ranks import EvalSet, evaluate, mean_ndcg
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.probing.greedy import Removal, greedy

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
def test_equals_a_naive_loop(teacher: Recommender, eval_set: EvalSet, lazy: bool) -> None:
    found, expected = (
        greedy(teacher, eval_set, device=CPU, lazy=lazy),
        naive(teacher, eval_set, lazy=lazy),
    )
    assert found == expected
    assert found.kept(5) == (0, 1, 2, 3, 4)
    for depth in range(1, 5):
        score = cut_score(teacher, eval_set, list(found.kept(depth)))
        assert found.scores[5 - depth] == score
    if not lazy:
        assert found.evaluated == 5 + 4 + 3 + 2


def test_finds_a_block_that_does_nothing(teacher: Recommender, eval_set: EvalSet) -> None:
    idle = find_blocks(teacher.backbone)[2]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
    found = greedy(teacher, peaked(teacher, eval_set), device=CPU)
    assert found.removed[0] == 2
    assert found.scores[0] == found.scores[1]


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
    found = greedy(teacher, peaked(teacher, eval_set), device=CPU, lazy=False)
    place = {block: order for order, block in enumerate((*found.removed, -1))}
    first, second = sorted((place.get(1, 4), place.get(2, 4)))
    assert second == first + 1  # once one has gone, the other does nothing but harm
    assert found.scores[second + 1] > found.scores[first + 1]


def peaked(teacher: Recommender, eval_set: EvalSet) -> EvalSet:
    """EvalSet that the whole teacher answers best: its own first choice is each target."""
    questions = EvalSet(eval_set.users, eval_set.histories, eval_set.targets, None, None)
    targets = np.empty(len(eval_set.users), dtype=np.int64)
    with torch.inference_mode():
        encoded = questions.map_batches(lambda _, *batch: teacher.encode(*batch), device=CPU)
        for chosen, vectors in encoded:
            scores = vectors @ teacher.item_matrix()[1:].T
            targets[chosen] = scores.argmax(dim=1).numpy() + 1
    return EvalSet(eval_set.users, eval_set.histories, targets, None, None)


def test_one_block_is_left_as_it_is(teacher: Recommender, eval_set: EvalSet) -> None:
    keep_blocks(teacher.backbone, [3])
    found = greedy(teacher, eval_set, device=CPU)
    assert found.removed == ()
    assert found.kept(1) == (0,)
