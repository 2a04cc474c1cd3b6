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
from depthprobe.probing.passes import Settling, settled_depths, settled_frame, settling

CPU = torch.device("cpu")
L = 5


@pytest.fixture
def with_seen(few: EvalSet) -> EvalSet:
    """Also a user with four items left, one with none, and one with the target among the seen."""
    seen = list(few.histories)
    seen[3] = np.setdiff1d(np.arange(1, 41), [7, 11, 20, 33])
    seen[8] = np.arange(1, 41)
    seen[9] = np.append(seen[9], few.targets[9])
    return replace(few, seen=seen)


@torch.no_grad()
def vectors_by_depth(teacher: Recommender, histories: list[np.ndarray]) -> np.ndarray:
    """User vectors (L + 1, E, d) of models that were really cut, one user a pass."""
    # where no block runs, only the last item counts
    last = torch.tensor([int(history[-1]) for history in histories])
    states = teacher.input_adapter(teacher.items(last))
    vectors = [teacher.read_out(teacher.backbone.norm(states))]
    for depth in range(1, L + 1):
        cut = copy.deepcopy(teacher)
        keep_blocks(cut.backbone, range(depth))
        alone = [(torch.from_numpy(h)[None], torch.tensor([len(h)])) for h in histories]
        vectors.append(torch.cat([cut.encode(*each) for each in alone]))
    return torch.stack(vectors).numpy()


def test_equals_naive_loops(teacher: Recommender, with_seen: EvalSet) -> None:
    vectors = vectors_by_depth(teacher, with_seen.histories)
    table = teacher.item_matrix().detach().numpy()
    depths, readings_differ = set[int](), False
    for eval_set in (with_seen, replace(with_seen, seen=None)):
        ranks, tops = [], []
        for place, target in enumerate(with_seen.targets.tolist()):
            seen = set() if eval_set.seen is None else set(eval_set.seen[place].tolist())
            ranks.append([])
            tops.append([])
            for scores in (vectors[:, place] @ table.T).tolist():
                left = [item for item in range(1, len(table)) if item not in seen]
                above = sum(scores[item] > scores[target] for item in left if item != target)
                ranks[-1].append(np.inf if target in seen else above + 1.0)  # never served
                tops[-1].append(sorted(left, key=lambda item: -scores[item]))  # noqa: B023
        for k in (10, 3):
            found = settling(teacher, eval_set, device=CPU, k=k)
            np.testing.assert_array_equal(found.ranks, ranks)
            lists = [[top[:k] for top in each] for each in tops]
            exact = [settled([top == each[-1] for top in each]) for each in lists]
            as_sets = [settled([set(top) == set(each[-1]) for top in each]) for each in lists]
            assert found.top_settled.tolist() == exact
            assert found.set_settled.tolist() == as_sets
            depths |= set(as_sets)
            readings_differ |= as_sets != exact
    assert len(depths) > 1  # the users decide something
    assert readings_differ


def settled(same: list[bool]) -> int:
    return next(depth for depth in range(L + 1) if all(same[depth:]))


def test_planted_ranks_in_a_frame() -> None:
    ranks = np.array(  # one user a row, depths 0..3
        [
            [9, 5, 3, 1],  # better with every block
            [9, 1, 4, 6],  # found at 1, lost again
            [2, 2, 2, 2],  # never moves
            [5, 8, 5.5, 4.5],  # near, away, near
            [3, 9, 9, 3],  # draws level only: no overthinking
            [7, 7, 6, 6.5],  # half a place is a place
            [np.inf] * 4,  # a target that is never served
        ],
        dtype=np.float32,
    )
    found = Settling(ranks, np.arange(7, dtype=np.int16), np.zeros(7, np.int16))
    frame = settled_frame(found, np.arange(10, 17))
    assert {name: values.tolist() for name, values in frame.items()} == {
        "user": [10, 11, 12, 13, 14, 15, 16],
        "top_settled": [0, 1, 2, 3, 4, 5, 6],
        "set_settled": [0] * 7,
        "rank_settled": [3, 3, 0, 0, 0, 0, 0],
        "best_depth": [3, 1, 0, 3, 0, 2, 0],
        "final_rank": [1, 6, 2, 4.5, 3, 6.5, np.inf],
        "best_rank": [1, 1, 2, 4.5, 3, 6, np.inf],
        "overthinking": [False, True, False, False, False, True, False],
    }


def test_planted_lists() -> None:
    a, swapped, b = [1, 2, 3], [2, 1, 3], [4, 5, 6]
    lists = np.array(
        [
            [a, a, a, a],
            [b, b, b, a],
            [b, a, a, a],
            [a, b, a, a],  # the right list, left again
            [b, swapped, a, a],
        ]
    )
    assert settled_depths(lists).tolist() == [0, 3, 1, 2, 2]
