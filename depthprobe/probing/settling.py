"""When an answer is settled: how deep each user's top list and target rank still change.

The mean metric of early exit hides who is served: one user's list stands after a few blocks, and
another's target rises and is lost again in later ones. The second is overthinking (Kaya, Hong and
Dumitras, arXiv 1810.07052): an earlier exit was better than the last. All from one pass that reads
every depth out; of each batch the lists are compared and dropped, and scores are never kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.blocks import find_blocks
from depthprobe.probing.passes import CausalEncoder, passes, vectors_of


@dataclass(frozen=True)
class Settling:
    """Each user's answers at depths 0..L against the full model's, depth L."""

    ranks: np.ndarray  # (E, L + 1) float32, of the target by full ranking; exact up to 2^23 items
    top_settled: np.ndarray  # (E,) int16, as `settled_depths`, order included
    set_settled: np.ndarray  # (E,) int16, the same of the lists as sets; never above `top_settled`


@torch.inference_mode()
def settling(
    model: CausalEncoder, eval_set: EvalSet, *, device: torch.device, k: int = 10
) -> Settling:
    """Read every depth out of one pass and compare each user's answers with the last.

    Seen items are left out of the lists of length ``k`` as they are of the ranks.
    """
    items = model.item_matrix()
    eval_set = replace(eval_set, negatives=None)  # the sampled protocol has no top list
    n_users, n_depths = len(eval_set.users), len(find_blocks(model.backbone)) + 1
    ranks = np.empty((n_users, n_depths), np.float32)
    top_settled, set_settled = np.empty(n_users, np.int16), np.empty(n_users, np.int16)
    for chosen, states in passes(model, eval_set, device=device):
        lists = np.empty((len(chosen), n_depths, k), np.int64)
        for depth, vectors in enumerate(vectors_of(model, states)):  # (B, d)
            answers = eval_set.rank(chosen, vectors, items, top=k)
            ranks[chosen, depth], lists[:, depth] = answers["full"], answers[f"top-{k}"]
        top_settled[chosen] = settled_depths(lists)
        set_settled[chosen] = settled_depths(np.sort(lists, axis=-1))
    return Settling(ranks, top_settled, set_settled)


def settled_depths(lists: np.ndarray) -> np.ndarray:
    """The smallest depth from which on a list is the last one, (E, L + 1, K) -> (E,) int16.

    At it and at every later depth: a list that leaves the last one again was not settled.
    """
    changed = (lists != lists[:, -1:]).any(axis=-1)[:, ::-1]  # (E, L + 1), from depth L down
    after_last_change = changed.shape[1] - changed.argmax(axis=1)
    return np.where(changed.any(axis=1), after_last_change, 0).astype(np.int16)


def to_frame(settling: Settling, users: np.ndarray) -> pd.DataFrame:
    """One row a user, ``users`` (E,) in the order of the eval set.

    ``rank_settled`` is the first depth whose rank is within one of the last; later depths may leave
    again. ``best_depth`` is the first depth with the target's best rank; it can be before L where
    the full model only draws level. ``overthinking``: a depth before L ranks the target strictly
    better.
    """
    ranks = settling.ranks
    final, best = ranks[:, -1], ranks.min(axis=1)
    return pd.DataFrame(
        {
            "user": users,
            "top_settled": settling.top_settled,
            "set_settled": settling.set_settled,
            "rank_settled": (np.abs(ranks - final[:, None]) <= 1).argmax(axis=1).astype(np.int16),
            "best_depth": ranks.argmin(axis=1).astype(np.int16),
            "final_rank": final,
            "best_rank": best,
            "overthinking": final > best,
        }
    )
