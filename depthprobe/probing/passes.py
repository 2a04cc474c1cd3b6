"""One pass over the users: what a recommender must offer to be probed, and its states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from depthprobe.evaluation.ranks import BATCH, Encoder, EvalSet, Ranks
from depthprobe.models.parts import check_readable, join_streams, split_streams
from depthprobe.models.skipping import after_blocks
from depthprobe.models.taps import tap_blocks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # half precision: 3e-2


class CausalEncoder(Encoder, Protocol):
    """What can be probed: an encoder whose vectors are read out of a causal decoder's last block.

    Inherit from it and set ``backbone``; ``encode`` and ``item_matrix`` are the model's own. The
    defaults suit a model that returns the last hidden state of the last item, as it is.
    """

    backbone: PreTrainedModel

    def last_place(self, lengths: Tensor) -> Tensor:
        """Where, in a block's output, users with so many items are read out, (B,) -> (B,)."""
        return lengths - 1

    def read_out(self, states: Tensor) -> Tensor:
        """What follows the final norm: states (..., D) to user vectors (..., d)."""
        return states


@dataclass(frozen=True)
class BatchStates:
    """A batch of users and the states that a pass left of them."""

    chosen: np.ndarray  # (B,) indices of the users
    histories: Tensor  # (B, T)
    lengths: Tensor  # (B,)
    states: Tensor  # (L + 1, B, D) before the first and after each block, where users are read out


def prepare_prompt(model: CausalEncoder) -> Cache | None:
    """The prompt that all users share, run once; None for a model that has none."""
    prepare = getattr(model, "prepare_prompt", None)
    cache: Cache | None = prepare() if prepare is not None else None
    return cache


def encode(
    model: CausalEncoder, histories: Tensor, lengths: Tensor, prompt: Cache | None
) -> Tensor:
    """User vectors (B, d) of histories (B, T) behind a prompt that has run."""
    if prompt is None:
        return model.encode(histories, lengths)
    behind: Any = model.encode
    vectors: Tensor = behind(histories, lengths, prompt)
    return vectors


def vectors_of(model: CausalEncoder, states: Tensor) -> Tensor:
    """User vectors (K, B, d) from states (K, B, D) of blocks, through the final norm."""
    return model.read_out(normed(model, states).to(model.item_matrix().dtype))


def normed(model: CausalEncoder, states: Tensor) -> Tensor:
    """What follows the blocks, on states (K, B, D) of blocks: (K, B, D')."""
    # one position each: a batch can be longer than the model's table of positions
    single = split_streams(model.backbone, states.flatten(0, 1))
    after = after_blocks(model.backbone, single)
    return after.view(*states.shape[:2], -1)


def exact(values: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def passes(
    model: CausalEncoder,
    eval_set: EvalSet,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    batch_size: int = BATCH,
) -> Iterator[BatchStates]:
    """Encode all users once, and yield each batch with its states; nothing else is kept.

    The caller decides about gradients: probing runs this in inference mode.

    Args:
        model: in evaluation mode.
        dtype: of the states; None: as they are. Similarities want float32, as bfloat16 rounds the
            difference of neighbouring states away.

    Raises:
        ValueError: for a backbone that has no state to read out after each block, or if the
            vectors of the first batch are not what its states are read out to.
    """
    check_readable(model.backbone)
    prompt, first = prepare_prompt(model), True
    with tap_blocks(model.backbone, dtype=None) as tap:
        for chosen, histories, lengths in eval_set.batches(batch_size, device):
            tap.positions = model.last_place(lengths)
            vectors = encode(model, histories, lengths, prompt)
            states = torch.stack([join_streams(state) for state in tap.states])
            if first:
                _check_read_out(model, vectors, states[-1])
                first = False
            yield BatchStates(
                chosen, histories, lengths, states if dtype is None else states.to(dtype)
            )


def _check_read_out(model: CausalEncoder, vectors: Tensor, last: Tensor) -> None:
    """Refuse a model of somebody's own whose last place or read-out is another than it says."""
    found = vectors_of(model, last[None])[0].detach()
    own = vectors.detach().double()
    error = (found.double() - own).abs().max() if found.shape == own.shape else torch.inf
    scale = float(own.abs().max())
    if not float(error) <= TOLERANCE.get(last.dtype, 3e-2) * max(scale, 1e-12):
        raise ValueError(
            f"{type(model).__name__}.encode does not return read_out(final norm(state at"
            " last_place)): define last_place and read_out as encode has them"
        )


# Early exit: the teacher read out after every block, no training, all depths in one pass.
#
# The state after block k of a causal model is the state of the model cut to its first k blocks, so
# one pass holds every truncated model.


@torch.inference_mode()
def early_exit(
    model: CausalEncoder, eval_set: EvalSet, *, device: torch.device, norm: bool = True
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
    for batch in passes(model, eval_set, device=device):
        if norm:
            vectors = vectors_of(model, batch.states)  # (L + 1, B, d)
        else:
            own = vectors_of(model, batch.states[-1:])  # (1, B, d)
            vectors = torch.cat([_read_as_they_are(model, batch.states[:-1]), own])
        found = found or [Ranks(len(eval_set.users)) for _ in vectors]
        for ranks, each in zip(found, vectors, strict=True):
            ranks.put(batch.chosen, eval_set.rank(batch.chosen, each, items))
    return [ranks.values for ranks in found]


def _read_as_they_are(model: CausalEncoder, states: Tensor) -> Tensor:
    """(K, B, D) to user vectors (K, B, d), past the final norm."""
    width = normed(model, states[:1]).shape[-1]
    if width != states.shape[-1]:
        raise ValueError(
            f"states {states.shape[-1]} wide can't be read out without the final norm: what"
            f" follows the blocks makes them {width} wide"
        )
    return model.read_out(states.to(model.item_matrix().dtype))
