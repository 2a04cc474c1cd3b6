"""Which MLP channels and attention heads matter: by their activations, or for the loss."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.evaluation.ranks import EvalSet, shared_prompt
from depthprobe.models.blocks import find_blocks
from depthprobe.models.narrowing import Kind, Narrowing, UnitScores
from depthprobe.probing.passes import CausalEncoder
from depthprobe.probing.taylor import weight_slopes

USERS = 1024  # as many texts as Minitron and LLM-Pruner use, or more


def unit_scores(
    model: CausalEncoder,
    plan: Narrowing,
    eval_set: EvalSet,
    *,
    by: Literal["activation", "taylor"],
    device: torch.device,
) -> UnitScores:
    """The importance of each unit of each block, (L, units) by kind, from at most ``USERS`` users.

    By ``activation``: the mean absolute activation over positions, for a head also over its width
    (Minitron, arXiv 2407.14679). By ``taylor``:
    ``sum |W * dL/dW|`` over its weights, keys and values for their group (LLM-Pruner, arXiv
    2305.11627; Minitron's and ours differ in the order of sum and absolute value).
    """
    chosen = np.unique(np.linspace(0, len(eval_set.users) - 1, USERS).astype(int))
    few = replace(
        eval_set,
        users=eval_set.users[chosen],
        histories=[eval_set.histories[index] for index in chosen],
        targets=eval_set.targets[chosen],
    )
    if by == "taylor":
        return _slopes(model, plan, few, device=device)
    return _activations(model, plan, few, device=device)


@torch.inference_mode()
def _activations(
    model: CausalEncoder, plan: Narrowing, eval_set: EvalSet, *, device: torch.device
) -> UnitScores:
    prompt, blocks = shared_prompt(model), find_blocks(model.backbone)
    totals, positions = _zeros(plan, len(blocks)), 0
    last = torch.zeros(0)  # of the batch that is encoded, each user's last position, (B,)
    seen: dict[tuple[Kind, int], Tensor] = {}  # of this batch only: it may come again in halves

    def watch(kind: Kind, index: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        states = args[0].float().abs()
        states = states.reshape(len(last), -1, states.shape[-1])  # (B, P, C) or (B, P, H d)
        real = torch.arange(states.shape[1], device=device) <= last[:, None]  # (B, P)
        seen[kind, index] = (states * real[..., None]).sum((0, 1)).cpu().double()

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            for kind, end in plan.ends(block):
                hook = end.register_forward_pre_hook(partial(watch, kind, index))
                hooks.callback(hook.remove)
        batches = eval_set.batches(device=device, model=model)
        for _, histories, lengths in batches:
            last = model.last_place(histories, lengths)
            with batches.retry():
                model.encode(histories, lengths, *prompt)
                for (kind, index), amount in seen.items():
                    if kind == "heads":  # the places of the groups stay 0
                        amount = amount.view(plan.before.heads, -1).mean(1)
                    totals[kind][index, : len(amount)] += amount
                positions += int(last.sum()) + len(last)
    return {kind: total / max(1, positions) for kind, total in totals.items()}


def _slopes(
    model: CausalEncoder, plan: Narrowing, eval_set: EvalSet, *, device: torch.device
) -> UnitScores:
    slopes, blocks = weight_slopes(model, eval_set, device=device), find_blocks(model.backbone)
    totals = _zeros(plan, len(blocks))
    for index, block in enumerate(blocks):
        for path, dim, kind, owner in plan.owners():
            weight = block.get_parameter(path)
            if weight in slopes:
                amount = (weight.detach() * slopes[weight]).abs().movedim(dim, 0).flatten(1).sum(1)
                totals[kind][index].index_add_(0, owner, amount.cpu().double())
    return totals


def _zeros(plan: Narrowing, blocks: int) -> dict[Kind, Tensor]:
    return {kind: torch.zeros(blocks, many).double() for kind, many in plan.units.items()}
