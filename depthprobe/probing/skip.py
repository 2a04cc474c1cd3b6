"""Skip: each block left out alone, resumed from the state before it.

Up to the block that is left out nothing changes, so a pass needs only the blocks behind it: about
L / 2 passes for all L answers. The prompt's keys and values do change behind the block; they are
made once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from depthprobe.evaluation.evaluate import BATCH, Questions, Ranks
from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.skipping import after_blocks, skip_blocks
from depthprobe.models.tap import BlockCalls, first_tensor, record_calls


def _resume(blocks: nn.ModuleList, calls: BlockCalls, skipped: int, prompt: Cache | None) -> Tensor:
    """The state after the last block when ``skipped`` is left out, (B, T, D)."""
    state = calls.states[skipped]
    for index in range(skipped + 1, len(blocks)):
        state = first_tensor(calls.repeat(blocks[index], index, state, prompt))
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
        with record_calls(blocks) as calls:
            teacher.states(histories, lengths, prompt)
        place = teacher.last_place(lengths)
        last = torch.stack(
            [
                states_at(_resume(blocks, calls, index, prompts[index]), place)
                for index in range(len(blocks))
            ]
        )
        normed = after_blocks(teacher.backbone, last)  # (L, B, D)
        for index, vectors in enumerate(teacher.read_out(normed.to(items.dtype))):
            found[index].put(chosen, asked.rank(chosen, vectors, items))
    return [ranks.values for ranks in found]
