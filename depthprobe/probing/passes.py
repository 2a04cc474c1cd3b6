"""One pass over the users: what a model must offer to be probed, its states, and early exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from depthprobe.evaluation.ranks import BATCH, Encoder, EvalSet
from depthprobe.models.parts import check_readable, join_streams, split_streams
from depthprobe.models.skipping import after_blocks
from depthprobe.models.taps import tap_blocks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # half precision: 3e-2


class CausalEncoder(Encoder, Protocol):
    """An encoder whose vectors are read out of a causal decoder's last block: it can be probed.

    Inherit from it and set ``backbone``; ``encode`` and ``item_matrix`` are the model's own. The
    defaults suit a model that returns the last hidden state of the last item, as it is. All probes
    want it in evaluation mode, and leave it as it is.
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
    """A batch of users and their states."""

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
    return after_blocks(model.backbone, single).view(*states.shape[:2], -1)


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Within the context, call each hook with its module, args, kwargs and output."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def exact(values: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def passes(
    model: CausalEncoder, eval_set: EvalSet, *, device: torch.device, batch_size: int = BATCH
) -> Iterator[BatchStates]:
    """Encode all users once, and yield each batch with its states; nothing else is kept.

    The caller decides about gradients: probing runs this in inference mode.

    Raises:
        ValueError: for a backbone that has no state to read out after each block, or if the
            vectors of the first batch are not what its states are read out to.
    """
    check_readable(model.backbone)
    prompt, checked = prepare_prompt(model), False

    def run(chosen: np.ndarray, histories: Tensor, lengths: Tensor) -> tuple[Tensor, BatchStates]:
        tap.positions = model.last_place(lengths)
        vectors = encode(model, histories, lengths, prompt)
        states = torch.stack([join_streams(state) for state in tap.states])
        return vectors, BatchStates(chosen, histories, lengths, states)

    with tap_blocks(model.backbone) as tap:
        for _, (vectors, batch) in eval_set.map_batches(run, device=device, size=batch_size):
            if not checked:
                _check_read_out(model, vectors, batch.states[-1])
                checked = True
            yield batch


def _check_read_out(model: CausalEncoder, vectors: Tensor, last: Tensor) -> None:
    """Refuse a model of somebody's own whose last place or read-out is another than it says."""
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
) -> list[dict[str, np.ndarray]]:
    """Ranks of every user's target read out after each block, 0..L, by protocol, each (E,).

    The state after block k of a causal model is the state of the model cut to its first k blocks,
    so one pass holds every truncated model. ``norm`` applies the final norm before the read-out, as
    a cut model does. Without it, SLMRec's reading, the full depth alone is the model's own; a
    backbone whose final states have another width is then refused.
    """

    def read(states: Tensor) -> Tensor:  # (L + 1, B, D) -> (L + 1, B, d)
        if norm:
            return vectors_of(model, states)
        return torch.cat([_past_norm(model, states[:-1]), vectors_of(model, states[-1:])])

    batches = passes(model, eval_set, device=device)
    vectors = ((batch.chosen, read(batch.states)) for batch in batches)
    return eval_set.rank_models(vectors, model.item_matrix())


def _past_norm(model: CausalEncoder, states: Tensor) -> Tensor:
    """States (K, B, D) to user vectors (K, B, d), past the final norm."""
    width = normed(model, states[:1]).shape[-1]
    if width != states.shape[-1]:
        raise ValueError(
            f"states {states.shape[-1]} wide can't be read out without the final norm: what"
            f" follows the blocks makes them {width} wide"
        )
    return model.read_out(states.to(model.item_matrix().dtype))
