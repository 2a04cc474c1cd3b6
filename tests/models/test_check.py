"""The self-test passes on sound architectures and fails on planted faults."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import (
    BartConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from depthprobe.models import check, skipping
from depthprobe.models.check import CheckResult, check_backbone, tiny_config
from depthprobe.study import BadInput

# Published sizes: a 70B Llama, a 671B mixture.
REAL = {
    "llama-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "falcon": FalconConfig(),
    "gemma3": Gemma3TextConfig(layer_types=["sliding_attention", "full_attention"] * 13),
    "qwen3-moe": Qwen3MoeConfig(mlp_only_layers=[0]),
    "deepseek-v3": DeepseekV3Config(),
}


@pytest.fixture(autouse=True)
def _shallow(monkeypatch):
    """Half the blocks: a fraction of the time, and every kind of block is still there."""
    monkeypatch.setattr(check, "DEPTH", 4)


def failed(results: list[CheckResult]) -> dict[str, str]:
    return {result.name: result.detail for result in results if not result.passed}


@pytest.mark.parametrize("name", REAL)
def test_real_configurations_pass_in_seconds(name):
    config = REAL[name]
    before = config.to_dict()
    state = torch.get_rng_state()
    start = time.perf_counter()
    results = check_backbone(config)
    assert failed(results) == {}
    assert [result.name for result in results] == [
        "blocks",
        "tiny copy",
        "cut = read-out",
        "skip = undo = cut",
        "save and reload",
        "cached steps",
        "cached prefix",
    ]
    assert f"{config.num_hidden_layers} blocks" in results[0].detail
    assert time.perf_counter() - start < 30
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_tiny_copy_keeps_the_kinds_of_blocks():
    tiny = tiny_config(REAL["gemma3"])
    assert tiny.layer_types == REAL["gemma3"].layer_types[:4]
    assert set(tiny.layer_types) == {"sliding_attention", "full_attention"}
    assert tiny_config(REAL["deepseek-v3"]).first_k_dense_replace == 3
    llama = tiny_config(REAL["llama-70b"])
    assert llama.num_attention_heads == 2 * llama.num_key_value_heads


def test_refused_cuts_are_told():
    config = GPT2Config(scale_attn_by_inverse_layer_idx=True)
    details = {result.name: result for result in check_backbone(config)}
    assert details["cut = read-out"].passed
    assert "other cuts refused" in details["save and reload"].detail
    assert "attn scaling" in details["save and reload"].detail


def test_hybrid_is_told():
    results = check_backbone(
        Qwen3NextConfig(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
    )
    assert failed(results) == {}
    assert any("none of them has attention" in result.detail for result in results)


def test_embedded_and_folder(make_model, tmp_path):
    make_model("phi").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert failed(check_backbone(tmp_path)) == {}
    assert failed(check_backbone("embedded")) == {}
    with pytest.raises(BadInput, match="no such folder"):
        check_backbone(tmp_path / "nowhere")


def test_encoder_decoder_fails_with_a_reason():
    results = check_backbone(BartConfig())
    assert failed(results) == {"blocks": "bart is an encoder-decoder: only decoders can be cut"}


def test_a_skip_that_changes_the_state_is_caught(monkeypatch):
    monkeypatch.setattr(skipping, "_as_output", lambda state, extra: state * 1.01)
    assert {"cut = read-out", "skip = undo = cut"} <= set(failed(check_backbone(GPT2Config())))


def test_a_config_that_is_not_cut_is_caught(monkeypatch):
    def forgetful(model, kept):
        cut = check_keep(model, kept)
        cut.config.layer_types = list(reversed(cut.config.layer_types))
        return cut

    check_keep = check.keep_blocks
    monkeypatch.setattr(check, "keep_blocks", forgetful)
    assert failed(check_backbone(REAL["gemma3"]))


def test_blocks_that_share_a_cache_index_are_caught(monkeypatch):
    def clumsy(model, kept):
        cut = check_keep(model, kept)
        for block in check.find_blocks(cut):
            block.self_attn.layer_idx = 0
        return cut

    check_keep = check.keep_blocks
    monkeypatch.setattr(check, "keep_blocks", clumsy)
    assert {"cached steps", "cached prefix"} <= set(failed(check_backbone(Qwen2Config())))
