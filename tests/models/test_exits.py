"""Per-user early exit: each user as if served alone by cut models, and blocks that do not run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
)

from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.exits import encode_settled, read_outs, shared_items
from depthprobe.models.recommender import Recommender

ITEMS, USERS, BLOCKS = 25, 16, 13
SAME = 9
SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": BLOCKS}
HEADS = SIZES | {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**HEADS),
    "gpt2": lambda: GPT2Config(vocab_size=11, n_embd=16, n_layer=BLOCKS, n_head=2, n_positions=32),
    "sliding": lambda: Gemma2Config(**HEADS, head_dim=8, sliding_window=3),
    # a mask of its own for each user and head
    "alibi": lambda: BloomConfig(vocab_size=11, hidden_size=16, n_layer=BLOCKS, n_head=2),
    # no prompt can be shared
    "recurrent": lambda: MambaConfig(**SIZES, state_size=4),
}


def make(name: str, *, suffix: tuple[int, ...] = ()) -> Recommender:
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for weight in find_blocks(backbone).parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    return Recommender(backbone, torch.randn(ITEMS + 1, 5), [1, 4], suffix=suffix).double().eval()


def histories() -> tuple[Tensor, Tensor]:
    lengths = torch.randint(1, 7, (USERS,))
    items = torch.randint(1, ITEMS + 1, (USERS, 6))
    return items.masked_fill(torch.arange(6) >= lengths[:, None], 0), lengths


def lists(model: Recommender, vectors: Tensor) -> Tensor:
    return (vectors @ model.item_matrix()[1:].T).topk(10).indices + 1


@torch.inference_mode()
def alone(model: Recommender, items: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Each user by each cut model in turn, until the answer has settled."""
    cuts = {}
    for depth in read_outs(BLOCKS):
        cuts[depth] = copy.deepcopy(model)
        keep_blocks(cuts[depth].backbone, range(depth))
    prompts = {depth: cut.prepare_prompt() for depth, cut in cuts.items()}
    vectors, depths = [], []
    for row in range(len(items)):
        before: set[int] | None = None
        for depth, cut in cuts.items():
            own = items[row : row + 1, : lengths[row]]
            vector = cut.encode(own, lengths[row : row + 1], prompts[depth])
            now = set(lists(model, vector)[0].tolist())
            if depth == BLOCKS or (before is not None and len(now & before) >= SAME):
                break
            before = now
        vectors.append(vector[0])
        depths.append(depth)
    return torch.stack(vectors), torch.tensor(depths)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("suffix", [(), (2, 3)])
def test_each_user_is_served_as_if_alone(name: str, suffix: tuple[int, ...]) -> None:
    model = make(name, suffix=suffix)
    items, lengths = histories()
    expected, after = alone(model, items, lengths)
    prompt = model.prepare_prompt()
    found, depths = encode_settled(
        model, items, lengths, prompt, same=SAME, best=lambda _, vectors: lists(model, vectors)
    )
    assert len(set(depths.tolist())) > 1  # users differ, and some leave early
    assert torch.equal(depths, after)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_blocks_run_for_those_who_are_left_alone() -> None:
    model = make("llama")
    items, lengths = histories()
    rows: list[list[int]] = [[] for _ in range(BLOCKS)]
    prompt = model.prepare_prompt()
    for own, block in zip(rows, find_blocks(model.backbone), strict=True):
        mlp: Any = block.mlp
        mlp.register_forward_hook(lambda _, __, output, own=own: own.append(len(output)))
    _, depths = encode_settled(
        model, items, lengths, prompt, same=SAME, best=lambda _, vectors: lists(model, vectors)
    )
    left = [int((depths > index).sum()) for index in range(BLOCKS)]
    assert left[0] == USERS > left[-1]
    assert rows == [[number] * (number > 0) for number in left]


@pytest.mark.parametrize(("same", "depth"), [(11, BLOCKS), (0, 4)])
def test_all_stay_or_all_leave(same: int, depth: int) -> None:
    """At the second read-out, as the first has none before it to be compared with."""
    model = make("gpt2")
    items, lengths = histories()
    found, depths = encode_settled(
        model,
        items,
        lengths,
        model.prepare_prompt(),
        same=same,
        best=lambda _, vectors: lists(model, vectors),
    )
    assert depths.tolist() == [depth] * USERS
    keep_blocks(model.backbone, range(depth))
    torch.testing.assert_close(found, model.encode(items, lengths), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("blocks", "after"),
    [(1, [1]), (3, [1, 2, 3]), (12, [2, 4, 6, 8, 10, 12]), (13, [2, 4, 6, 8, 10, 12, 13])],
)
def test_read_outs_are_few(blocks: int, after: list[int]) -> None:
    assert read_outs(blocks) == after


def test_shared_items_count_no_padding() -> None:
    one, other = torch.tensor([[1, 2, 0], [4, 5, 6]]), torch.tensor([[3, 1, 0], [6, 4, 5]])
    assert shared_items(one, other).tolist() == [1, 3]
