"""Calibration of per-user early exit: the loosest rule whose loss is shown to be within a margin.

Learn-then-Test (Angelopoulos et al., arXiv 2110.01052), as CALM calibrates early exit of language
models (Schuster et al., arXiv 2207.07061). Rules are tested one after the other from the strictest
on, each at the full level, until one fails. For a wrong rule to be chosen, the first wrong one has
to pass its test, so no correction for their number is needed. The test is that of the verdict,
paired by user: the mean of ``x - (1 - margin) r`` is above 0.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.ranks import EvalSet
from depthprobe.evaluation.sufficiency import paired_tests
from depthprobe.models.blocks import find_blocks
from depthprobe.models.exits import LIST, Exit, read_outs, shared_items
from depthprobe.models.export import ExportedRecommender
from depthprobe.models.parts import check_readable
from depthprobe.models.recommender import Recommender
from depthprobe.probing.passes import CausalEncoder, passes, vectors_of


@torch.inference_mode()
def read_out_users(
    model: CausalEncoder, eval_set: EvalSet, *, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Each user at each of the R read-outs: the target's rank, and items kept since the one before.

    Both are (E, R), by full ranking; of the first read-out no item is kept.
    """
    depths = read_outs(len(find_blocks(model.backbone)))
    ranks = np.empty((len(eval_set.users), len(depths)))
    kept = np.zeros(ranks.shape, np.int8)
    items = model.item_matrix()
    for chosen, states in passes(model, eval_set, device=device):
        before = None
        for place, vectors in enumerate(vectors_of(model, states[depths])):  # (B, d)
            found = eval_set.rank(chosen, vectors, items, top=LIST)
            ranks[chosen, place] = found["full"]
            lists = torch.from_numpy(found[f"top-{LIST}"])
            if before is not None:
                kept[chosen, place] = shared_items(before, lists).numpy()
            before = lists
    return ranks, kept


def exit_places(kept: np.ndarray, same: int) -> np.ndarray:
    """The read-out that serves each user, from what :func:`read_out_users` counted, (E,)."""
    leaves = kept >= same
    leaves[:, 0], leaves[:, -1] = False, True
    places: np.ndarray = leaves.argmax(axis=1)
    return places


def calibrate(
    exported: ExportedRecommender, eval_set: EvalSet, *, metric: str, margin: float, level: float
) -> Exit | None:
    """The loosest rule that is shown to lose no more than the margin; None if none is.

    Of the eval set's users alone: the guarantee is for users like them. Whoever is left to the last
    block has the full model's answer.

    Raises:
        BadInput: for a backbone that hands on more than a state a position.
    """
    model = cast("Recommender", exported.model)
    check_readable(model.backbone, streams=False)
    ranks, kept = read_out_users(model, eval_set, device=model.item_matrix().device)
    values = per_user_metric(ranks, metric)  # (E, R)
    depths = np.array(read_outs(model.depth))
    full, best = values[None, :, -1], None
    if not full.any():
        return None
    for same in range(LIST, -1, -1):
        places = exit_places(kept, same)
        own = values[None, np.arange(len(places)), places]
        test = paired_tests({same: (own, full)}, [same], fixed=True)[same]
        if test.p_value(1 - margin) > 1 - level:
            break
        best = Exit(
            same=same, metric=metric, margin=margin, level=level, users=len(places),
            depth=float(depths[places].mean()), kept=float(own.mean() / full.mean()),
        )  # fmt: skip
    return best
