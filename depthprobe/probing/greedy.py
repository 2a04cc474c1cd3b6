"""Greedy removal: the block that is missed the least goes, again and again (SLEB, 2402.09025)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from depthprobe.evaluation.ranks import EvalSet, mean_ndcg
from depthprobe.models.blocks import find_blocks
from depthprobe.probing.passes import CausalEncoder
from depthprobe.probing.walk import rank_routes, route

Span = tuple[int, int]  # [start, end)


@dataclass(frozen=True)
class Removal:
    """The blocks in the order in which they went, the last one left out of it."""

    removed: tuple[int, ...]  # (L - 1,) block indices
    scores: tuple[float, ...]  # (L,) NDCG@10 at full depth and after each removal; full ranking
    evaluated: int  # how many shallower models were scored to find it

    def kept(self, depth: int) -> tuple[int, ...]:
        """The blocks that are left at a depth, 1..L."""
        gone = self.removed[: len(self.scores) - depth]
        return tuple(b for b in range(len(self.scores)) if b not in gone)


def greedy(model: CausalEncoder, eval_set: EvalSet, *, device: torch.device) -> Removal:
    """Remove the block whose absence costs the least, down to a single one.

    The first removal is chosen from all single skips, which one walk measures. After that, lazily:
    the damage of a block is measured anew only while it is the smallest known, and the block goes
    if it still is. A removal seldom makes another block dispensable, so most are not measured
    again; one whose damage has fallen below the smallest is missed. Of equal ones the last goes.
    Choose by users of validation, never of the test.
    """
    left = list(range(len(find_blocks(model.backbone))))
    evaluated = 0

    def scores_without(blocks: list[int]) -> dict[int, float]:
        nonlocal evaluated
        evaluated += len(blocks)
        routes = [route(b for b in left if b != out) for out in blocks]
        ranks = rank_routes(model, eval_set, routes, device=device)
        return {out: mean_ndcg(each["full"]) for out, each in zip(blocks, ranks, strict=True)}

    (full_depth,) = rank_routes(model, eval_set, [route(left)], device=device)
    scores, removed = [mean_ndcg(full_depth["full"])], list[int]()
    damage = dict.fromkeys(left, -np.inf)  # as it was when last measured
    while len(left) > 1:
        fresh: dict[int, float] = {}  # the score without each block that is measured now
        if not removed:
            fresh = scores_without(left)
            damage = {b: scores[-1] - value for b, value in fresh.items()}
        while (least := min(left, key=lambda b: (damage[b], -b))) not in fresh:
            fresh |= scores_without([least])
            damage[least] = scores[-1] - fresh[least]
        left.remove(least)
        removed.append(least)
        scores.append(fresh[least])
    return Removal(tuple(removed), tuple(scores), evaluated)


def nearest_spans(angular: np.ndarray, length: int, *, first: int = 0) -> list[Span]:
    """All runs of ``length`` blocks, those that turn the state least first (arXiv 2403.17887).

    Args:
        angular: distances between the states around L blocks, (L + 1, L + 1).
        length: of a run, 1..L.
        first: the earliest block that may be in one.
    """
    starts = np.arange(first, len(angular) - length)
    if length < 1 or not len(starts):
        raise ValueError(f"no run of {length} blocks from block {first} of {len(angular) - 1}")
    order = np.argsort(angular[starts, starts + length], kind="stable")
    return [(int(start), int(start) + length) for start in starts[order]]
