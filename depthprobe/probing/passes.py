"""One pass over the users: the interface of a model that can be probed, early exit, settling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprobe.evaluation.ranks import BATCH, Encoder, EvalSet, Ranks, shared_prompt
from depthprobe.models.blocks import find_blocks
from depthprobe.models.parts import check_readable, join_streams, split_streams
from depthprobe.models.skipping import after_blocks
from depthprobe.models.taps import tap_blocks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # half precision: 3e-2


class CausalEncoder(Encoder, Protocol):
    """An encoder whose vectors are read out of a causal decoder's last block: it can be probed.

    Inherit from it and set ``backbone``; ``encode`` and ``item_matrix`` are the model's own. The
    defaults suit a model that returns the last hidden state of the last item unchanged. All probes
    expect evaluation mode, and do not change the model.
    """

    backbone: PreTrainedModel

    def last_place(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """Where, in a block's output, users are read out: (B, T) items and (B,) -> (B,)."""
        return lengths - 1

    def read_out(self, states: Tensor) -> Tensor:
        """Apply what follows the final norm: states (..., D) to user vectors (..., d)."""
        return states


def vectors_of(model: CausalEncoder, states: Tensor) -> Tensor:
    """User vectors (K, B, d) from states (K, B, D) of blocks, through the final norm."""
    return model.read_out(normed(model, states).to(model.item_matrix().dtype))


def normed(model: CausalEncoder, states: Tensor) -> Tensor:
    """Apply what follows the blocks to states (K, B, D): (K, B, D')."""
    # one position each: a batch can be longer than the model's table of positions
    single = split_streams(model.backbone, states.flatten(0, 1))
    return after_blocks(model.backbone, single).view(*states.shape[:2], -1)


def exact(values: Tensor) -> Tensor:
    """The tensor in float64, on the CPU if the device has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def passes(
    model: CausalEncoder, eval_set: EvalSet, *, device: torch.device, batch_size: int = BATCH
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Encode all users once; yields each batch's users (B,) and states (L + 1, B, D).

    States are those before the first and after each block, at the place where users are read out.
    Nothing else is kept. The caller decides about gradients: probing runs this in inference mode.
    ``ValueError`` if reading out the states does not give what the model encodes.
    """
    check_readable(model.backbone)
    prompt, checked = shared_prompt(model), False
    batches = eval_set.batches(device=device, size=batch_size, model=model)
    with tap_blocks(model.backbone) as tap:
        for chosen, histories, lengths in batches:
            with batches.retry():
                tap.positions = model.last_place(histories, lengths)
                vectors = model.encode(histories, lengths, *prompt)
                states = torch.stack([join_streams(state) for state in tap.states])
                if not checked:
                    _check_read_out(model, vectors, states[-1])
                    checked = True
                yield chosen, states


def _check_read_out(model: CausalEncoder, vectors: Tensor, last: Tensor) -> None:
    """Refuse a user's model whose last place or read-out is not the one that it declares."""
    read = vectors_of(model, last[None])[0].detach()
    own = vectors.detach().double()
    error = (read.double() - own).abs().max() if read.shape == own.shape else torch.inf
    scale = float(own.abs().max())
    if not float(error) <= TOLERANCE.get(last.dtype, 3e-2) * max(scale, 1e-12):
        raise ValueError(
            f"{type(model).__name__}.encode does not return read_out(final norm(state at"
            " last_place)): define last_place and read_out as encode has them"
        )


@torch.inference_mode()
def early_exit(
    model: CausalEncoder, eval_set: EvalSet, *, device: torch.device, norm: bool = True
) -> list[Ranks]:
    """Ranks of every user's target read out after each block, 0..L, by protocol, each (E,).

    The state after block k of a causal model is the state of the model cut to its first k blocks,
    so one pass holds every truncated model. ``norm`` applies the final norm before the read-out, as
    a cut model does. Without it, SLMRec's reading, the full depth alone is the model's own; a
    backbone whose final states have another width is then refused.
    """
    ranks: list[Ranks] = []
    items = model.item_matrix()
    for chosen, states in passes(model, eval_set, device=device):
        vectors = vectors_of(model, states if norm else states[-1:])
        if not norm:
            inner = states[:-1]
            if (width := normed(model, inner[:1]).shape[-1]) != inner.shape[-1]:
                raise ValueError(
                    f"states {inner.shape[-1]} wide can't be read out without the final norm: what"
                    f" follows the blocks makes them {width} wide"
                )
            vectors = torch.cat([model.read_out(inner.to(items.dtype)), vectors])
        eval_set.rank_models(ranks, chosen, vectors, items)
    return ranks


# When an answer is settled: how deep each user's top list and target rank still change.
#
# The mean metric of early exit hides who is served: one user's list stands after a few blocks, and
# another's target rises and is lost again in later ones. The second is overthinking (Kaya, Hong and
# Dumitras, arXiv 1810.07052): an earlier exit was better than the last. All from one pass that
# reads every depth out; of each batch the lists are compared and dropped, and scores are not kept.


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

    The list equals the last one at this and at every later depth.
    """
    changed = (lists != lists[:, -1:]).any(axis=-1)[:, ::-1]  # (E, L + 1), from depth L down
    after_last_change = changed.shape[1] - changed.argmax(axis=1)
    return np.where(changed.any(axis=1), after_last_change, 0).astype(np.int16)


def settled_frame(settling: Settling, users: np.ndarray) -> pd.DataFrame:
    """One row per user, ``users`` (E,) in the order of the eval set.

    ``rank_settled`` is the first depth whose rank is within one of the last; later depths may
    differ again. ``best_depth`` is the first depth with the target's best rank; it is before L if
    the full model only equals it. ``overthinking``: a depth before L ranks the target strictly
    better.
    """
    ranks = settling.ranks
    final, best = ranks[:, -1], ranks.min(axis=1)
    settled = (ranks >= final[:, None] - 1) & (ranks <= final[:, None] + 1)  # inf - inf is nan
    return pd.DataFrame(
        {
            "user": users,
            "top_settled": settling.top_settled,
            "set_settled": settling.set_settled,
            "rank_settled": settled.argmax(axis=1).astype(np.int16),
            "best_depth": ranks.argmin(axis=1).astype(np.int16),
            "final_rank": final,
            "best_rank": best,
            "overthinking": final > best,
        }
    )
