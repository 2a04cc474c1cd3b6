"""Rank many shallower models in one walk over the blocks, without cutting; greedy removal with it.

A model without some blocks is a route through the blocks. Routes with a common beginning share its
states: they form a tree, and each node runs one block once. All L single skips take (L + 1) / 2
passes instead of L, and all contiguous spans about L^2 / 6 instead of L^2 / 3. The tree is walked
depth first, so only as many states are in memory as the tree is deep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from depthprobe.evaluation.ranks import BATCH, EvalSet, Ranks, mean_ndcg, shared_prompt
from depthprobe.models.blocks import find_blocks
from depthprobe.models.parts import check_readable, join_streams
from depthprobe.models.prompt import recording_cache, sharing_cache
from depthprobe.models.skipping import plan_skip, refuse_shared
from depthprobe.models.taps import BlockCalls, Plan, first_tensor, record_calls, standing_in
from depthprobe.probing.passes import CausalEncoder, vectors_of


class Step(NamedTuple):
    """A block that runs, and which of its parts is left out."""

    block: int
    without: Literal["nothing", "attention", "mlp"] = "nothing"
    folded: bool = False  # whether its MLP ends in a map that also replaces the next block


Route = tuple[Step, ...]
Span = tuple[int, int]  # blocks [start, end)


def route(kept: Iterable[int]) -> Route:
    """The route through these blocks, all of each."""
    return tuple(Step(block) for block in kept)


def route_without(part: Literal["attention", "mlp"], block: int, depth: int) -> Route:
    """The route through all blocks, with one part of one of them left out."""
    return tuple(Step(b, part if b == block else "nothing") for b in range(depth))


class _Node(NamedTuple):
    """A block that runs on the state of its parent node."""

    level: int  # how many blocks run before it: the nodes above it in the tree
    step: Step
    ending: list[int]  # indices of the routes that end here


def _tree(routes: Sequence[Route]) -> list[_Node]:
    """The tree of routes by common beginnings, depth first.

    Routes [0, 1], [0, 2] and [1, 2] run block 0 once, and five blocks in all.
    """
    nodes: dict[Route, _Node] = {}
    for steps in sorted(set(routes)):
        for level, step in enumerate(steps):
            nodes.setdefault(steps[: level + 1], _Node(level, step, []))
    for index, steps in enumerate(routes):
        nodes[steps].ending.append(index)
    return list(nodes.values())


def blocks_run(routes: Sequence[Route]) -> int:
    """How many blocks a walk over these routes runs; L of them cost as much as one encoding.

    >>> blocks_run([route([0, 1]), route([0, 2]), route([1, 2])])
    5
    """
    return len(_tree(routes))


@torch.inference_mode()
def rank_routes(
    model: CausalEncoder,
    eval_set: EvalSet,
    routes: Sequence[Route],
    *,
    device: torch.device,
    folded: Mapping[int, Plan] | None = None,
) -> list[Ranks]:
    """Ranks of every user's target on each route, by protocol, each (E,).

    Equal to the ranks of models cut to these blocks with ``keep_blocks``. A route goes through the
    blocks in their order. ``folded`` has, by block, the replacement of the MLP's last map in a
    folded step.

    Raises:
        ValueError: if a route leaves out what a later block needs, or a part that a block lacks;
            for a backbone without a state to read out after each block.
    """
    check_readable(model.backbone)
    ranks: list[Ranks] = []
    items = model.item_matrix()
    for chosen, states in walk(model, eval_set, routes, device=device, folded=folded):
        eval_set.rank_models(ranks, chosen, vectors_of(model, states), items)
    return ranks


def walk(
    model: CausalEncoder,
    eval_set: EvalSet,
    routes: Sequence[Route],
    *,
    device: torch.device,
    batch_size: int = BATCH,
    folded: Mapping[int, Plan] | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield each batch's users (B,) and states at the end of each route, (routes, B, D).

    States are those before the final norm.
    """
    if not routes:
        return
    blocks = find_blocks(model.backbone)
    _check(blocks, routes)
    nodes = _tree(routes)
    every = plan_skip(model.backbone, range(len(blocks)))
    plans: dict[Step, Plan] = {}
    for step in {node.step for node in nodes}:
        plans[step] = list((folded or {})[step.block]) if step.folded else []
        if step.without != "nothing":
            plans[step] += plan_skip(model.backbone, {step.block}, part=step.without)

    def follow(node: _Node, path: list[Tensor], calls: BlockCalls, cache: Cache | None) -> Tensor:
        """Run a node's block: the path holds the states (B, T, D) up to here, then one more."""
        del path[node.level + 1 :]  # states of the branch that was walked before
        with standing_in(plans[node.step]):
            block = node.step.block
            output = calls.repeat(blocks[block], block, path[node.level], cache)
        path.append(first_tensor(output))
        return path[-1]

    with torch.compiler.set_stance("force_eager"):
        caches: list[Cache | None] = [None] * len(nodes)
        with standing_in(every), record_calls(blocks) as calls:
            prompt = shared_prompt(model)
        if prompt:
            # the prompt's keys and values depend on the blocks before: one run for each node
            path = [calls.states[0]]
            for place, node in enumerate(nodes):
                recorded = recording_cache()
                follow(node, path, calls, recorded)
                # the same for all layers: some blocks ask the first layer for its length
                caches[place] = sharing_cache(recorded, [node.step.block] * len(blocks))
        batches = eval_set.batches(device=device, size=batch_size, model=model)
        for chosen, histories, lengths in batches:
            with batches.retry():
                # No block runs in this encoding. It makes the embeddings and records how each block
                # is called (mask, positions, cache), to repeat the call on other states.
                with standing_in(every), record_calls(blocks) as calls:
                    model.encode(histories, lengths, *prompt)
                rows = torch.arange(len(lengths), device=device)
                last = model.last_place(histories, lengths)
                path, ends = [calls.states[0]], [torch.empty(0)] * len(routes)
                for node, cache in zip(nodes, caches, strict=True):
                    state = follow(node, path, calls, cache)
                    for index in node.ending:
                        ends[index] = join_streams(state[..., rows, last, :])  # (B, D)
                yield chosen, torch.stack(ends)


def _check(blocks: nn.ModuleList, routes: Sequence[Route]) -> None:
    for steps in routes:
        kept = [step.block for step in steps]
        if not kept or kept != sorted(set(kept)) or not set(kept) <= set(range(len(blocks))):
            raise ValueError(f"{kept} is no route through {len(blocks)} blocks, in their order")
        for left_out in set(range(max(kept))) - set(kept):
            refuse_shared(blocks, left_out)


# Which blocks to leave out: greedy removal, which repeatedly drops the block with the least damage
# (SLEB, arXiv 2402.09025), and the spans that turn the state least.


@dataclass(frozen=True)
class Removal:
    """The blocks in the order of their removal, without the last one left."""

    removed: tuple[int, ...]  # (L - 1,) block indices
    scores: tuple[float, ...]  # (L,) NDCG@10 at full depth and after each removal; full ranking
    evaluated: int  # how many shallower models were scored for it

    def kept(self, depth: int) -> tuple[int, ...]:
        """The blocks that remain at a depth, 1..L."""
        gone = self.removed[: len(self.scores) - depth]
        return tuple(b for b in range(len(self.scores)) if b not in gone)


def greedy(model: CausalEncoder, eval_set: EvalSet, *, device: torch.device) -> Removal:
    """Remove the block whose absence costs the least, down to a single one.

    The first removal is chosen from all single skips, which one walk measures. Later ones are lazy:
    a block's damage is measured again only if it is the smallest known, and the block goes if it
    still is. Since a removal seldom makes another block dispensable, most are not measured again; a
    block whose damage has fallen below the smallest is missed. On ties the last block goes. Use
    validation users, never test users.
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
    damage = dict.fromkeys(left, -np.inf)  # at its last measurement
    while len(left) > 1:
        fresh: dict[int, float] = {}  # the scores without each block to measure now
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
    """All spans of ``length`` blocks, those that turn the state least first (arXiv 2403.17887).

    ``angular`` has distances between the states around L blocks, (L + 1, L + 1); ``first`` is the
    earliest block that a span may hold.
    """
    starts = np.arange(first, len(angular) - length)
    if length < 1 or not len(starts):
        raise ValueError(f"no run of {length} blocks from block {first} of {len(angular) - 1}")
    order = np.argsort(angular[starts, starts + length], kind="stable")
    return [(int(start), int(start) + length) for start in starts[order]]
