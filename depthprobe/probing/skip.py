"""Skip: each block left out alone, resumed from the state before it.

Up to the block that is left out nothing changes, so a pass needs only the blocks behind it: about
L / 2 passes for all L answers. The prompt's keys and values do change behind the block; they are
made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from depthprobe.evaluation.evaluate import BATCH, Questions, Ranks
from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender, last_positions
from depthprobe.models.skipping import after_blocks, skip_blocks


class _Calls:
    """How each block was called in the latest forward pass: its state and everything else."""

    def __init__(self, n_blocks: int) -> None:
        self.states: list[Tensor] = [torch.empty(0)] * n_blocks
        self.rest: list[dict[str, Any]] = [{}] * n_blocks


@contextmanager
def _record_calls(blocks: nn.ModuleList) -> Iterator[_Calls]:
    calls = _Calls(len(blocks))

    def hook(index: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) != 1:
                raise RuntimeError("this architecture passes more than the state by position")
            calls.states[index], calls.rest[index] = args[0], kwargs

        return before

    handles = [
        block.register_forward_pre_hook(hook(index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _resume(blocks: nn.ModuleList, calls: _Calls, skipped: int, prompt: Cache | None) -> Tensor:
    """The state after the last block when ``skipped`` is left out, (B, T, D)."""
    state = calls.states[skipped]
    for index in range(skipped + 1, len(blocks)):
        kwargs = {k: prompt if isinstance(v, Cache) else v for k, v in calls.rest[index].items()}
        out = blocks[index](state, **kwargs)
        state = out[0] if isinstance(out, tuple) else out
    return state


@torch.inference_mode()
def skip_each(
    teacher: Recommender, asked: Questions, *, device: torch.device
) -> list[dict[str, np.ndarray]]:
    """Ranks of every user's target with block 0, 1, ... L-1 left out, by protocol, each (E,)."""
    teacher.eval()
    blocks = find_blocks(teacher.backbone)
    found = [Ranks(len(asked.users)) for _ in blocks]
    items, prompt = teacher.item_matrix(), teacher.prepare_prompt()
    prompts: list[Cache | None] = []
    for index in range(len(blocks)):
        with skip_blocks(teacher.backbone, {index}):
            prompts.append(teacher.prepare_prompt())
    for chosen, histories, lengths in asked.batches(BATCH, device):
        with _record_calls(blocks) as calls:
            teacher.states(histories, prompt)
        last = torch.stack(
            [
                last_positions(_resume(blocks, calls, index, prompts[index]), lengths)
                for index in range(len(blocks))
            ]
        )
        normed = after_blocks(teacher.backbone, last)  # (L, B, D)
        for index, vectors in enumerate(teacher.read_out(normed.to(items.dtype))):
            found[index].put(chosen, asked.rank(chosen, vectors, items))
    return [ranks.values for ranks in found]
