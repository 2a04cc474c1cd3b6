"""Any number of shallower models in one walk over the teacher's blocks, none of them cut.

A model with some blocks left out is a route through the blocks, and routes that begin alike share
their states: they form a tree, and each of its nodes runs one block once. All L single skips take
(L + 1) / 2 passes in place of L, and all contiguous spans about L^2 / 6 in place of L^2 / 3. The
tree is walked depth first, so no more states are held than the tree is deep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from depthprobe.evaluation.ranks import BATCH, EvalSet
from depthprobe.models.blocks import find_blocks
from depthprobe.models.parts import check_readable, join_streams
from depthprobe.models.prompt import recording_cache, sharing_cache
from depthprobe.models.skipping import Plan, plan_skip, refuse_shared, standing_in
from depthprobe.models.taps import BlockCalls, first_tensor, record_calls
from depthprobe.probing.passes import BatchStates, CausalEncoder, encode, prepare_prompt, vectors_of


class Step(NamedTuple):
    """A block that runs, and which of its parts is left out."""

    block: int
    without: Literal["nothing", "attention", "mlp"] = "nothing"


Route = tuple[Step, ...]


def route(kept: Iterable[int]) -> Route:
    """The route through these blocks, all of each."""
    return tuple(Step(block) for block in kept)


def route_without(part: Literal["attention", "mlp"], block: int, depth: int) -> Route:
    """The route through all blocks, with one part of one of them left out."""
    return tuple(Step(b, part if b == block else "nothing") for b in range(depth))


@dataclass
class _Node:
    """The state that routes share after the steps from the root to here."""

    ending: list[int] = field(default_factory=list)  # indices of the routes that end here
    after: dict[Step, _Node] = field(default_factory=dict)
    prompt: Cache | None = None  # its keys and values in the last step's block, on this route

    @property
    def size(self) -> int:
        """How many blocks are run from here on."""
        return sum(1 + child.size for child in self.after.values())


def _tree(routes: Sequence[Route]) -> _Node:
    """A trie: routes [0, 1], [0, 2] and [1, 2] run block 0 once, and five blocks in all."""
    root = _Node()
    for index, steps in enumerate(routes):
        node = root
        for step in steps:
            node = node.after.setdefault(step, _Node())
        node.ending.append(index)
    return root


def blocks_run(routes: Sequence[Route]) -> int:
    """How many blocks a walk over these routes runs: L of them cost what one encoding does.

    >>> blocks_run([route([0, 1]), route([0, 2]), route([1, 2])])
    5
    """
    return _tree(routes).size


@torch.inference_mode()
def rank_routes(
    model: CausalEncoder, eval_set: EvalSet, routes: Sequence[Route], *, device: torch.device
) -> list[dict[str, np.ndarray]]:
    """Ranks of every user's target on each route, by protocol, each (E,).

    Equal to the ranks of models that have these blocks alone, cut with ``keep_blocks``. A route
    goes through the model's blocks in their order.

    Raises:
        ValueError: if a route leaves out what a later block of it needs, or a block has no such
            part; for a backbone that has no state to read out after each block.
    """
    check_readable(model.backbone)
    batches = walk(model, eval_set, routes, device=device)
    vectors = ((batch.chosen, vectors_of(model, batch.states)) for batch in batches)
    return eval_set.rank_models(vectors, model.item_matrix())


def walk(
    model: CausalEncoder,
    eval_set: EvalSet,
    routes: Sequence[Route],
    *,
    device: torch.device,
    batch_size: int = BATCH,
) -> Iterator[BatchStates]:
    """Yield each batch with its state at the end of each route, (routes, B, D), before the norm."""
    if not routes:
        return
    blocks = find_blocks(model.backbone)
    _check(blocks, routes)
    tree, steps = _tree(routes), {step for each in routes for step in each}
    plans = {
        step: plan_skip(model.backbone, {step.block}, part=step.without)
        for step in steps
        if step.without != "nothing"
    }
    walker = _Walker(blocks, plans)
    every = plan_skip(model.backbone, range(len(blocks)))

    def run(chosen: np.ndarray, histories: Tensor, lengths: Tensor) -> BatchStates:
        # No block runs in this encoding. It makes the embeddings and shows what each block is
        # called with (mask, positions, cache), so that the walk can call it so on other states.
        with standing_in(every), record_calls(blocks) as calls:
            encode(model, histories, lengths, prompt)
        ends = dict(walker.run(tree, calls, calls.states[0], model.last_place(lengths)))
        states = torch.stack([ends[index] for index in range(len(routes))])  # (routes, B, D)
        return BatchStates(chosen, histories, lengths, states)

    with torch.compiler.set_stance("force_eager"):
        with standing_in(every), record_calls(blocks) as calls:
            prompt = prepare_prompt(model)
        if prompt is not None:
            # the prompt's keys and values depend on the blocks before: one run for each route
            walker.run_prompt(tree, calls, calls.states[0])
        for _, batch in eval_set.map_batches(run, device=device, size=batch_size):
            yield batch


@dataclass(frozen=True)
class _Walker:
    blocks: nn.ModuleList
    plans: dict[Step, Plan]  # of the steps that leave a part out

    def run_prompt(self, node: _Node, calls: BlockCalls, state: Tensor) -> None:
        """Leave each node the prompt's keys and values in its block, behind the steps before it."""
        for step, child in node.after.items():
            recorded = recording_cache()
            after = self._step(step, calls, state, recorded)
            # all alike, since some blocks ask the cache's first layer for its length
            child.prompt = sharing_cache(recorded, [step.block] * len(self.blocks))
            self.run_prompt(child, calls, after)

    def run(
        self, node: _Node, calls: BlockCalls, state: Tensor, place: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """The state (B, D) at ``place`` where each route ends, by the route's index.

        Depth first: ``state`` (B, T, D) is held once for each step on the way from the root.
        """
        if node.ending:
            rows = torch.arange(len(place), device=place.device)
            last = join_streams(state[..., rows, place, :])
            yield from ((index, last) for index in node.ending)
        for step, child in node.after.items():
            yield from self.run(child, calls, self._step(step, calls, state, child.prompt), place)

    def _step(self, step: Step, calls: BlockCalls, state: Tensor, cache: Cache | None) -> Tensor:
        with standing_in(self.plans[step]) if step in self.plans else nullcontext():
            output = calls.repeat(self.blocks[step.block], step.block, state, cache)
        after: Tensor = first_tensor(output)
        return after


def _check(blocks: nn.ModuleList, routes: Sequence[Route]) -> None:
    for steps in routes:
        kept = [step.block for step in steps]
        if kept != sorted(set(kept)) or not set(kept) <= set(range(len(blocks))):
            raise ValueError(f"{kept} is no route through {len(blocks)} blocks, in their order")
        for left_out in set(range(max(kept, default=0))) - set(kept):
            refuse_shared(blocks, left_out)
