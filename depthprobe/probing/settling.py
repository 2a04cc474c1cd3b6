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

from depthprobe.evaluation.metrics import overlap, rank_biased_overlap
from depthprobe.evaluation.ranks import EvalSet, top_items
from depthprobe.models.blocks import find_blocks
from depthprobe.probing.passes import CausalEncoder, passes, vectors_of


@dataclass(frozen=True)
class Settling:
    """Each user's answers at depths 0..L against the whole model's, depth L.

    Attributes:
        ranks: (E, L + 1) float32 ranks of the target by full ranking; exact up to 2^23 items.
        top_settled: (E,) int16, as :func:`settled_depths`, order included.
        set_settled: (E,) int16, the same of the lists as sets; never above ``top_settled``.
        overlaps: (E, L + 1) float32 shares of the whole model's top items.
        rbos: (E, L + 1) float32 rank-biased overlaps with the whole model's list, p = 0.9.
    """

    ranks: np.ndarray
    top_settled: np.ndarray
    set_settled: np.ndarray
    overlaps: np.ndarray
    rbos: np.ndarray

    @property
    def rank_settled(self) -> np.ndarray:
        """As :func:`rank_settled_depths`, (E,) int16."""
        return rank_settled_depths(self.ranks)

    @property
    def best_depth(self) -> np.ndarray:
        """The first depth at which the target has its best rank, (E,) int16.

        It can be before L without overthinking: where the whole model only draws level.
        """
        return np.asarray(self.ranks.argmin(axis=1), dtype=np.int16)

    @property
    def final_rank(self) -> np.ndarray:
        """The whole model's, (E,) float32."""
        return np.asarray(self.ranks[:, -1])

    @property
    def best_rank(self) -> np.ndarray:
        """The best of all depths, (E,) float32."""
        return np.asarray(self.ranks.min(axis=1))

    @property
    def lost(self) -> np.ndarray:
        """How many places later blocks cost: final rank - best rank, (E,) float32, from 0."""
        return np.asarray(self.final_rank - self.best_rank)

    @property
    def overthinking(self) -> np.ndarray:
        """Users whose target is ranked strictly better at some depth before L, (E,) bool."""
        return self.lost > 0

    @property
    def overlap(self) -> np.ndarray:
        """Mean over users of ``overlaps``, (L + 1,) float64."""
        return np.asarray(self.overlaps.mean(axis=0, dtype=np.float64))

    @property
    def rbo(self) -> np.ndarray:
        """Mean over users of ``rbos``, (L + 1,) float64."""
        return np.asarray(self.rbos.mean(axis=0, dtype=np.float64))


@torch.inference_mode()
def settling(
    model: CausalEncoder, eval_set: EvalSet, *, device: torch.device, k: int = 10
) -> Settling:
    """Read every depth out of one pass and compare each user's answers with the last.

    Args:
        model: in evaluation mode.
        eval_set: seen items are left out of the lists where it has them, as out of the ranks.
        k: length of the top lists; a user with fewer items left has a shorter one.

    Raises:
        ValueError: if ``k`` is not in 1..I.
    """
    eval_set = replace(eval_set, negatives=None)  # the sampled protocol has no top list
    n_users, n_depths = len(eval_set.users), len(find_blocks(model.backbone)) + 1
    found = Settling(
        ranks=np.empty((n_users, n_depths), np.float32),
        top_settled=np.empty(n_users, np.int16),
        set_settled=np.empty(n_users, np.int16),
        overlaps=np.empty((n_users, n_depths), np.float32),
        rbos=np.empty((n_users, n_depths), np.float32),
    )
    items = model.item_matrix()
    for batch in passes(model, eval_set, device=device):
        chosen = batch.chosen
        seen = None if eval_set.seen is None else [eval_set.seen[i] for i in chosen]
        lists = np.empty((len(chosen), n_depths, k), np.int64)
        for depth, vectors in enumerate(vectors_of(model, batch.states)):  # (B, d)
            found.ranks[chosen, depth] = eval_set.rank(chosen, vectors, items)["full"]
            lists[:, depth] = top_items(vectors, items, k=k, seen=seen)[0].numpy()
        found.top_settled[chosen] = settled_depths(lists)
        found.set_settled[chosen] = settled_depths(lists, ordered=False)
        found.overlaps[chosen] = overlap(lists, lists[:, -1:])
        found.rbos[chosen] = rank_biased_overlap(lists, lists[:, -1:])
    return found


def settled_depths(lists: np.ndarray, *, ordered: bool = True) -> np.ndarray:
    """The smallest depth from which on a list is the last one, (E, L + 1, K) -> (E,) int16.

    At it and at every later depth: a list that leaves the last one again was not settled.

    Args:
        lists: items at each depth, best first.
        ordered: False compares the lists as sets.
    """
    compared = lists if ordered else np.sort(lists, axis=-1)
    changed = (compared != compared[:, -1:]).any(axis=-1)[:, ::-1]  # (E, L + 1), from depth L down
    after_last_change = changed.shape[1] - changed.argmax(axis=1)
    return np.where(changed.any(axis=1), after_last_change, 0).astype(np.int16)


def rank_settled_depths(ranks: np.ndarray, *, within: float = 1) -> np.ndarray:
    """The first depth at which a rank is near the last one, (E, L + 1) -> (E,) int16.

    Near is ``|rank - last rank| <= within``. Later depths may leave again: a single rank moves
    more easily than the best of a list, and this asks when an exit would have served.
    """
    near = np.abs(ranks - ranks[:, -1:]) <= within
    return np.asarray(near.argmax(axis=1), dtype=np.int16)


def to_frame(settling: Settling, users: np.ndarray) -> pd.DataFrame:
    """One row a user, ``users`` (E,) in the order of the questions.

    Raises:
        ValueError: if there are more or fewer users than answers.
    """
    if len(users) != len(settling.ranks):
        raise ValueError(f"expected {len(settling.ranks)} users, got {len(users)}")
    names = [
        "top_settled",
        "set_settled",
        "rank_settled",
        "best_depth",
        "final_rank",
        "best_rank",
        "overthinking",
    ]
    return pd.DataFrame({"user": users, **{name: getattr(settling, name) for name in names}})
