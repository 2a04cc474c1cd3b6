"""Replacement by budget: a knapsack over measured damages chooses what to keep of each block.

Each block is kept whole, loses its attention or its MLP, is replaced by a linear map that is folded
into the MLP of the block before it, or is skipped. One walk measures the damage of each single
option. The predicted damage of a combination is their sum over the blocks, and the knapsack
minimises it under a budget. Damages need not add up, so the chosen combination is measured too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from depthprobe.evaluation.ranks import EvalSet, mean_ndcg
from depthprobe.models.blocks import find_blocks
from depthprobe.models.parts import find_projection, find_sublayers
from depthprobe.models.skipping import plan_skip
from depthprobe.models.taps import Plan
from depthprobe.probing.passes import CausalEncoder
from depthprobe.probing.replace import fit_replacements, plan_fold
from depthprobe.probing.walk import Route, Step, rank_routes, route

# The options of a block, by the method that measures them, in the order of the columns below.
KEPT, NO_ATTENTION, NO_MLP, MAP, SKIP = range(5)
OPTIONS = ("kept", "drop-attention", "drop-mlp", "replace", "skip")
Mix = tuple[int, ...]  # the option of each block
Array = NDArray[np.float64]

Left = Literal["attention", "mlp", "block"]
OPTION: dict[Left, int] = {"attention": NO_ATTENTION, "mlp": NO_MLP, "block": SKIP}
_WITHOUT: dict[int, Literal["nothing", "attention", "mlp"]]
_WITHOUT = {KEPT: "nothing", NO_ATTENTION: "attention", NO_MLP: "mlp"}


def mix_route(mix: Mix) -> Route:
    """The route through the blocks with these options."""
    behind = (*mix[1:], KEPT)
    return tuple(
        Step(block, _WITHOUT[option], behind[block] == MAP)
        for block, option in enumerate(mix)
        if option in _WITHOUT
    )


def possible_options(model: CausalEncoder) -> NDArray[np.bool_]:
    """Which options each block has, (L, 5).

    Not every block has both parts, and some hold keys and values that later blocks read. A map
    needs a previous block whose MLP ends in a linear map, so the first block can't have one.
    """
    blocks = len(find_blocks(model.backbone))
    found = np.zeros((blocks, len(OPTIONS)), dtype=bool)
    found[:, KEPT] = True
    for block in range(blocks):
        for part, option in OPTION.items():
            with suppress(ValueError):
                plan_skip(model.backbone, {block}, part=part)
                found[block, option] = True
        if block and found[block, SKIP]:
            with suppress(ValueError):
                find_projection(model.backbone, block - 1)
                found[block, MAP] = True
    return found


def plan_without(model: CausalEncoder, part: Left, possible: NDArray[np.bool_]) -> Plan:
    """Plan to skip a part in all blocks in which it can be skipped."""
    having = np.flatnonzero(possible[:, OPTION[part]])
    return plan_skip(model.backbone, having.tolist(), part=part)


def part_sizes(
    backbone: nn.Module, part: Literal["attention", "mlp"], indices: Sequence[int] | None = None
) -> list[int]:
    """The number of weights of a part, for each block or for some blocks."""
    blocks, sizes = find_blocks(backbone), []
    chosen = range(len(blocks)) if indices is None else indices
    for index, branches in zip(chosen, find_sublayers(backbone, chosen), strict=True):
        paths = [b.path for b in branches if b.mixes == (part == "attention")]
        weights = (w for path in paths for w in blocks[index].get_submodule(path).parameters())
        sizes.append(sum(weight.numel() for weight in weights))
    return sizes


def option_costs(whole: ArrayLike, attention: ArrayLike, mlp: ArrayLike) -> Array:
    """The cost of each block under each option, (L, 5), from those of the block and its parts."""
    block = np.asarray(whole, dtype=np.float64)
    rest = [np.maximum(block - np.asarray(part), 0) for part in (attention, mlp)]
    none = np.zeros_like(block)
    return np.stack([block, *rest, none, none], axis=1)


def fit_maps(
    model: CausalEncoder,
    eval_set: EvalSet,
    possible: NDArray[np.bool_],
    *,
    device: torch.device,
) -> dict[int, Plan]:
    """A linear map for each block that can be replaced, by the block that carries it."""
    spans = [(int(block), int(block) + 1) for block in np.flatnonzero(possible[:, MAP])]
    fitted = fit_replacements(model, eval_set, spans, device=device)
    return {linear.start - 1: plan_fold(model, linear) for linear in fitted}


def measure_damages(
    model: CausalEncoder,
    eval_set: EvalSet,
    possible: NDArray[np.bool_],
    folded: Mapping[int, Plan],
    *,
    device: torch.device,
) -> Array:
    """The loss of NDCG@10 by each single option, (L, 5), in one walk; NaN if there is none."""
    whole = [KEPT] * len(possible)
    places = [(int(b), int(o)) for b, o in np.argwhere(possible) if o != KEPT]
    alone = [tuple(whole[:b] + [option] + whole[b + 1 :]) for b, option in places]
    routes = [route(range(len(whole))), *map(mix_route, alone)]
    ranks = rank_routes(model, eval_set, routes, device=device, folded=folded)
    scores = [mean_ndcg(each["full"]) for each in ranks]
    damages = np.full(possible.shape, np.nan)
    damages[:, KEPT] = 0
    for place, score in zip(places, scores[1:], strict=True):
        damages[place] = scores[0] - score
    return damages


def choose(damages: Array, costs: Array, budget: float) -> Mix:
    """The options with the least total damage whose total cost is within the budget.

    A knapsack with one choice per block, solved as an integer program. A map needs the MLP of the
    block before it, and some part of at least one block must stay.

    Args:
        damages: (L, 5) of each option alone; NaN where a block has no such option.
        costs: (L, 5), in the unit of the budget.

    Raises:
        ValueError: if nothing fits the budget.
    """
    blocks, known = len(damages), np.isfinite(damages)
    chosen = np.eye(blocks * len(OPTIONS)).reshape(blocks, len(OPTIONS), -1)  # by (block, option)
    carries, stays = chosen[:, [KEPT, NO_ATTENTION]].sum(axis=1), chosen[:, : NO_MLP + 1]
    # the solver's tolerances are absolute, and damages may be a thousandth of a point
    loss = np.where(known, damages, 0)
    unit = 1e-3 * float(np.abs(loss).max()) or 1.0
    found = milp(
        loss.ravel() / unit,
        integrality=np.ones(known.size),
        bounds=Bounds(0, known.ravel().astype(float)),
        constraints=[
            LinearConstraint(chosen.sum(axis=1), 1, 1),
            LinearConstraint(costs.ravel() / budget, -np.inf, 1 + 1e-9),
            LinearConstraint(chosen[1:, MAP] - carries[:-1], -np.inf, 0),
            LinearConstraint(stays.sum(axis=(0, 1)), 1, np.inf),
        ],
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise ValueError(f"no combination of options costs {budget:g} or less: {found.message}")
    return tuple(map(int, found.x.reshape(blocks, -1).argmax(axis=1)))


def total(values: Array, mix: Mix) -> float:
    """Sum a value (L, 5) over the blocks at their options: a predicted damage, or a cost."""
    return float(values[np.arange(len(mix)), list(mix)].sum())
