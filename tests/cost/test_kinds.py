"""Which blocks are alike."""

from __future__ import annotations

import pytest
from torch import nn

from depthprobe.cost.kinds import first_alike
from depthprobe.models.blocks import find_blocks
from depthprobe.models.families import family_config
from depthprobe.models.tiny import tiny_model


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("llama", [0] * 6),
        ("gpt2", [0] * 6),
        ("deepseek_v3", [0, 0, 0, 3, 3, 3]),  # dense, then experts
        ("gemma2", [0, 1, 0, 1, 0, 1]),  # windows
        ("qwen3_next", [0, 0, 0, 3, 0, 3]),
    ],
)
def test_blocks_of_a_kind(name: str, first: list[int]) -> None:
    assert first_alike(tiny_model(family_config(name), depth=6)) == first


def test_a_block_that_was_changed_is_like_no_other() -> None:
    model = tiny_model(family_config("llama"), depth=4)
    block = find_blocks(model)[2]
    block.mlp.down_proj = nn.Linear(48, 32, bias=True)
    assert first_alike(model) == [0, 0, 2, 0]
