"""The ``mix`` method: keep as much of each block as a budget allows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from depthprobe.cost.flops import Products, UncountableError, product_counter, score_flops
from depthprobe.cost.size import count_parameters, parameters_by_block
from depthprobe.evaluation.ranks import mean_ndcg
from depthprobe.methods import Task
from depthprobe.models.build import merge_lora
from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import Plan, standing_in
from depthprobe.probing.mix import (
    KEPT,
    OPTION,
    OPTIONS,
    Array,
    choose,
    fit_maps,
    measure_damages,
    mix_route,
    option_costs,
    part_sizes,
    plan_without,
    possible_options,
    total,
)
from depthprobe.probing.walk import rank_routes, route
from depthprobe.runs.context import Context, Result, Scores
from depthprobe.runs.records import TIMING
from depthprobe.runs.timing import WITHOUT, read_timing

logger = logging.getLogger(__name__)


def mixes(context: Context, task: Task) -> Iterator[Result | Scores]:
    """The teacher under a budget of whole blocks: parts or linear maps replace some blocks.

    Maps, damages and choices come from validation users. The table has the choices, with predicted
    and true damage. It is written first, so that finished trials always have one.
    """
    teacher, device = copy.deepcopy(context.teacher(task.seed, task.blocks)), context.device
    merge_lora(teacher)
    possible = possible_options(teacher)
    folded = fit_maps(teacher, context.validation, possible, device=device)
    damages = measure_damages(teacher, context.validation, possible, folded, device=device)
    parts = (part_sizes(teacher.backbone, part) for part in ("attention", "mlp"))
    weights = option_costs(parameters_by_block(teacher), *parts)
    budget = context.study.probing.budget
    costs = weights
    if budget == "milliseconds":
        costs = share_time(read_timing(context.shared / TIMING)["seconds"], possible)
    full = costs[:, KEPT].sum()
    chosen = [choose(damages, costs, full * t.depth / task.blocks) for t in task.trials]
    routes = [route(range(task.blocks)), *map(mix_route, chosen)]
    on_validation, on_test = (
        rank_routes(teacher, users, routes, device=device, folded=folded)
        for users in (context.validation, context.test)
    )
    scores = {
        name: np.array([mean_ndcg(ranks["full"]) for ranks in ranked])
        for name, ranked in (("validation", on_validation), ("test", on_test))
    }
    # as shares of the teacher's, like all changes in a report
    lost = {name: (own[0] - own) / (own[0] or 1.0) for name, own in scores.items()}
    shares = damages / (scores["validation"][0] or 1.0)
    frames = []
    for place, (trial, mix) in enumerate(zip(task.trials, chosen, strict=True), start=1):
        frame = pd.DataFrame({"depth": trial.depth, "block": range(task.blocks)})
        frame["option"] = [OPTIONS[option] for option in mix]
        frame["damage"] = shares[np.arange(task.blocks), list(mix)]
        frame["budget"], frame["share"] = budget, total(costs, mix) / full
        frame["predicted"] = total(shares, mix)
        for name, values in lost.items():
            frame[name] = values[place]
        frames.append(frame.assign(**dict(zip(OPTIONS[1:], shares.T[1:], strict=True))))
    yield Scores(pd.concat(frames, ignore_index=True))

    counts, flops = count_parameters(teacher), count_flops(context, teacher, possible)
    for place, (trial, mix) in enumerate(zip(task.trials, chosen, strict=True)):
        done = replace(trial, kept=tuple(step.block for step in mix_route(mix)))
        left = int(total(weights, mix))
        own = {"blocks": left, "total": counts["total"] - counts["blocks"] + left, "trainable": 0}
        yield Result(
            done,
            on_test[place + 1],
            counts | own,
            flops=None if flops is None else int(total(flops[0], mix)) + flops[1],
            validation=float(scores["validation"][place + 1]),
        )


def count_flops(
    context: Context, teacher: Recommender, possible: NDArray[np.bool_]
) -> tuple[Array, int] | None:
    """FLOPs of each option for each block, (L, 5), and of all else, for a median history."""
    length = int(np.median(teacher.positions(context.test.histories)))

    def counted(plan: Plan) -> Products:
        with standing_in(plan):
            return product_counter(teacher)(length)

    try:
        whole = counted([])
        without = [counted(plan_without(teacher, p, possible)) for p in ("attention", "mlp")]
    except UncountableError as error:
        logger.warning("FLOPs are not counted: %s", error)
        return None
    blocks = np.array(whole.blocks)
    parts = [blocks - np.array(each.blocks) for each in without]
    return option_costs(blocks, *parts), whole.rest + score_flops(teacher, 1)


def share_time(seconds: Mapping[str, list[float]], possible: NDArray[np.bool_]) -> Array:
    """Milliseconds of each option for each block, (L, 5), from those of encoding a batch of users.

    The time that encoding saves without all blocks, attention or MLPs is divided equally by block.
    """
    blocks = len(possible)
    whole = np.median(seconds[f"encode:{blocks}"])
    shares = []
    for part in ("block", "attention", "mlp"):
        saved = max(0.0, whole - np.median(seconds[f"{WITHOUT}:{part}"]))
        shares.append(np.full(blocks, 1000 * saved / max(1, possible[:, OPTION[part]].sum())))
    return option_costs(*shares)
