"""Gradient checkpointing of the blocks that leaves a shared prompt where it is.

A layer of transformers that checkpoints itself drops the cache it is given, with a warning and no
error, so the items would no longer see the prompt. Here each block is run again as it was called,
cache included: ``torch.utils.checkpoint`` in its non-reentrant form, because gradients must reach
keys and values that no block has among its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from depthprobe.models.blocks import find_blocks
from depthprobe.models.sublayers import restore_forward


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """Passes inside keep what enters a block; the backward pass, inside or after, runs it again.

    Same numbers, dropout included: the random state is the first run's. Hooks on the blocks, a tap
    among them, fire once. A cache must be one that a second run doesn't change.

    Args:
        model: a Hugging Face decoder, also under PEFT.
    """
    blocks = find_blocks(model)
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = _run_again(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            restore_forward(block, forward)


def take_over(model: PreTrainedModel) -> bool:
    """Switch transformers' own checkpointing off; returns whether it was on.

    Somebody else may have switched it on: peft does where it prepares quantised weights.
    """
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    return bool(on)


def _run_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
