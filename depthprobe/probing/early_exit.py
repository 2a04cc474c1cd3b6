"""Early exit: the teacher read out after every block, no training, all depths in one pass.

The state after block k of a causal model is the state of the model cut to its first k blocks, so
one pass holds every truncated model. The final norm is applied before the read-out, as in a cut
model.
"""

from __future__ import annotations

import numpy as np
import torch

from depthprobe.evaluation.evaluate import BATCH, Questions, Ranks
from depthprobe.models.recommender import Recommender
from depthprobe.models.skipping import after_blocks
from depthprobe.models.tap import tap_blocks


@torch.inference_mode()
def early_exit(
    teacher: Recommender, asked: Questions, *, device: torch.device
) -> list[dict[str, np.ndarray]]:
    """Ranks of every user's target at each depth 0..L, by protocol, each (E,).

    Nothing is kept but the last positions of the current batch, so memory does not grow with the
    users.
    """
    teacher.eval()
    found = [Ranks(len(asked.users)) for _ in range(teacher.depth + 1)]
    items, prompt = teacher.item_matrix(), teacher.prepare_prompt()
    with tap_blocks(teacher.backbone) as tap:
        for chosen, histories, lengths in asked.batches(BATCH, device):
            tap.positions = teacher.last_place(lengths)
            teacher.states(histories, lengths, prompt)
            normed = after_blocks(teacher.backbone, torch.stack(tap.states))  # (L + 1, B, D)
            for depth, vectors in enumerate(teacher.read_out(normed.to(items.dtype))):
                found[depth].put(chosen, asked.rank(chosen, vectors, items))
    return [ranks.values for ranks in found]
