"""Sub-layers found by behaviour, against what the families' sources say; skips of parts."""

from __future__ import annotations

import pytest
import torch

from depthprobe.errors import BadInput
from depthprobe.models.blocks import find_blocks
from depthprobe.models.parts import find_sublayers
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.taps import tap_blocks

# Read in the sources: (what mixes positions, what does not) of a block.
SOURCES = {
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),  # both read the same state
    "falcon": ("self_attention", "mlp"),
    "gptj": ("attn", "mlp"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),  # these modules add the stream inside
    "opt": ("self_attn", "fc2"),
    "mpt": ("attn", "ffn.down_proj"),
    "gemma2": ("self_attn", "mlp"),  # a norm behind each
    "olmo2": ("self_attn", "mlp"),  # a norm behind each, none before
    "mixtral": ("self_attn", "mlp"),  # experts
    "granitemoe": ("self_attn", "block_sparse_moe"),
    "llama4_text": ("self_attn", "feed_forward"),  # experts that return a flattened batch
    "lfm2": ("conv", "feed_forward"),
    "qwen3_next": ("linear_attn", "mlp"),
}


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def split(branches):
    mixing = [branch.path for branch in branches if branch.mixes]
    return mixing, [branch.path for branch in branches if not branch.mixes]


@pytest.mark.parametrize("source", SOURCES)  # all of them: each takes a tenth of a second
def test_what_mixes_and_what_does_not(source, make_model):
    first, *_ = find_sublayers(make_model(source))
    attention, mlp = SOURCES[source]
    assert split(first) == ([attention], [mlp])


def test_kinds_of_blocks_are_told_apart(make_model):
    found = find_sublayers(make_model("qwen3_next"))
    assert [split(branches)[0][0] for branches in found] == (
        ["linear_attn"] * 2 + ["self_attn"]
    ) * 2
    assert [split(branches) for branches in find_sublayers(make_model("mamba"), [1])] == [
        (["mixer"], [])
    ]


def test_half_precision_and_training_mode_find_the_same(make_model):
    for name in ("llama", "mixtral", "cohere", "bloom"):
        model = make_model(name)
        expected = [split(branches) for branches in find_sublayers(model)]
        model.bfloat16().train()
        state = torch.get_rng_state()
        with tap_blocks(model) as tap:
            assert [split(branches) for branches in find_sublayers(model)] == expected, name
            with pytest.raises(RuntimeError, match="has not run"):
                _ = tap.states
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())


def test_llama_against_a_loop_written_by_hand(make_model, ids):
    model = make_model("llama")
    inner = model.model
    positions = torch.arange(9)[None]
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    for part, skipped in (("attention", {1, 4}), ("mlp", {0, 5})):
        with torch.no_grad():
            state = inner.embed_tokens(ids)
            rotary = inner.rotary_emb(state, positions)
            for index, block in enumerate(inner.layers):
                if part != "attention" or index not in skipped:
                    attended, _ = block.self_attn(
                        hidden_states=block.input_layernorm(state),
                        position_embeddings=rotary,
                        attention_mask=mask,
                    )
                    state = state + attended
                if part != "mlp" or index not in skipped:
                    state = state + block.mlp(block.post_attention_layernorm(state))
            expected = model.lm_head(inner.norm(state))
        with skip_blocks(model, skipped, part=part):
            result = logits(model, ids)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_what_is_skipped_is_not_computed(make_model, ids):
    model = make_model("llama")
    block = find_blocks(model)[2]
    ran = []
    block.self_attn.q_proj.register_forward_hook(lambda *_: ran.append("attention"))
    block.mlp.up_proj.register_forward_hook(lambda *_: ran.append("mlp"))
    with skip_blocks(model, {2}, part="attention"):
        ran.clear()
        logits(model, ids)
        assert ran == ["mlp"]
    with skip_blocks(model, {2}, part="mlp"):
        ran.clear()
        logits(model, ids)
        assert ran == ["attention"]


def test_inside_a_skipped_block_and_twice(make_model, ids):
    model = make_model("llama")
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    with skip_blocks(model, {1}):
        block_out = logits(model, ids)
        with skip_blocks(model, {1}, part="mlp"), skip_blocks(model, {1}, part="mlp"):
            assert torch.equal(logits(model, ids), block_out)
        assert torch.equal(logits(model, ids), block_out)
    with skip_blocks(model, {1}, part="mlp"):
        once = logits(model, ids)
        with skip_blocks(model, {1}, part="mlp"):
            assert torch.equal(logits(model, ids), once)
    after = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert after == forwards


def test_norms_on_the_stream_are_refused(make_model, ids):
    model = make_model("bert")
    with pytest.raises(ValueError, match=r"BertLayer\) are not sums"):
        find_sublayers(model)
    with pytest.raises(ValueError, match="not sums"), skip_blocks(model, {0}, part="attention"):
        pass
    with skip_blocks(model, {0}):  # the block as a whole can be left out
        assert logits(model, ids).isfinite().all()


def test_a_part_that_is_not_there(make_model):
    with (
        pytest.raises(ValueError, match="block 1 has no mlp to skip"),
        skip_blocks(make_model("mamba"), {1}, part="mlp"),
    ):
        pass
    with (
        pytest.raises(BadInput, match="part.*block, attention, mlp.*'ffn'"),
        skip_blocks(make_model("llama"), {1}, part="ffn"),
    ):
        pass


def test_keys_that_later_blocks_read_are_refused_for_attention_alone(make_model, ids):
    model = make_model("llama")
    find_blocks(model)[1].self_attn.store_full_length_kv = True
    with skip_blocks(model, {1}, part="attention"):  # nobody reads them
        assert logits(model, ids).isfinite().all()
    find_blocks(model)[5].self_attn.is_kv_shared_layer = True
    with (
        pytest.raises(ValueError, match="later blocks read"),
        skip_blocks(model, {1}, part="attention"),
    ):
        pass
    with skip_blocks(model, {1}, part="mlp"):
        assert logits(model, ids).isfinite().all()
