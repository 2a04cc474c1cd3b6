"""The self-test passes on sound architectures and fails on planted faults."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MoshiConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from depthprobe.errors import BadInput
from depthprobe.models import check as proofs
from depthprobe.models import skipping
from depthprobe.models.check import CHECKS, can_be_cut, check_backbone
from depthprobe.models.families import check_families, families, family_config

# A published size: a 70B Llama. The rest of the families that are checked with every change.
LLAMA_70B = LlamaConfig(
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
)
ALWAYS = ("falcon", "gemma2", "gemma3n_text", "gpt2", "llama", "mamba", "opt", "qwen3_moe")
# What is refused, by the beginning of the reason: the whole of what may not pass.
ENCODER = "blocks: {} is an encoder-decoder: only decoders can be cut"
ENCODER_DECODERS = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen",
    "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "whisper",
)  # fmt: skip
REFUSED = {name: ENCODER.format(name) for name in ENCODER_DECODERS}
REFUSED |= {
    # no list of blocks is as long as the configuration says, or two are
    "blt": "blocks: it has no list of blocks as long as",
    "hrm_text": "blocks: it has no list of blocks as long as",
    "longcat_flash": "blocks: it has no list of blocks as long as",
    "xlm": "blocks: it has more than one list of blocks",
    # transformers' default configuration builds no model, or a package is missing
    "gemma3n": "blocks: TimmWrapperModel requires the timm library",
    "gemma4_assistant": "blocks: ",
    "qwen4_exp": "blocks: unsupported operand",
    "qwen4_exp_text": "blocks: unsupported operand",
    # no small copy runs on text alone
    "deepseek_v4": "tiny copy: ",
    "dots3_note": "tiny copy: ",
    "gemma4_unified_assistant": "tiny copy: ",
    "xlnet": "tiny copy: ",
    "xmod": "tiny copy: ",
    "zamba": "tiny copy: ",
    # positions see later ones
    "cpmant": "causal: changing later tokens",
    # blocks know their place, the depth or each other
    "dory": "cut: no cut: its configuration does not rebuild it",
    "dots3_note_text": "cut: no cut: the shape of rotary_emb",
    "gpt_neox_japanese": "cut: no cut to blocks [0]: reloaded, block 0 would become block 0 with",
    "inkling2_loop_text": "cut: ",
    "inkling2_text": "cut: the model cut to 1 blocks differs from read-out",
    "minimax": "skip: no cut to blocks",
    "mllama": "cut: 8 states instead of 9: blocks [3] did not run",
    "reformer": "cut: 'tuple' object has no attribute",
    "rwkv": "cut: no cut: it rescales its weights",
    "zaya": "skip: skipping block 0: it is off by",
    # stock transformers does not read it back; its own cache is wrong
    "emu3": "reload: Unrecognized configuration class",
    "moshi": "cache: uncut, step by step: off by",
    "xlstm": "cache: The expanded size of the tensor",
}
# What can be cut, but is no recommender's backbone, or has no parts to skip (norms on the stream).
NO_RECOMMENDER = {"gemma4", "gemma4_unified", "trocr"}
NO_PARTS = {
    "beam", "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra",
    "ernie", "gemma3n_text", "git", "hy_v4", "openai-gpt", "rembert", "roberta", "roc_bert",
    "roformer", "trocr", "xlm-roberta",
}  # fmt: skip


DEPTH = 4  # half the blocks: a fraction of the time, and every kind of block is still there


def failed(results):
    return {result.name: result.detail for result in results if not result.passed}


def test_a_configuration_of_a_published_size_passes():
    before = LLAMA_70B.to_dict()
    state = torch.get_rng_state()
    results = check_backbone(LLAMA_70B, depth=DEPTH)
    assert failed(results) == {}
    assert [result.name for result in results] == ["blocks", "tiny copy", *CHECKS]
    assert can_be_cut(results)
    assert "80 blocks" in results[0].detail
    assert LLAMA_70B.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ALWAYS)
def test_a_family_passes(name):
    results = check_backbone(family_config(name), depth=DEPTH)
    assert failed(results).keys() == ({"parts"} if name in NO_PARTS else set())
    assert can_be_cut(results)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", families())
def test_every_family_passes_or_is_refused_for_the_known_reason(model_type):
    (family,) = check_families([model_type])
    if model_type in REFUSED:
        assert not family.can_be_cut
        assert family.reason.startswith(REFUSED[model_type])
    else:
        assert family.can_be_cut, family.reason
        may_fail = {"parts": model_type in NO_PARTS, "recommender": model_type in NO_RECOMMENDER}
        assert failed(family.results).keys() == {name for name, may in may_fail.items() if may}


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
    assert failed(
        check_backbone(
            Gemma3TextConfig(layer_types=["sliding_attention", "full_attention"] * 13), depth=DEPTH
        )
    )


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


def test_what_a_cut_does_not_need_may_fail():
    results = check_backbone(BertConfig(is_decoder=True), depth=DEPTH)
    assert can_be_cut(results)
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
    def shifted(self, histories, lengths, prompt):
        kwargs = inputs(self, histories, lengths, prompt)
        return kwargs | {"position_ids": kwargs["position_ids"] + 5}

    inputs = proofs.Recommender.inputs
    monkeypatch.setattr(proofs.Recommender, "inputs", shifted)
    failures = failed(check_backbone(GPT2Config(), depth=DEPTH))
    assert failures.keys() == {"recommender"}
    assert "its prompt shared: off by" in failures["recommender"]


def test_the_cache_of_the_uncut_model_is_told_apart():
    results = check_backbone(MoshiConfig(), depth=DEPTH)
    assert failed(results)["cache"].startswith("uncut, step by step: off by")


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
