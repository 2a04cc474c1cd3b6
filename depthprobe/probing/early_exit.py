"""Early exit: the teacher read out after every block, no training, all depths in one pass.

The state after block k of a causal model is the state of the model cut to its first k blocks, so
one pass holds every truncated model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from depthprobe.evaluation.evaluate import Questions, Ranks
from depthprobe.probing.passes import Probed, normed, passes, vectors_of


@torch.inference_mode()
def early_exit(
    model: Probed, asked: Questions, *, device: torch.device, norm: bool = True
) -> list[dict[str, np.ndarray]]:
    """Ranks of every user's target at each depth 0..L, by protocol, each (E,).

    Nothing is kept but the last positions of the current batch, so memory does not grow with the
    users.

    Args:
        model: in evaluation mode.
        norm: apply the final norm before the read-out, as a cut model does. Without it, SLMRec's
            reading, the whole depth alone is the model's own.

    Raises:
        ValueError: without the norm, for a backbone whose final states have another width.
    """
    items = model.item_matrix()
    found: list[Ranks] = []
    for batch in passes(model, asked, device=device):
        if norm:
            vectors = vectors_of(model, batch.states)  # (L + 1, B, d)
        else:
            own = vectors_of(model, batch.states[-1:])  # (1, B, d)
            vectors = torch.cat([_read_as_they_are(model, batch.states[:-1]), own])
        found = found or [Ranks(len(asked.users)) for _ in vectors]
        for ranks, each in zip(found, vectors, strict=True):
            ranks.put(batch.chosen, asked.rank(batch.chosen, each, items))
    return [ranks.values for ranks in found]


def _read_as_they_are(model: Probed, states: Tensor) -> Tensor:
    """(K, B, D) to user vectors (K, B, d), past the final norm."""
    width = normed(model, states[:1]).shape[-1]
    if width != states.shape[-1]:
        raise ValueError(
            f"states {states.shape[-1]} wide can't be read out without the final norm: what"
            f" follows the blocks makes them {width} wide"
        )
    return model.read_out(states.to(model.item_matrix().dtype))
