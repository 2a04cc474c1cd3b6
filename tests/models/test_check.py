"""The self-test passes on sound architectures and fails on planted faults."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MoshiConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from depthprobe.errors import BadInput
from depthprobe.models import check as proofs
from depthprobe.models import skipping
from depthprobe.models.check import CheckResult, can_be_cut, check_backbone

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


DEPTH = 4  # half the blocks: a fraction of the time, and every kind of block is still there
NAMES = [
    "blocks",
    "tiny copy",
    "causal",
    "cut",
    "skip",
    "parts",
    "reload",
    "cache",
    "recommender",
]


def failed(results: list[CheckResult]) -> dict[str, str]:
    return {result.name: result.detail for result in results if not result.passed}


@pytest.mark.parametrize("name", REAL)
def test_real_configurations_pass_in_seconds(name):
    config = REAL[name]
    before = config.to_dict()
    state = torch.get_rng_state()
    start = time.perf_counter()
    results = check_backbone(config, depth=DEPTH)
    assert failed(results) == {}
    assert [result.name for result in results] == NAMES
    assert can_be_cut(results)
    assert f"{config.num_hidden_layers} blocks" in results[0].detail
    assert time.perf_counter() - start < 30
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_refused_cuts_are_told():
    config = GPT2Config(scale_attn_by_inverse_layer_idx=True)
    details = {result.name: result for result in check_backbone(config, depth=DEPTH)}
    assert details["cut"].passed
    assert "other cuts refused" in details["reload"].detail
    assert "attn scaling" in details["reload"].detail


def test_hybrid_is_told():
    results = check_backbone(
        Qwen3NextConfig(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
    )
    assert failed(results) == {}
    assert any("none of them has attention" in result.detail for result in results)


def test_embedded_and_folder(make_model, tmp_path):
    make_model("phi").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert failed(check_backbone(tmp_path, depth=DEPTH)) == {}
    assert failed(check_backbone("embedded", depth=DEPTH)) == {}
    with pytest.raises(BadInput, match="no such folder"):
        check_backbone(tmp_path / "nowhere")


def test_encoder_decoder_fails_with_a_reason():
    results = check_backbone(BartConfig())
    assert failed(results) == {"blocks": "bart is an encoder-decoder: only decoders can be cut"}


def test_a_skip_that_changes_the_state_is_caught(monkeypatch):
    monkeypatch.setattr(skipping, "_as_output", lambda state, extra: state * 1.01)
    assert {"cut", "skip"} <= set(failed(check_backbone(GPT2Config(), depth=DEPTH)))


def test_a_config_that_is_not_cut_is_caught(monkeypatch):
    def forgetful(model, kept):
        cut = check_keep(model, kept)
        cut.config.layer_types = list(reversed(cut.config.layer_types))
        return cut

    check_keep = proofs.keep_blocks
    monkeypatch.setattr(proofs, "keep_blocks", forgetful)
    assert failed(check_backbone(REAL["gemma3"], depth=DEPTH))


def test_blocks_that_share_a_cache_index_are_caught(monkeypatch):
    def clumsy(model, kept):
        cut = check_keep(model, kept)
        for block in proofs.find_blocks(cut):
            block.self_attn.layer_idx = 0
        return cut

    check_keep = proofs.keep_blocks
    monkeypatch.setattr(proofs, "keep_blocks", clumsy)
    results = check_backbone(Qwen2Config(), depth=DEPTH)
    assert failed(results).keys() == {"cache"}
    # a recommender notices that such a cache can't be shared
    assert "once a user" in results[-1].detail


def test_what_sees_later_positions_is_no_decoder():
    results = check_backbone(BertConfig(), depth=DEPTH)
    assert "earlier ones are off" in failed(results)["causal"]
    assert not can_be_cut(results)
    assert can_be_cut(check_backbone(BertConfig(is_decoder=True), depth=DEPTH))


def test_what_a_cut_does_not_need_may_fail():
    results = check_backbone(BertConfig(is_decoder=True), depth=DEPTH)
    assert failed(results).keys() == {"parts"}
    assert not next(result for result in results if result.name == "parts").required
    assert "not sums" in failed(results)["parts"]


def test_attention_that_is_left_out_in_name_alone_is_caught(monkeypatch):
    def nothing(branch, index):
        return lambda *args, **kwargs: skipping._as_output(
            args[0] if args else kwargs["hidden_states"], branch.extra
        )

    monkeypatch.setattr(skipping, "_nothing", nothing)
    assert failed(check_backbone(GPT2Config(), depth=DEPTH)).keys() == {"parts"}


def test_a_prompt_at_other_positions_is_caught(monkeypatch):
    def shifted(self, histories, prompt):
        kwargs = inputs(self, histories, prompt)
        return kwargs | {"position_ids": kwargs["position_ids"] + 5}

    inputs = proofs.Recommender.inputs
    monkeypatch.setattr(proofs.Recommender, "inputs", shifted)
    assert failed(check_backbone(GPT2Config(), depth=DEPTH)).keys() == {"recommender"}


def test_the_cache_of_the_uncut_model_is_told_apart():
    results = check_backbone(MoshiConfig(), depth=DEPTH)
    assert failed(results)["cache"].startswith("uncut, step by step: off by")


@pytest.mark.slow
def test_seven_billion_parameters_take_no_memory():
    script = (
        "import resource\n"
        "from transformers import LlamaConfig\n"
        "from depthprobe.models.check import can_be_cut, check_backbone\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert can_be_cut(check_backbone(LlamaConfig(), depth=4))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    mebibytes = int(done.stdout.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)
    assert mebibytes < 1000  # its weights are 13 GiB in half precision


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_an_architecture_that_brings_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # nobody is asked
    (tmp_path / "own.py").write_text(OWN_CODE)
    (tmp_path / "config.json").write_text(
        '{"model_type": "own_llama", "num_hidden_layers": 6, "auto_map":'
        ' {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}}'
    )
    with pytest.raises(BadInput, match="backbone"):
        check_backbone(tmp_path)
    results = check_backbone(tmp_path, trust_remote_code=True, depth=DEPTH)
    assert failed(results) == {}
    assert "OwnForCausalLM" in results[0].detail
