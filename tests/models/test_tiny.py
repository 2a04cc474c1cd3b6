"""Tiny copies keep what matters of an architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, DeepseekV3Config, Gemma3TextConfig, LlamaConfig

from depthprobe.models.blocks import find_blocks
from depthprobe.models.families import family_config
from depthprobe.models.tiny import tiny_config, tiny_model


def test_the_kinds_of_blocks_stay_in_order():
    config = Gemma3TextConfig(
        num_hidden_layers=26, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 4
        + ["sliding_attention"] * 2,
    )  # fmt: skip
    before = config.to_dict()
    tiny = tiny_config(config, depth=4)
    # the first ones, the first of the kind that is not among them, and the last
    assert tiny.layer_types == ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]
    assert tiny_config(config).layer_types[:6] == config.layer_types[:6]
    assert len(tiny_config(config).layer_types) == tiny_config(config).num_hidden_layers == 8
    assert config.to_dict() == before


def test_no_deeper_than_the_model():
    assert tiny_config(LlamaConfig(num_hidden_layers=2)).num_hidden_layers == 2
    assert tiny_config(LlamaConfig(num_hidden_layers=1)).num_hidden_layers == 1
    assert tiny_config(LlamaConfig(), depth=1).num_hidden_layers == 1


def test_dense_and_sparse_blocks_stay_apart():
    assert DeepseekV3Config().first_k_dense_replace == 3
    assert tiny_config(DeepseekV3Config(), depth=4).first_k_dense_replace == 3
    assert (
        tiny_config(DeepseekV3Config(), depth=2).first_k_dense_replace == 1
    )  # the first, the last


def test_shared_heads_stay_shared():
    grouped = tiny_config(LlamaConfig(num_attention_heads=64, num_key_value_heads=8))
    assert grouped.num_attention_heads == 2 * grouped.num_key_value_heads
    one = tiny_config(LlamaConfig(num_attention_heads=64, num_key_value_heads=1))
    assert (one.num_attention_heads, one.num_key_value_heads) == (4, 1)
    own = tiny_config(LlamaConfig(num_attention_heads=64, num_key_value_heads=64))
    assert own.num_attention_heads == own.num_key_value_heads


def test_blocks_that_override_single_fields():
    model = tiny_model(family_config("gemma4_text"), depth=6)
    assert model.num_parameters() < 200_000
    config = model.config
    assert [c.head_dim for c in config.per_layer_config] == [8] * 6
    assert config.layer_types[-2:] == ["full_attention"] * 2


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "zamba2", "nemotron_h", "kimi_linear"])
def test_state_space_layers_are_small_too(name):
    state = torch.get_rng_state()
    model = tiny_model(family_config(name), depth=4)
    assert model.num_parameters() < 300_000
    assert model.dtype == torch.float64
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    again = tiny_model(family_config(name), depth=4)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_family_without_float64_runs_in_float32():
    assert tiny_model(family_config("xglm"), depth=2).dtype == torch.float32


def test_a_vision_tower_shrinks(capsys):
    model = tiny_model(family_config("gemma3"), depth=2)
    assert len(find_blocks(model)) == 2
    assert model.num_parameters() < 5_000_000


def test_what_cannot_be_built_small_is_told():
    config = BertConfig(is_decoder=True, hidden_act="no such function")
    with pytest.raises(ValueError, match="no small copy can be built and run on text"):
        tiny_model(config)


def test_weights_are_large_enough_for_a_wrong_mask_to_show():
    model = tiny_model(LlamaConfig(), depth=2)
    assert model.model.layers[0].mlp.up_proj.weight.std() > 4 * model.config.initializer_range
