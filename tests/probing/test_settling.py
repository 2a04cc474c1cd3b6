"""Settling equals naive loops over really truncated models, and finds what was planted."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.probing.settling import (
    Settling,
    rank_settled_depths,
    settled_depths,
    settling,
    to_frame,
)

CPU = torch.device("cpu")
L = 5


@pytest.fixture
def eval_set(eval_set: EvalSet) -> EvalSet:
    """Also a user with four items left, one with none, and one with the target among the seen."""
    seen = list(eval_set.seen or [])
    seen[3] = np.setdiff1d(np.arange(1, 41), [7, 11, 20, 33])
    seen[8] = np.arange(1, 41)
    seen[9] = np.append(seen[9], eval_set.targets[9])
    return replace(eval_set, seen=seen)


@torch.no_grad()
def depth_0(teacher: Recommender, history: np.ndarray) -> np.ndarray:
    """Where no block runs, nothing but the last item is seen."""
    last = teacher.input_adapter(teacher.items(torch.tensor([int(history[-1])])))
    return np.asarray(teacher.read_out(teacher.backbone.norm(last))[0])


def naive(
    teacher: Recommender, eval_set: EvalSet
) -> tuple[list[list[float]], list[list[list[int]]]]:
    """Ranks and all items best first, [user][depth], by sorting in plain Python."""
    table = teacher.item_matrix().detach().numpy()
    cuts = [copy.deepcopy(teacher) for _ in range(L + 1)]
    for depth in range(1, L):
        keep_blocks(cuts[depth].backbone, range(depth))
    ranks, lists = [], []
    for place, history in enumerate(eval_set.histories):
        ranks.append([])
        lists.append([])
        seen = set() if eval_set.seen is None else set(eval_set.seen[place].tolist())
        target = int(eval_set.targets[place])
        for depth, cut in enumerate(cuts):
            if depth == 0:
                vector = depth_0(cut, history)
            else:
                with torch.no_grad():
                    items, length = torch.from_numpy(history)[None], torch.tensor([len(history)])
                    vector = cut.encode(items, length)[0].numpy()
            score = {item: float(table[item] @ vector) for item in range(1, len(table))}
            left = [item for item in score if item not in seen]
            above = sum(score[item] > score[target] for item in left if item != target)
            ranks[-1].append(above + 1.0)
            lists[-1].append(sorted(left, key=lambda item: -score[item]))
    return ranks, lists


def settled(same: list[bool]) -> int:
    return next(depth for depth in range(L + 1) if all(same[depth:]))


def test_equals_naive_loops(teacher: Recommender, eval_set: EvalSet) -> None:
    ranks, whole = naive(teacher, eval_set)
    for k in (10, 3):
        found = settling(teacher, eval_set, device=CPU, k=k)
        agree(found, ranks, [[top[:k] for top in tops] for tops in whole])


def agree(found: Settling, ranks: list[list[float]], lists: list[list[list[int]]]) -> None:
    np.testing.assert_array_equal(found.ranks, ranks)
    for user, (places, tops) in enumerate(zip(ranks, lists, strict=True)):
        last = tops[-1]
        assert found.top_settled[user] == settled([top == last for top in tops])
        assert found.set_settled[user] == settled([set(top) == set(last) for top in tops])
        near = [abs(place - places[-1]) <= 1 for place in places]
        assert found.rank_settled[user] == near.index(True)
        assert found.best_depth[user] == places.index(min(places))
        assert found.overthinking[user] == any(place < places[-1] for place in places)
        assert found.lost[user] == places[-1] - min(places)
        shared = [len(set(top) & set(last)) / len(last) if last else 1 for top in tops]
        np.testing.assert_allclose(found.overlaps[user], shared, atol=1e-7)
        np.testing.assert_allclose(found.rbos[user], [rbo(top, last) for top in tops], atol=1e-6)
    np.testing.assert_allclose(found.overlap, found.overlaps.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.rbo, found.rbos.mean(axis=0), atol=1e-6)
    # the fixture decides something: users differ, and the two readings of a list too
    assert len(set(found.set_settled.tolist())) > 1
    assert (found.set_settled < found.top_settled).any()
    assert 0 < found.overthinking.sum() < len(ranks)


def rbo(a: list[int], b: list[int], p: float = 0.9) -> float:
    if not b:
        return 1.0
    agreement = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, len(b) + 1)]
    series = sum(each * p**d for d, each in enumerate(agreement, start=1))
    return agreement[-1] * p ** len(b) + (1 - p) / p * series


def test_without_seen_items_nothing_is_left_out(teacher: Recommender, eval_set: EvalSet) -> None:
    eval_set = EvalSet(
        eval_set.users[:40],
        eval_set.histories[:40],
        eval_set.targets[:40],
        seen=None,
        negatives=None,
    )
    found = settling(teacher, eval_set, device=CPU)
    ranks, lists = naive(teacher, eval_set)
    np.testing.assert_array_equal(found.ranks, ranks)
    expected = [settled([top[:10] == tops[-1][:10] for top in tops]) for tops in lists]
    assert found.top_settled.tolist() == expected


def test_blocks_that_do_nothing_settle_everything(teacher: Recommender, eval_set: EvalSet) -> None:
    with torch.no_grad():
        for block in list(teacher.backbone.layers)[2:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    found = settling(teacher, eval_set, device=CPU)
    assert found.top_settled.max() == 2
    assert found.rank_settled.max() <= 2
    assert found.best_depth.max() <= 2
    np.testing.assert_allclose(found.overlap[2:], 1)
    np.testing.assert_allclose(found.rbo[2:], 1)
    assert found.overlap[1] < 0.95


def test_small_dtypes_and_nothing_else_is_kept(teacher: Recommender, eval_set: EvalSet) -> None:
    found = settling(teacher, eval_set, device=CPU)
    held = {name: (values.shape, values.dtype) for name, values in vars(found).items()}
    table, column = (300, L + 1), (300,)
    assert held == {
        "ranks": (table, np.float32),
        "top_settled": (column, np.int16),
        "set_settled": (column, np.int16),
        "overlaps": (table, np.float32),
        "rbos": (table, np.float32),
    }
    assert found.rank_settled.dtype == found.best_depth.dtype == np.int16
    assert found.overthinking.dtype == np.bool_


# one user a row, depths 0..3
RANKS = np.array(
    [
        [9, 5, 3, 1],  # better with every block
        [9, 1, 4, 6],  # found at 1, lost again
        [2, 2, 2, 2],  # never moves
        [5, 8, 5.5, 4.5],  # near, away, near
        [3, 9, 9, 3],  # draws level only: no overthinking
        [7, 7, 6, 6.5],  # half a place is a place
    ],
    dtype=np.float32,
)


def planted() -> Settling:
    depths, shares = np.zeros(6, np.int16), np.ones((6, 4), np.float32)
    return Settling(RANKS, depths, depths, shares, shares)


def test_planted_ranks() -> None:
    found = planted()
    assert found.rank_settled.tolist() == [3, 3, 0, 0, 0, 0]
    assert rank_settled_depths(RANKS, within=2).tolist() == [2, 2, 0, 0, 0, 0]
    assert rank_settled_depths(RANKS, within=0).tolist() == [3, 3, 0, 3, 0, 3]
    assert found.best_depth.tolist() == [3, 1, 0, 3, 0, 2]
    assert found.lost.tolist() == [0, 5, 0, 0, 0, 0.5]
    assert found.overthinking.tolist() == [False, True, False, False, False, True]


def test_planted_lists() -> None:
    a, swapped, b = [1, 2, 3], [2, 1, 3], [4, 5, 6]
    lists = np.array(
        [
            [a, a, a, a],
            [b, b, b, a],
            [b, a, a, a],
            [a, b, a, a],  # the right list, left again
            [b, swapped, a, a],
            [swapped, swapped, swapped, a],
        ]
    )
    assert settled_depths(lists).tolist() == [0, 3, 1, 2, 2, 3]
    assert settled_depths(lists, ordered=False).tolist() == [0, 3, 1, 2, 1, 0]


def test_frame() -> None:
    frame = to_frame(planted(), np.arange(10, 16))
    assert list(frame) == [
        "user",
        "top_settled",
        "set_settled",
        "rank_settled",
        "best_depth",
        "final_rank",
        "best_rank",
        "overthinking",
    ]
    assert frame.loc[1].tolist() == [11, 0, 0, 3, 1, 6, 1, True]
    with pytest.raises(ValueError, match="expected 6 users, got 5"):
        to_frame(planted(), np.arange(5))


def test_k_beyond_the_catalogue_is_refused(teacher: Recommender, eval_set: EvalSet) -> None:
    with pytest.raises(ValueError, match="k is 41"):
        settling(teacher, eval_set, device=CPU, k=41)
