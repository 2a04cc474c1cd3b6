"""How blocks add their branches up: what each adds to its input, in which order, by which factors.

``models.sublayers`` finds the modules that the branches come from; here is found what becomes of
their outputs until they are added, from the states that a few users really have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from depthprobe.evaluation.evaluate import Questions
from depthprobe.models.blocks import find_blocks
from depthprobe.models.sublayers import Branch, find_sublayers
from depthprobe.models.tap import first_tensor, input_state, tap_blocks
from depthprobe.probing.passes import Probed, encode, passes, prepare_prompt

FEW = 8  # users from whom is learnt how a block adds its branches up


@dataclass(frozen=True)
class Term:
    """A module whose output, times a factor, a block adds to its input: a branch's end."""

    path: str  # inside the block
    mixes: bool  # attention, else MLP
    factor: float


def find_sums(model: Probed, asked: Questions, *, device: torch.device) -> list[list[Term]]:
    """What each block adds to its input, in order; nothing for a block that is no such sum.

    A branch may pass a norm before it is added, and be scaled, and so may the whole. The norm is
    the module that is called with the very tensor that the branch returned; the factors are those
    that make the sum the block's output.

    Args:
        model: in evaluation mode.
        asked: some of their users are looked at, the first ones.

    Raises:
        ValueError: if the model is not read out as it says.
    """
    blocks = find_blocks(model.backbone)
    sublayers = _sublayers(blocks, model)
    few = replace(asked, users=asked.users[:FEW], histories=asked.histories[:FEW])
    # a pass of its own, as it checks the read-out, which runs some modules on other states
    (batch,) = passes(model, few, device=device)
    places, prompt = model.last_place(batch.lengths), prepare_prompt(model)
    with tap_blocks(model.backbone) as tap, _followed(blocks, sublayers) as ends:
        tap.positions = places
        encode(model, batch.histories, batch.lengths, prompt)
    found = []
    for index, branches in enumerate(sublayers):
        last = [ends.get((index, branch.path)) for branch in branches]
        ran = [end for end in last if end is not None]
        outputs = [_at(end.kept, places) for end in ran]
        factors = _factors(tap.states[index], outputs, tap.states[index + 1])
        whole = bool(factors) and len(ran) == len(branches)
        terms = zip(ran, branches, factors, strict=True) if whole else ()
        found.append([Term(end.path, branch.mixes, factor) for end, branch, factor in terms])
    return found


def _sublayers(blocks: nn.ModuleList, model: Probed) -> list[list[Branch]]:
    """The branches of each block; none where a block is no sum."""
    kinds = [repr(block) for block in blocks]  # blocks of the same modules have the same branches
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    try:
        branches_of = dict(zip(firsts, find_sublayers(model.backbone, firsts), strict=True))
    except ValueError:
        return [[] for _ in blocks]
    return [branches_of[kinds.index(kind)] for kind in kinds]


@dataclass
class Added:
    """The outputs of each block's terms in the latest pass, (B, D) where users are read out."""

    outputs: list[list[Tensor]]
    places: Tensor | None = None  # (B,)


@contextmanager
def watched(model: Probed, sums: Sequence[Sequence[Term]]) -> Iterator[Added]:
    """Within the context, passes leave the outputs of the terms, once the places are set."""
    added = Added([[torch.empty(0)] * len(terms) for terms in sums])

    def keep(block: int, place: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if added.places is not None:
                added.outputs[block][place] = _at(first_tensor(output), added.places)

        return hook

    handles = [
        block.get_submodule(term.path).register_forward_hook(keep(index, place))
        for index, block in enumerate(find_blocks(model.backbone))
        for place, term in enumerate(sums[index])
    ]
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()


def _at(output: Tensor, places: Tensor) -> Tensor:
    """The state of each user at one place, (B, D), from (B, T, D) or a flattened batch (B T, D)."""
    rows = output.reshape(-1, output.shape[-1])
    starts = torch.arange(0, len(rows), len(rows) // len(places), device=rows.device)
    return rows.index_select(0, starts + places.to(rows.device))


@dataclass(frozen=True)
class _End:
    """The last module that a branch's output has passed."""

    path: str  # inside the block
    output: Tensor  # the tensor that it returned, to know it by
    kept: Tensor  # a copy, since a block may add to the tensor in place


@contextmanager
def _followed(
    blocks: nn.ModuleList, sublayers: Sequence[Sequence[Branch]]
) -> Iterator[dict[tuple[int, str], _End]]:
    """Where each branch, by block and path, ends in the latest pass."""
    ends: dict[tuple[int, str], _End] = {}

    def follow(block: int, path: str) -> Callable[..., None]:
        branches = [branch.path for branch in sublayers[block]]

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            state, source = first_tensor(output), input_state(args, kwargs)
            for branch in branches:
                end = ends.get((block, branch))
                # of its size: a router of experts may be called with it, too
                passed = end is not None and end.output is source and _alike(state, source)
                if path == branch or passed:
                    ends[block, branch] = _End(path, state, state.clone())

        return hook

    handles = [
        module.register_forward_hook(follow(index, path), with_kwargs=True)
        for index, block in enumerate(blocks)
        for path, module in block.named_modules()
        if path and sublayers[index]
    ]
    try:
        yield ends
    finally:
        for handle in handles:
            handle.remove()


def _alike(one: object, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape


def _factors(state: Tensor, added: Sequence[Tensor], result: Tensor) -> list[float]:
    """By what each of ``added`` is multiplied in ``result / c = state + their sum``, all (B, D).

    Empty if there are no such numbers. Rounding is relative to the terms, so each equation is
    weighed by the size of its own: else a few huge features would hide all others.
    """
    terms = torch.stack([state, *added]).cpu().double().flatten(1)  # (k, B D)
    goal = result.cpu().double().flatten()
    weight = (terms.abs().sum(dim=0) + goal.abs()).clamp_min(1e-300)
    terms, goal = terms / weight, goal / weight
    if not (added and terms.isfinite().all() and goal.isfinite().all()):
        return []

    def error(numbers: Tensor) -> float:
        return float((numbers @ terms - goal).square().mean())

    found = torch.linalg.lstsq(terms.T, goal[:, None], driver="gelsd").solution[:, 0]
    plain = torch.ones_like(found)
    # k numbers fitted to rounding errors too fit a little better than the true ones, mostly all 1
    if error(plain) <= error(found) * (1 + 9 * len(terms) / len(goal)):
        found = plain
    # some of a float64 model's work is float32 whatever its weights are
    rounding = max(torch.finfo(kind).eps for kind in (result.dtype, torch.float32))
    if error(found) > (4 * rounding) ** 2 or found[0] == 0:
        return []
    factors: list[float] = (found[1:] / found[0]).tolist()
    return factors
