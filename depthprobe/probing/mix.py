"""Replacement by budget: what is left of each block, chosen by a knapsack over measured damages.

Each block is kept whole, loses its attention or its MLP, gives way to a linear map that is folded
into the MLP of the block before it, or is skipped. The damage of each option alone is measured in
one walk. Their sum over the blocks is what a combination is predicted to cost: the knapsack takes
the least sum under a budget. Damages need not add up, so what is chosen is measured, too.
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

# What is left of a block, by the method that measures it: in the order of the columns below.
KEPT, NO_ATTENTION, NO_MLP, MAP, SKIP = range(5)
OPTIONS = ("kept", "drop-attention", "drop-mlp", "replace", "skip")
Mix = tuple[int, ...]  # the option of each block
Array = NDArray[np.float64]

Left = Literal["attention", "mlp", "block"]
OPTION: dict[Left, int] = {"attention": NO_ATTENTION, "mlp": NO_MLP, "block": SKIP}
_WITHOUT: dict[int, Literal["nothing", "attention", "mlp"]]
_WITHOUT = {KEPT: "nothing", NO_ATTENTION: "attention", NO_MLP: "mlp"}


def mix_route(mix: Mix) -> Route:
    """The route through what is left of the blocks."""
    behind = (*mix[1:], KEPT)
    return tuple(
        Step(block, _WITHOUT[option], behind[block] == MAP)
        for block, option in enumerate(mix)
        if option in _WITHOUT
    )


def possible_options(model: CausalEncoder) -> NDArray[np.bool_]:
    """Which options each block has, (L, 5).

    Not every block has both parts, some hold keys and values that later blocks read, and a map
    stands behind an MLP that ends in a linear map, so never for the first block.
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
    """How to leave a part out of all blocks that can do without it."""
    having = np.flatnonzero(possible[:, OPTION[part]])
    return plan_skip(model.backbone, having.tolist(), part=part)


def part_sizes(
    backbone: nn.Module, part: Literal["attention", "mlp"], indices: Sequence[int] | None = None
) -> list[int]:
    """Numbers of weights of a part of each block, or of some blocks."""
    blocks, sizes = find_blocks(backbone), []
    chosen = range(len(blocks)) if indices is None else indices
    for index, branches in zip(chosen, find_sublayers(backbone, chosen), strict=True):
        paths = [b.path for b in branches if b.mixes == (part == "attention")]
        weights = (w for path in paths for w in blocks[index].get_submodule(path).parameters())
        sizes.append(sum(weight.numel() for weight in weights))
    return sizes


def option_costs(whole: ArrayLike, attention: ArrayLike, mlp: ArrayLike) -> Array:
    """What is left of a block's cost by option, (L, 5), from that of the block and its parts."""
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
    """What NDCG@10 loses by each option alone, (L, 5), in one walk; NaN where there is none."""
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
    """The options with the least summed damage that cost no more than the budget together.

    A knapsack with one choice a block, solved as an integer program. A map needs the MLP of the
    block before it, and something of one block stays.

    Args:
        damages: (L, 5) of each option alone; NaN where a block has no such option.
        costs: (L, 5), in the unit of the budget.

    Raises:
        ValueError: if nothing costs so little.
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
    """The sum over the blocks of a value (L, 5) by option: a predicted damage, a cost."""
    return float(values[np.arange(len(mix)), list(mix)].sum())
