"""Per-user early exit: serve a user from the first read-out at which their answer has settled.

Users are read out every few blocks. A user whose ten best items share at least ``same`` with the
previous read-out leaves the batch with that answer, and later blocks run only for the others.
``depthprobe.probing.exits`` finds the ``same`` that costs no more than a margin.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor
from transformers import Cache

from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.skipping import after_blocks, plan_skip
from depthprobe.models.taps import BlockCalls, first_tensor, record_calls, standing_in

LIST = 10  # items whose change tells whether an answer has settled
READ_OUTS = 6  # read-outs before the last one, about: each scores the catalogue


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """When a user's answer counts as settled, and the accuracy that this was shown to cost.

    Attributes:
        same: how many of the ten best items must equal those of the previous read-out.
        metric: that was compared with the full model's.
        margin: the loss that is allowed, a share of the full model's mean.
        level: the confidence with which it is not exceeded.
        users: validation users of the calibration.
        depth: the mean number of blocks after which these users left.
        kept: the share of the full model's mean that they kept.
    """

    same: Annotated[int, Meta(ge=0, le=LIST)]
    metric: str
    margin: float
    level: float
    users: int
    depth: float
    kept: float


def read_outs(blocks: int) -> list[int]:
    """After how many blocks users are read out: about six times at equal steps, and at the end."""
    step = max(1, blocks // READ_OUTS)
    return [*range(step, blocks, step), blocks]


def shared_items(one: Tensor, other: Tensor) -> Tensor:
    """How many items two lists (B, K) have in common, (B,); 0 is no item."""
    return ((one[:, :, None] == other[:, None, :]) & (one[:, :, None] > 0)).sum(dim=(1, 2))


@torch.inference_mode()
def encode_settled(
    model: Recommender,
    histories: Tensor,
    lengths: Tensor,
    prompt: Cache | None,
    *,
    same: int,
    best: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """User vectors (B, d), each from the block after which the user left, and these depths (B,).

    Args:
        model: in evaluation mode.
        histories: (B, T) item ids, right-padded with 0.
        lengths: (B,).
        prompt: what ``prepare_prompt`` made.
        same: how many of ten items must stay for a user to leave; 11 keeps everybody to the end.
        best: of some users, places in the batch (b,) and vectors (b, d), the ten best items 1..I,
            (b, 10), 0 where there is none.
    """
    blocks = find_blocks(model.backbone)
    skipped = plan_skip(model.backbone, range(len(blocks)))
    rows = torch.arange(len(histories), device=histories.device)  # (b,) who is still here
    depths = torch.full_like(lengths, len(blocks))
    calls: BlockCalls | None = None
    lists: Tensor | None = None
    state, found = torch.empty(0), torch.empty(0)
    with torch.compiler.set_stance("force_eager"):
        with standing_in(skipped):
            unread = model.prepare_prompt()
        for start, end in pairwise([0, *read_outs(len(blocks))]):
            if calls is None:
                # No block runs in this encoding. It shows what each is called with, mask and
                # positions, for those who are still here.
                with standing_in(skipped), record_calls(blocks) as calls:
                    model.encode(histories[rows], lengths[rows], unread)
                state = state if start else calls.states[0]  # (b, T, D)
            for index in range(start, end):
                state = first_tensor(calls.repeat(blocks[index], index, state, prompt))
            last = states_at(state, model.last_place(histories[rows], lengths[rows]))
            normed = after_blocks(model.backbone, last[:, None])[:, 0]
            vectors = model.read_out(normed.to(model.item_matrix().dtype))  # (b, d)
            found = found if start else torch.empty_like(vectors)
            found[rows] = vectors
            if end == len(blocks):
                break
            before, lists = lists, best(rows, vectors)
            if before is None:
                continue
            stays = shared_items(before, lists) < same
            depths[rows[~stays]] = end
            if not stays.all():
                rows, lists, state, calls = rows[stays], lists[stays], state[stays], None
            if not len(rows):
                break
    return found, depths
