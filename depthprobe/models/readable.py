"""Whether the state between blocks can be read out at each depth, and that of several streams.

AltUp (Gemma 3n) passes several streams from block to block, of which the model makes one behind the
last. All of them are the state: joined, they are compared and kept like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from depthprobe.models.blocks import unwrap
from depthprobe.models.sublayers import (
    TOKENS,
    calls_on_few_tokens,
    evaluating,
    original_forwards,
)
from depthprobe.models.tap import paused_taps


def check_readable(model: nn.Module, *, streams: bool = True) -> None:
    """Refuse a decoder whose blocks hand on neither states (B, T, D) nor streams (A, B, T, D).

    Such as streams in another order. Learnt from a pass over four tokens; the model stays as it is.

    Args:
        model: a Hugging Face decoder, also under PEFT.
        streams: whether several of them can be dealt with, or plain states alone.

    Raises:
        ValueError: in that case, or if a block does not run on text.
    """
    inner = unwrap(model)
    with torch.no_grad(), paused_taps(), evaluating(inner), original_forwards(inner):
        states = calls_on_few_tokens(inner).states
    family = inner.config.get_text_config(decoder=True).model_type
    idle = [index for index, state in enumerate(states) if _is_none(state)]
    if idle:
        raise ValueError(f"{family} can't be read out by depth: blocks {idle} do not run on text")
    shape = tuple(states[0].shape)
    if shape[-3:-1] != (1, TOKENS) or len(shape) > (4 if streams else 3):
        raise ValueError(
            f"{family} can't be read out by depth: its blocks hand on {shape} for {TOKENS} tokens,"
            f" not states (1, {TOKENS}, D) or streams of them"
        )


def join_streams(state: Tensor) -> Tensor:
    """The state of one position each, (B, D), of A streams (A, B, D) as (B, A D)."""
    return state if state.dim() == 2 else state.movedim(0, -2).flatten(-2)


def split_streams(model: nn.Module, states: Tensor) -> Tensor:
    """Joined states (B, A D) as the blocks hand them on, (A, B, 1, D); (B, D) as (B, 1, D)."""
    width = int(unwrap(model).config.get_text_config(decoder=True).hidden_size)
    if states.shape[-1] <= width:
        return states[:, None]
    streams: Tensor = states.unflatten(-1, (-1, width)).movedim(1, 0)
    return streams[:, :, None]


def _is_none(state: object) -> bool:
    return not isinstance(state, Tensor) or not state.numel()
