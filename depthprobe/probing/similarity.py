"""How much blocks, parts of blocks and spans of blocks turn the state where users are read out.

Everything comes from one pass over the users, in constant memory, and without targets. These are
the cheap measures of redundancy, to be compared with what a cut really costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthprobe.evaluation.ranks import BATCH, EvalSet, shared_prompt
from depthprobe.models.blocks import find_blocks
from depthprobe.models.parts import check_readable, find_sublayers, join_streams
from depthprobe.models.skipping import plan_branches
from depthprobe.models.taps import (
    Plan,
    first_tensor,
    paused_taps,
    record_calls,
    standing_in,
    tap_blocks,
)
from depthprobe.probing.passes import CausalEncoder, exact, passes

FEW = 8  # users that test whether the model is read out as it declares
CONSTANT = 1e-10  # of a state's size: smaller than any real difference of two users' states
ROWS = 128  # of the sample's Gram matrices at a time


@dataclass(frozen=True)
class Similarities:
    """Means over the users; L blocks, and L + 1 states: before the first and after each block.

    NaN for: CKA with a state that all users share (the input, if a suffix follows the items); a
    part that a block lacks; both parts if a block is no sum of its input and its parts.
    """

    influence: np.ndarray  # (L,) 1 - cos(h_i, h_{i+1}), in [0, 2]
    angular: np.ndarray  # (L + 1, L + 1) arccos(cos(h_l, h_m)) / pi, in [0, 1], symmetric
    cka: np.ndarray  # (L + 1, L + 1) in [0, 1], symmetric
    cka_users: int  # number of users for CKA
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
    2406.15786). There x is the stream to which the part is added, and the stream between a block's
    two parts is what the block returns without the later one.

    States are compared in float64: in bfloat16, 1 - cos of a redundant block rounds to 0. At most
    ``cka_users`` users' states are kept, for CKA, drawn with a fixed seed.

    Raises:
        ValueError: without users, for a backbone without one state per position after each block,
            or if the model is not read out as it declares.
    """
    users = len(eval_set.users)
    if not users:
        raise ValueError("no users to compare the states of")
    check_readable(model.backbone)
    few = replace(eval_set, users=eval_set.users[:FEW], histories=eval_set.histories[:FEW])
    for _ in passes(model, few, device=device):
        pass
    blocks, orders = find_blocks(model.backbone), _part_orders(model)
    sample, totals = _Sample(users, cka_users), [np.zeros(1)] * 4
    batches = eval_set.batches(device=device, size=batch_size, model=model)
    prompt = shared_prompt(model)
    with tap_blocks(model.backbone) as tap, record_calls(blocks) as calls:
        for chosen, histories, lengths in batches:
            with batches.retry():
                tap.positions = places = model.last_place(histories, lengths)
                model.encode(histories, lengths, *prompt)
                states = torch.stack([join_streams(state) for state in tap.states])  # (L+1, B, D)
                sample.put(chosen, states)
                wide = exact(states)
                size = wide.norm(dim=2, keepdim=True)  # (L + 1, B, 1)
                unit = (wide / size).transpose(0, 1)  # (B, L + 1, D)
                cosines = torch.bmm(unit, unit.mT).clamp_(-1, 1)  # (B, L + 1, L + 1)
                by_part = wide.new_full((len(blocks), 2), torch.nan)  # attention, MLP
                rows = torch.arange(len(places), device=places.device)
                for k, (first, plan) in orders.items():
                    between = wide[k + 1]
                    if plan:  # call the block again on its recorded state
                        with paused_taps(), standing_in(plan):
                            again = calls.repeat(blocks[k], k, calls.states[k], *prompt)
                        between = exact(first_tensor(again)[rows, places])  # (B, D)
                        by_part[k, 1 - first] = _turned(between, wide[k + 1])
                    by_part[k, first] = _turned(wide[k], between)
                own = [
                    (1 - cosines.diagonal(1, 1, 2)).sum(dim=0),  # (L,)
                    cosines.acos().sum(dim=0) / np.pi,  # (L + 1, L + 1)
                    size[..., 0].sum(dim=1),  # (L + 1,)
                    by_part,
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
    """One row per value: ``score``, the blocks [``start``, ``end``) that it is about, ``value``.

    A symmetric matrix gives each pair of states once, as the span between them. A norm has
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
        self._row = np.full(users, -1)  # where a user's states are stored; -1: not in the sample
        self._row[chosen] = np.arange(self.users)
        self._states = torch.empty(0)  # (L + 1, n, D)

    def put(self, chosen: np.ndarray, states: Tensor) -> None:
        """Store the states (L + 1, B, D) of a batch's users who are in the sample."""
        if not self._states.numel():
            depths, _, width = states.shape
            dtype = torch.promote_types(states.dtype, torch.float32)
            self._states = states.new_empty(depths, self.users, width, dtype=dtype)
        rows = self._row[chosen]
        (inside,) = np.nonzero(rows >= 0)
        self._states[:, rows[inside]] = states[:, inside].to(self._states.dtype)

    def cka(self) -> np.ndarray:
        """``||Y'X||^2 / (||X'X|| ||Y'Y||)`` of each pair, (L + 1, L + 1); destroys the states."""
        for kept in self._states:
            state = exact(kept)
            centred = state - state.mean(dim=0)
            scale = centred.norm()  # products of states of size 1 stay in any dtype's range
            varied = bool(scale > CONSTANT * state.norm())
            kept.copy_(centred.div_(scale if varied else torch.nan))
        # ||Y'X||^2 = sum(XX' * YY'), by some rows of the (n, n) products at a time
        depths = len(self._states)
        common = torch.zeros(depths, depths, dtype=torch.float64)
        for rows in self._states.split(ROWS, dim=1):
            products = torch.bmm(rows, self._states.mT).flatten(1)  # (L + 1, R n)
            common += (products @ products.mT).cpu()
        own = common.diagonal().sqrt()
        return (common / (own[:, None] * own)).clamp(0, 1).cpu().numpy()


def _part_orders(model: CausalEncoder) -> dict[int, tuple[int, Plan]]:
    """By block: which part is added first, 0 attention or 1 MLP, and a plan to skip the other.

    No plan if the block has one part; no entry if it is no sum of its input and its parts.
    """
    blocks = find_blocks(model.backbone)
    kinds = [repr(block) for block in blocks]  # blocks of the same modules have the same branches
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    try:
        branches_of = dict(zip(firsts, find_sublayers(model.backbone, firsts), strict=True))
    except ValueError:
        return {}
    orders: dict[int, tuple[int, Plan]] = {}
    for k, kind in enumerate(kinds):
        branches = branches_of[kinds.index(kind)]
        later = [branch for branch in branches if branch.mixes != branches[0].mixes]
        orders[k] = (int(not branches[0].mixes), plan_branches(blocks[k], k, later))
    return orders


def _turned(before: Tensor, after: Tensor) -> Tensor:
    """The sum over users of ``1 - cos`` of states (B, D), a scalar."""
    cosine = (before * after).sum(dim=1) / (before.norm(dim=1) * after.norm(dim=1))
    total: Tensor = (1 - cosine.clamp(-1, 1)).sum()
    return total
