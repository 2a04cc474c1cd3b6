"""How much blocks, parts of a block and runs of blocks turn the state where users are read out.

All from one pass over the users, in memory that does not grow with them. None of it looks at a
target: these are the cheap measures of redundancy, to be held against what a cut really costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from depthprobe.evaluation.ranks import BATCH, EvalSet
from depthprobe.models.blocks import find_blocks
from depthprobe.models.parts import Branch, check_readable, find_sublayers, join_streams
from depthprobe.models.taps import first_tensor, input_state, tap_blocks
from depthprobe.probing.passes import CausalEncoder, exact, hooked, passes, shared_prompt

FEW = 8  # users from whom is learnt how a block adds its branches up
CONSTANT = 1e-10  # of a state's size: less than what two users' states can differ by
ROWS = 128  # of the sample's Gram matrices at once


@dataclass(frozen=True)
class Similarities:
    """Means over the users; L blocks, and L + 1 states: before the first and after each block.

    NaN: CKA with a state that all users share (the input, where a suffix follows the items), a part
    that a block does not have, and both parts of a block that is no sum of its input and its parts.
    """

    influence: np.ndarray  # (L,) 1 - cos(h_i, h_{i+1}), in [0, 2]
    angular: np.ndarray  # (L + 1, L + 1) arccos(cos(h_l, h_m)) / pi, in [0, 1], symmetric
    cka: np.ndarray  # (L + 1, L + 1) in [0, 1], symmetric
    cka_users: int  # how many users CKA is over
    norms: np.ndarray  # (L + 1,) Euclidean
    attention: np.ndarray  # (L,) 1 - cos(x, x + f(norm x)), in [0, 2]
    mlp: np.ndarray  # (L,) the same


@torch.inference_mode()
def similarities(
    model: CausalEncoder,
    eval_set: EvalSet,
    *,
    device: torch.device,
    cka_users: int = 2048,
    batch_size: int = BATCH,
) -> Similarities:
    """Compare the states around blocks and parts of blocks, where users are read out.

    Block influence is ShortGPT's (Men et al., arXiv 2403.03853), the angular distance that of
    Gromov et al. (arXiv 2403.17887), linear CKA that of Kornblith et al. (arXiv 1905.00414) on
    centred states, the influence of attention and MLP that of LLM-Drop (He et al., arXiv
    2406.15786). There x is the stream to which the part is added: the block's input plus the
    branches that ran before it, also where attention and MLP both read the block's input.

    States are compared in float64: in bfloat16, 1 - cos of a redundant block rounds to 0. At most
    ``cka_users`` users' states are kept, for CKA, drawn with a fixed seed.

    Raises:
        ValueError: without users, for a backbone without one state a position after each block, or
            if the model is not read out as it says.
    """
    users = len(eval_set.users)
    if not users:
        raise ValueError("no users to compare the states of")
    check_readable(model.backbone)
    sums = find_sums(model, eval_set, device=device)
    outputs = [[torch.empty(0)] * len(terms) for terms in sums]  # of each block's terms, (B, D)
    places = torch.empty(0)  # (B,) where the users of the batch are read out

    def keep(block: int, place: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            outputs[block][place] = _at(first_tensor(output), places)

        return hook

    hooks = [
        (block.get_submodule(term.path), keep(index, place))
        for index, block in enumerate(find_blocks(model.backbone))
        for place, term in enumerate(sums[index])
    ]

    sample, totals = _Sample(users, cka_users), [np.zeros(1)] * 4
    prompt, batches = shared_prompt(model), eval_set.batches(device=device, size=batch_size)
    with tap_blocks(model.backbone) as tap, hooked(hooks):
        for chosen, histories, lengths in batches:
            with batches.retry():
                tap.positions = places = model.last_place(lengths)
                model.encode(histories, lengths, *prompt)
                states = torch.stack([join_streams(state) for state in tap.states])  # (L+1, B, D)
                sample.put(chosen, states)
                wide = exact(states)
                size = wide.norm(dim=2, keepdim=True)  # (L + 1, B, 1)
                unit = (wide / size).transpose(0, 1)  # (B, L + 1, D)
                cosines = torch.bmm(unit, unit.mT).clamp_(-1, 1)  # (B, L + 1, L + 1)
                blocks = zip(wide[:-1], sums, outputs, strict=True)
                by_part = torch.stack([_part_influence(*block) for block in blocks])  # (L, 2, B)
                own = [
                    (1 - cosines.diagonal(1, 1, 2)).sum(dim=0),  # (L,)
                    cosines.acos().sum(dim=0) / np.pi,  # (L + 1, L + 1)
                    size[..., 0].sum(dim=1),  # (L + 1,)
                    by_part.sum(dim=2),  # (L, 2)
                ]
                pairs = zip(totals, own, strict=True)
                totals = [total + each.cpu().numpy() for total, each in pairs]
    influence, angular, norms, parts = (total / users for total in totals)
    np.fill_diagonal(angular, 0)
    return Similarities(
        influence=influence,
        angular=angular,
        cka=sample.cka(),
        cka_users=sample.users,
        norms=norms,
        attention=parts[:, 0],
        mlp=parts[:, 1],
    )


def to_frame(similarities: Similarities) -> pd.DataFrame:
    """One row a value: ``score``, the blocks [``start``, ``end``) that it speaks of, ``value``.

    Of a symmetric matrix each pair of states is there once, as the span between them. A norm has
    start = end = k: the state before block k, or after the last one.
    """
    states = np.arange(len(similarities.norms))
    pairs, blocks = np.triu_indices(len(states), 1), (states[:-1], states[1:])
    scores = [
        ("block-influence", blocks, similarities.influence),
        ("angular-distance", pairs, similarities.angular[pairs]),
        ("cka", pairs, similarities.cka[pairs]),
        ("norm", (states, states), similarities.norms),
        ("attention-influence", blocks, similarities.attention),
        ("mlp-influence", blocks, similarities.mlp),
    ]
    frames = [
        pd.DataFrame({"score": score, "start": start, "end": end, "value": value})
        for score, (start, end), value in scores
    ]
    return pd.concat(frames, ignore_index=True)


class _Sample:
    """The states of some users, and the linear CKA between them."""

    def __init__(self, users: int, most: int) -> None:
        chosen = np.random.default_rng(0).permutation(users)[:most]
        self.users = len(chosen)
        self._row = np.full(users, -1)  # where a user's states are kept; -1: nowhere
        self._row[chosen] = np.arange(self.users)
        self._states = torch.empty(0)  # (L + 1, n, D)

    def put(self, chosen: np.ndarray, states: Tensor) -> None:
        """Keep those of a batch's states (L + 1, B, D) whose users are in the sample."""
        if not self._states.numel():
            depths, _, width = states.shape
            dtype = torch.promote_types(states.dtype, torch.float32)
            self._states = states.new_empty(depths, self.users, width, dtype=dtype)
        rows = self._row[chosen]
        (inside,) = np.nonzero(rows >= 0)
        self._states[:, rows[inside]] = states[:, inside].to(self._states.dtype)

    def cka(self) -> np.ndarray:
        """``||Y'X||^2 / (||X'X|| ||Y'Y||)`` of each two, (L + 1, L + 1); uses the states up."""
        for kept in self._states:
            state = exact(kept)
            centred = state - state.mean(dim=0)
            scale = centred.norm()  # products of states of size 1 stay in any dtype's range
            varied = bool(scale > CONSTANT * state.norm())
            kept.copy_(centred.div_(scale if varied else torch.nan))
        depths, users, width = self._states.shape
        # a product of features costs n D^2 for each of the pairs, one of users n^2 D for each state
        fewer_features = (depths + 1) * width < 2 * users
        common = (_by_feature if fewer_features else _by_user)(self._states)
        own = common.diagonal().sqrt()
        return (common / (own[:, None] * own)).clamp(0, 1).cpu().numpy()


def _by_feature(states: Tensor) -> Tensor:
    """``||Y'X||^2`` of each two of n users' states (L + 1, n, D), by their (D, D) products."""
    common = torch.zeros(len(states), len(states), dtype=torch.float64)
    for k, state in enumerate(states):
        products = torch.bmm(states[: k + 1].mT, state.expand(k + 1, -1, -1))  # (k + 1, D, D)
        common[k, : k + 1] = exact(products).square().sum(dim=(1, 2))
    return common + common.tril(-1).mT


def _by_user(states: Tensor) -> Tensor:
    """The same as ``sum(XX' * YY')``, by some rows of the (n, n) products at a time."""
    common = torch.zeros(len(states), len(states), dtype=torch.float64)
    for rows in states.split(ROWS, dim=1):
        products = torch.bmm(rows, states.mT).flatten(1)  # (L + 1, R n)
        common += (products @ products.mT).cpu()
    return common


# Parts of a block: what it adds to its input, in which order, by which factors.


class Term(NamedTuple):
    """A module whose output, times a factor, a block adds to its input: a branch's end."""

    path: str  # inside the block
    mixes: bool  # attention, else MLP
    factor: float


def _part_influence(state: Tensor, terms: Sequence[Term], outputs: Sequence[Tensor]) -> Tensor:
    """``1 - cos(x, x + f)`` of attention and of MLP by user, (2, B), from a block's input (B, D).

    Several branches of one kind are one part.
    """
    added = [term.factor * exact(output) for term, output in zip(terms, outputs, strict=True)]
    influence = state.new_full((2, len(state)), torch.nan)
    for part, mixes in enumerate((True, False)):
        own = [place for place, term in enumerate(terms) if term.mixes == mixes]
        if own:
            before = sum(added[: own[0]], start=state)
            after = sum((added[place] for place in own), start=before)
            cosine = (before * after).sum(dim=1) / (before.norm(dim=1) * after.norm(dim=1))
            influence[part] = 1 - cosine.clamp_(-1, 1)
    return influence


class _BranchEnd(NamedTuple):
    """The last module that a branch's output has passed."""

    path: str  # inside the block
    output: Tensor  # the tensor that it returned, to know it by
    copy: Tensor  # since a block may add to the tensor in place


def find_sums(model: CausalEncoder, eval_set: EvalSet, *, device: torch.device) -> list[list[Term]]:
    """What each block adds to its input, in order; nothing for a block that is no such sum.

    A branch may pass a norm before it is added: the module that is called with the very tensor that
    the branch returned. The factors are those that make the sum the block's output, for few users.
    """
    blocks = find_blocks(model.backbone)
    branches_of = _branches(blocks, model)
    few = replace(eval_set, users=eval_set.users[:FEW], histories=eval_set.histories[:FEW])
    # a pass of its own checks the read-out, as that runs some modules on other states
    for _ in passes(model, few, device=device):
        pass
    ends: dict[tuple[int, str], _BranchEnd] = {}  # by block and branch

    def follow(block: int, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            state, source = first_tensor(output), input_state(args, kwargs)
            if not isinstance(state, Tensor):
                return
            for branch in branches_of[block]:
                end = ends.get((block, branch.path))
                # of its size: a router of experts may be called with it, too
                passed = end is not None and end.output is source and state.shape == source.shape
                if path == branch.path or passed:
                    ends[block, branch.path] = _BranchEnd(path, state, state.clone())

        return hook

    hooks = [
        (module, follow(index, path))
        for index, block in enumerate(blocks)
        for path, module in block.named_modules()
        if path and branches_of[index]
    ]
    ((_, histories, lengths),) = few.batches(device=device)
    places, prompt = model.last_place(lengths), shared_prompt(model)
    with tap_blocks(model.backbone) as tap, hooked(hooks):
        tap.positions = places
        model.encode(histories, lengths, *prompt)
    sums: list[list[Term]] = []
    for index, branches in enumerate(branches_of):
        own = [ends[index, b.path] for b in branches if (index, b.path) in ends]
        outputs = [_at(end.copy, places) for end in own]
        factors = _factors(tap.states[index], outputs, tap.states[index + 1])
        is_sum = bool(factors) and len(own) == len(branches)
        terms = zip(own, branches, factors, strict=True) if is_sum else ()
        sums.append([Term(end.path, branch.mixes, factor) for end, branch, factor in terms])
    return sums


def _branches(blocks: nn.ModuleList, model: CausalEncoder) -> list[list[Branch]]:
    """The branches of each block; none where a block is no sum."""
    kinds = [repr(block) for block in blocks]  # blocks of the same modules have the same branches
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    try:
        branches_of = dict(zip(firsts, find_sublayers(model.backbone, firsts), strict=True))
    except ValueError:
        return [[] for _ in blocks]
    return [branches_of[kinds.index(kind)] for kind in kinds]


def _at(output: Tensor, places: Tensor) -> Tensor:
    """The state of each user at one place, (B, D), from (B, T, D) or a flattened batch (B T, D)."""
    rows = output.reshape(-1, output.shape[-1])
    starts = torch.arange(0, len(rows), len(rows) // len(places), device=rows.device)
    return rows.index_select(0, starts + places.to(rows.device))


def _factors(state: Tensor, added: Sequence[Tensor], result: Tensor) -> list[float]:
    """By what each of ``added`` is multiplied in ``result / c = state + their sum``, all (B, D).

    Empty if there are no such numbers.
    """
    terms = torch.stack([state, *added]).cpu().double().flatten(1)  # (k, B D)
    goal = result.cpu().double().flatten()
    # rounding is relative to an equation's terms: else a few huge features would hide all others
    weight = (terms.abs().sum(dim=0) + goal.abs()).clamp_min(1e-300)
    terms, goal = terms / weight, goal / weight
    if not (added and terms.isfinite().all() and goal.isfinite().all()):
        return []

    def error(numbers: Tensor) -> float:
        return float((numbers @ terms - goal).square().mean())

    fitted = torch.linalg.lstsq(terms.T, goal[:, None], driver="gelsd").solution[:, 0]
    plain = torch.ones_like(fitted)
    # k numbers fitted to rounding errors too fit a little better than the true ones, mostly all 1
    if error(plain) <= error(fitted) * (1 + 9 * len(terms) / len(goal)):
        fitted = plain
    # some of a float64 model's work is float32 whatever its weights are
    rounding = max(torch.finfo(kind).eps for kind in (result.dtype, torch.float32))
    if error(fitted) > (4 * rounding) ** 2 or fitted[0] == 0:
        return []
    factors: list[float] = (fitted[1:] / fitted[0]).tolist()
    return factors
