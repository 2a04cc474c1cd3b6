"""Calibration of per-user early exit: the loosest rule whose loss is shown to be within a margin.

Learn-then-Test (Angelopoulos et al., arXiv 2110.01052), as CALM calibrates early exit of language
models (Schuster et al., arXiv 2207.07061). Rules are tested from the strictest on, each at the full
level, until one fails. A wrong rule is chosen only if the first wrong one passes its test, so their
number needs no correction. The test is that of the verdict,
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
    """For each user and read-out: the target's rank, and how many top items stayed since before.

    Both are (E, R), by full ranking; at the first read-out no item counts as kept.
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
    """The loosest rule that is shown to lose no more than the margin; None if there is none.

    The guarantee holds for users like those of the eval set. Users who stay to the last block get
    the full model's answer.

    Raises:
        BadInput: for a backbone that passes on more than one state per position.
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
