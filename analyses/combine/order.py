"""Prune, distil, quantise: does their order matter? The permutations of a run that has one of them.

    python analyses/combine/order.py runs/combine-ml-100k [runs/combine-rounded]

The run has ``distill:scores`` and ``int8:distill:narrow`` at four blocks. To *prune* is to leave
half of the channels and heads of these blocks, to *distil* to train them on the teacher's scores,
and to *quantise* to round them to int8; a model is int8 at the end in any case. The second run is
the same study on a backbone whose weights were rounded before anything was trained
(``rounded.py``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.ranks import evaluate
from depthprobe.evaluation.statistics import ratio_interval
from depthprobe.models.narrowing import narrow_blocks, plan_narrowing
from depthprobe.models.quantize import make_ready, quantize
from depthprobe.models.recommender import Recommender, dequantized, is_quantized
from depthprobe.probing.units import unit_scores
from depthprobe.report.numbers import FULL, Ranks
from depthprobe.runs.context import Context
from depthprobe.runs.plan import trial_of
from depthprobe.runs.store import Run, open_run
from depthprobe.study import settings_of

DEPTH, STUDENT, NARROW = 4, "distill:scores", "distill:narrow"


def round_weights(model: Recommender) -> None:
    """Put what int8 would be computed with in place of the weights, in float32."""
    quantize(model, "int8")
    for module in model.backbone.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and is_quantized(module.weight):
            module.weight = nn.Parameter(dequantized(module.weight))


def pruned_afterwards(context: Context, seed: int, *, rounded_first: bool) -> np.ndarray:
    """Ranks of the student that is narrowed once it is trained, and rounded; (U,)."""
    trial = trial_of(STUDENT, range(DEPTH), seed, context.manifest.backbone.blocks)  # type: ignore[union-attr]
    model = context.trained(trial)
    if rounded_first:
        round_weights(model)
    plan = plan_narrowing(model.backbone, settings_of(context.study, NARROW).width)
    scores = unit_scores(model, plan, context.training, by="activation", device=context.device)
    narrow_blocks(model.backbone, plan, scores)
    quantize(model, "int8")
    make_ready(model.backbone)
    return evaluate(model.eval(), context.test, device=context.device)["full"]


def values(run: Run, method: str, depth: int) -> np.ndarray:
    """NDCG@10 by seed and user, (S, U)."""
    own = run.trials.query("method == @method and depth == @depth and status == 'done'")
    trials = own.sort_values("seed")["trial"]
    return Ranks(run.users).values(FULL, "NDCG@10", [trials])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("rounded", type=Path, nargs="?")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    run = open_run(asked.run)
    context, blocks = Context(asked.run, run.study), run.manifest.backbone.blocks
    teacher = values(run, "full", blocks)
    orders = {"prune, distil, quantise": values(run, f"int8:{NARROW}", DEPTH)}
    for name, first in (("distil, prune, quantise", False), ("distil, quantise, prune", True)):
        ranks = [
            pruned_afterwards(context, seed, rounded_first=first) for seed in range(len(teacher))
        ]
        orders[name] = per_user_metric(np.stack(ranks), "NDCG@10")
    if asked.rounded:
        rounded = open_run(asked.rounded)
        orders["quantise, prune, distil"] = values(rounded, f"int8:{NARROW}", DEPTH)
        other = Context(asked.rounded, rounded.study)
        ranks = [
            pruned_afterwards(other, seed, rounded_first=False) for seed in range(len(teacher))
        ]
        orders["quantise, distil, prune"] = per_user_metric(np.stack(ranks), "NDCG@10")
    print("| order | NDCG@10 | share of the teacher's |\n|---|---|---|")
    for name, own in orders.items():
        share = ratio_interval(own, teacher)
        told = f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
        print(f"| {name} | {own.mean():.4f} | {told} |")


if __name__ == "__main__":
    main()
