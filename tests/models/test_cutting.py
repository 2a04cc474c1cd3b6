"""Cutting blocks out of tiny models of many families, against independent oracles."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from transformers import LlamaForCausalLM as Llama

from depthprobe.errors import BadInput
from depthprobe.models import cutting
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import cut_config, keep_blocks, loop_blocks, unshare_blocks
from depthprobe.models.families import family_config
from depthprobe.models.parts import check_readable, find_sublayers
from depthprobe.models.prompt import cache_argument
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.taps import tap_blocks
from depthprobe.models.tiny import tiny_model


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def cached(model, ids, split=6):
    first = model(ids[:, :split], use_cache=True)
    cache = first.past_key_values
    steps = [first.logits]
    for at in range(split, ids.shape[1]):
        steps.append(
            model(ids[:, at : at + 1], **{cache_argument(model): cache}, use_cache=True).logits
        )
    return torch.cat(steps, dim=1)


def test_llama_read_out_is_head_of_norm(make_model, ids):
    model = make_model("llama")
    with torch.no_grad(), tap_blocks(model) as tap:
        model(ids, use_cache=False)
        read_out = model.lm_head(model.model.norm(tap.states[2]))
    assert torch.equal(read_out, logits(keep_blocks(model, [0, 1]), ids))


def test_save_and_reload(family, make_model, ids, tmp_path):
    cut = keep_blocks(make_model(family), (0, 3, 4))
    cut.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True, experts_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, tensor in cut.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    # Not bit for bit: loaded tensors are aligned differently, some position tables are float32.
    torch.testing.assert_close(logits(loaded.eval(), ids), logits(cut, ids), rtol=0, atol=1e-6)
    # One more cut of what was reloaded: the configuration on disk is the whole truth.
    torch.testing.assert_close(
        logits(keep_blocks(loaded, [1]), ids), logits(keep_blocks(cut, [1]), ids), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("family_name", ["llama", "gpt2", "gemma3_text", "falcon", "qwen3_moe"])
def test_generate_with_and_without_cache(family_name, make_model, ids):
    cut = keep_blocks(make_model(family_name), (1, 2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = cut.generate(ids, use_cache=True, **options)
    assert with_cache.shape == (2, 15)
    assert torch.equal(with_cache, cut.generate(ids, use_cache=False, **options))


def test_per_block_fields_are_cut_by_name(make_model):
    config = keep_blocks(make_model("gemma3_text"), (0, 2, 5)).config
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    config = keep_blocks(make_model("qwen3_moe"), (1, 3, 4)).config
    assert config.mlp_only_layers == [1]
    config = keep_blocks(make_model("deepseek_v3"), (1, 3, 4)).config
    assert config.first_k_dense_replace == 1
    config = keep_blocks(make_model("smollm3"), (1, 2, 5)).config
    assert config.no_rope_layers == [1, 0, 0]
    config = keep_blocks(make_model("qwen2_moe"), (0, 3, 5)).config
    assert (config.decoder_sparse_step, config.mlp_only_layers) == (1, [0])


def test_list_of_matching_length_that_is_not_per_block_is_left_alone(make_model):
    model = make_model("llama")
    model.config.some_scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert len(keep_blocks(model, [0, 1]).config.some_scales) == 6


def test_original_config_and_its_other_users_are_unchanged(make_model, ids):
    teacher = make_model("llama")
    student = Llama(teacher.config).double().eval()
    before = logits(teacher, ids)
    keep_blocks(student, [0, 2])
    assert teacher.config.num_hidden_layers == 6
    assert student.config.num_hidden_layers == 2
    assert student.model.config is student.config
    assert find_blocks(student)[1].self_attn.config is student.config
    assert torch.equal(logits(teacher, ids), before)


def test_base_model_alone(make_model, ids, tmp_path):
    whole = make_model("qwen3")
    base = copy.deepcopy(whole.model)
    with torch.no_grad():
        expected = keep_blocks(whole, (0, 4)).model(ids, use_cache=False)[0]
        assert keep_blocks(base, (0, 4)) is base
        assert torch.equal(base(ids, use_cache=False)[0], expected)
    base.save_pretrained(tmp_path)
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_under_peft(make_model, ids, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), lora).double().eval()
    reference = copy.deepcopy(model).merge_and_unload()
    assert find_blocks(model) is model.get_base_model().model.layers
    assert keep_blocks(model, (0, 2, 3)) is model
    expected = logits(keep_blocks(reference, (0, 2, 3)), ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-12)
    assert model.config.num_hidden_layers == 3
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 3


LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"]}
NUMBERED = {
    "layers_to_transform": LoraConfig(**LORA, layers_to_transform=[4]),
    "layers_pattern": LoraConfig(**LORA, layers_to_transform=[2, 3], layers_pattern="layers"),
    "rank_pattern": LoraConfig(**LORA, rank_pattern={r"layers\.4\.self_attn\.q_proj": 5}),
    "alpha_pattern": LoraConfig(**LORA, alpha_pattern={r"layers\.4\.self_attn\.q_proj": 5}),
    "exclude_modules": LoraConfig(**LORA, exclude_modules=r".*layers\.[01]\..*"),
    "targets by path": LoraConfig(target_modules=["layers.2.mlp.up_proj", "layers.3.mlp.up_proj"]),
    "targets by pattern": LoraConfig(target_modules=r".*layers\.[24]\.mlp\.up_proj"),
    "modules_to_save": LoraConfig(**LORA, modules_to_save=["layers.2.mlp"]),
    "IA3": IA3Config(target_modules=r".*layers\.[0-2]\..*(k|down)_proj", feedforward_modules=[]),
    "a prefix for each block": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("case", NUMBERED)
def test_adapters_that_number_the_blocks_are_refused(case, make_model):
    model = get_peft_model(make_model("llama").float(), copy.deepcopy(NUMBERED[case]))
    with pytest.raises(BadInput, match="an adapter is around it that knows its blocks"):
        keep_blocks(model, (2, 4))
    assert len(find_blocks(model)) == 6


ALIKE = {
    "plain": LoraConfig(**LORA),
    "DoRA": LoraConfig(**LORA, use_dora=True, use_rslora=True),
    "a pattern of no block": LoraConfig(**LORA, rank_pattern={"q_proj": 5}, bias="all"),
    "the first blocks": LoraConfig(**LORA, layers_to_transform=[0, 1]),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "a prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("case", ALIKE)
def test_adapters_that_come_back_as_they_were(case, make_model, ids, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama").float(), copy.deepcopy(ALIKE[case])).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "ia3" in name:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    expected = logits(keep_blocks(model, (0, 1, 4)), ids)
    model.save_pretrained(tmp_path)
    base = keep_blocks(make_model("llama").float(), (0, 1, 4))
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(again, ids), expected)


QUANTIZED = {  # settings, and what a cut to blocks 0 and 2 makes of them
    "llm_int8_skip_modules": (
        ["lm_head", "model.layers.1.mlp", "model.layers.2.mlp", "layers.2.self_attn.q_proj"],
        ["lm_head", "model.layers.1.mlp", "layers.1.self_attn.q_proj"],
    ),
    "modules_to_not_convert": (
        ["model.layers.2", "vision.layers.2.up", None],
        ["model.layers.1", "vision.layers.2.up", None],
    ),
    "config_groups": (
        {"group_0": {"targets": ["Linear"], "ignore": ["model.layers.2.mlp.up_proj"], "bits": 4}},
        {"group_0": {"targets": ["Linear"], "ignore": ["model.layers.1.mlp.up_proj"], "bits": 4}},
    ),
    "layer_quant_config": ({"model.layers.1": 4, "model.layers.2": 8}, {"model.layers.1": 8}),
    "ignore": (
        ["re:.*lm_head", r"re:.*layers\.\d+\.self_attn.*", "*.mlp"],
        ["re:.*lm_head", r"re:.*layers\.\d+\.self_attn.*", "*.mlp"],
    ),
}


@pytest.mark.parametrize("field", QUANTIZED)
@pytest.mark.parametrize("kind", [dict, BitsAndBytesConfig])
def test_what_quantisation_names_moves_with_its_block(field, kind, make_model):
    model, (before, after) = make_model("llama"), QUANTIZED[field]
    settings = kind()
    if kind is dict:
        settings[field] = before
    else:
        vars(settings)[field] = before
    model.config.quantization_config = settings
    old = model.config
    keep_blocks(model, [0, 2])
    new = model.config.quantization_config
    assert (new if kind is dict else vars(new))[field] == after
    assert (settings if kind is dict else vars(settings))[field] == before
    assert old.quantization_config is settings


@pytest.mark.parametrize(
    "settings",
    [
        {"ignore": [r"re:.*layers\.(0|1)\..*"]},
        {"dynamic": {r"-:model\.layers\.2\..*": {}}},
        {"modules_to_not_convert": ["model.layers.[12].mlp"]},
    ],
)
def test_patterns_that_tell_blocks_apart_are_refused(settings, make_model):
    model = make_model("llama")
    model.config.quantization_config, depth = settings, len(find_blocks(model))
    with pytest.raises(BadInput, match=r"cut to blocks \[0, 2\]: its quantization_config names"):
        keep_blocks(model, [0, 2])
    assert len(find_blocks(model)) == depth


def test_initial_values_of_an_adapter_are_not_computed_for_the_comparison(make_model):
    lora = LoraConfig(**LORA, init_lora_weights="pissa")
    model = keep_blocks(get_peft_model(make_model("llama").float(), lora), (1, 4))
    assert len(find_blocks(model)) == 2


def test_all_blocks_kept_changes_nothing(make_model):
    model = make_model("llama")
    blocks, config = find_blocks(model), model.config
    assert keep_blocks(model, np.arange(6)) is model
    assert find_blocks(model) is blocks
    assert model.config is config


@pytest.mark.parametrize("kept", [[], [6], [-1], [1, 0], [2, 2], ["0"], [0.0], None, 3], ids=repr)
def test_bad_kept(kept, make_model):
    model = make_model("llama")
    with pytest.raises(BadInput, match="kept.*from 0 to 5"):
        keep_blocks(model, kept)
    assert len(find_blocks(model)) == 6


def test_refuses_hybrid_without_attention(make_model, ids):
    model = make_model("qwen3_next")
    before = logits(model, ids)
    with pytest.raises(ValueError, match="none of them has attention"):
        keep_blocks(model, (0, 1, 3))
    assert len(find_blocks(model)) == model.config.num_hidden_layers == 6
    assert torch.equal(logits(model, ids), before)
    cut = keep_blocks(model, (0, 2, 3))
    assert cut.config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    torch.testing.assert_close(cached(cut, ids), logits(cut, ids), rtol=0, atol=1e-4)


def test_refuses_what_the_configuration_cannot_say(make_model):
    with pytest.raises(ValueError, match="block 2 would become block 0 with attn scaling"):
        keep_blocks(make_model("gpt2_scaled"), (2, 3))
    assert len(find_blocks(keep_blocks(make_model("gpt2_scaled"), (0, 1)))) == 2
    with pytest.raises(ValueError, match="class"):
        keep_blocks(make_model("jamba"), (0, 2, 3, 4))
    assert len(find_blocks(keep_blocks(make_model("jamba"), (0, 1, 2, 3)))) == 4


def test_what_is_removed_is_freed(make_model):
    model = make_model("llama")
    removed = [weakref.ref(p) for i in (1, 4) for p in find_blocks(model)[i].parameters()]
    before = sum(p.numel() for p in model.parameters())
    per_block = sum(p.numel() for p in find_blocks(model)[0].parameters())
    keep_blocks(model, (0, 2, 3, 5))
    gc.collect()
    assert removed
    assert all(reference() is None for reference in removed)
    assert sum(p.numel() for p in model.parameters()) == before - 2 * per_block


def test_embeddings_that_hold_a_chunk_a_block_are_cut(make_model, ids, tmp_path):
    model = make_model("gemma3n_text")
    chunks = model.model.embed_tokens_per_layer.weight.detach().unflatten(1, (6, 8)).clone()
    rows = model.model.per_layer_model_projection.weight.detach().unflatten(0, (6, 8)).clone()
    kept = (0, 2, 3, 4, 5)  # block 1's keys and values nobody else reads
    with skip_blocks(model, {1}):
        expected = logits(model, ids)
    cut = keep_blocks(model, kept)
    assert torch.equal(cut.model.embed_tokens_per_layer.weight, chunks[:, kept].flatten(1))
    assert torch.equal(cut.model.per_layer_model_projection.weight, rows[kept, :].flatten(0, 1))
    assert cut.model.embed_tokens_per_layer.embedding_dim == 40
    assert cut.model.per_layer_model_projection.out_features == 40
    torch.testing.assert_close(logits(cut, ids), expected, rtol=0, atol=1e-12)
    cut.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded.eval(), ids), expected, rtol=0, atol=1e-6)


def test_producers_of_shared_keys_stay(make_model, ids):
    # of gemma3n_text's blocks, 4 and 5 read the keys of the last sliding and full ones, 3 and 2
    for kept, reason in (((0, 1, 2, 4, 5), "store_full_length_kv"), ((0, 1, 3, 5), "different")):
        model = make_model("gemma3n_text")
        with pytest.raises(ValueError, match=reason):
            keep_blocks(model, kept)
        assert len(find_blocks(model)) == 6
    cut = keep_blocks(make_model("gemma3n_text"), (0, 1, 3, 4))  # with its only reader, block 2 may
    assert cut.config.num_kv_shared_layers == 1
    model = make_model("gemma3n_text")
    with skip_blocks(model, {0, 4, 5}):
        expected = logits(model, ids)
    cut = keep_blocks(model, (1, 2, 3))  # nobody reads what 2 and 3 keep
    assert cut.config.num_kv_shared_layers == 0
    torch.testing.assert_close(logits(cut, ids), expected, rtol=0, atol=1e-12)


def tiny(name, depth=6, **changes):
    config = family_config(name)
    for field, value in changes.items():
        setattr(config, field, value)
    return tiny_model(config, depth=depth)


def test_residuals_scaled_by_the_depth_keep_their_scale(ids, tmp_path):
    model = tiny("minicpm3")
    scale = find_blocks(model)[0].residual_scale
    with skip_blocks(model, {1, 4}):
        expected = logits(model, ids)
    cut = keep_blocks(model, (0, 2, 3, 5))
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert find_blocks(loaded)[0].residual_scale == pytest.approx(scale, rel=1e-12)
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=0, atol=1e-6)


def test_a_last_block_that_must_be_of_one_kind(ids):
    model = tiny("gemma4_text")
    kinds = model.config.layer_types
    assert kinds == ["sliding_attention"] * 4 + ["full_attention"] * 2
    with pytest.raises(ValueError, match="block 3 would become block 3 with self_attn"):
        keep_blocks(model, range(4))
    with skip_blocks(model, {0, 3}):
        expected = logits(model, ids)
    cut = keep_blocks(model, (1, 2, 4, 5))
    assert [block.self_attn.head_dim for block in find_blocks(cut)] == [8] * 4
    torch.testing.assert_close(logits(cut, ids), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "kept", "reason"),
    [
        ("rwkv", (0, 1), "rescales its weights"),
        ("zamba2", (1, 2, 3, 4, 5), "layer_dic"),
        ("minimax", (1, 2, 3), "num_hidden_layers = 3"),
        ("diffllama", (2, 3), "lambda_init"),
        ("mamba2", (), "at least one"),
    ],
)
def test_families_whose_blocks_know_their_place(name, kept, reason):
    model = tiny(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((ValueError, BadInput), match=reason):
        keep_blocks(model, kept)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("rwkv", lambda model: keep_blocks(model, (0, 1))),
        ("xlm", find_blocks),
        ("bert", find_sublayers),
        ("mllama", check_readable),
    ],
)
def test_an_architecture_that_does_not_allow_it_is_one_line(name, use):
    with pytest.raises(BadInput, match="^backbone: '") as caught:
        use(tiny(name))
    assert "\n" not in str(caught.value)


def test_blocks_that_share_weights_are_refused(make_model):
    model = make_model("llama")
    find_blocks(model)[4].mlp.up_proj.weight = find_blocks(model)[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match="its blocks share weights"):
        keep_blocks(model, (0, 1))
    assert len(find_blocks(model)) == 6


def test_infinite_settings_survive(ids):
    cut = keep_blocks(tiny("mamba2"), (1, 3))  # its time steps are bounded by infinity
    assert len(find_blocks(cut)) == 2
    assert logits(cut, ids).isfinite().all()


def test_a_config_that_comes_back_as_another_is_refused(make_model, monkeypatch):
    def forgetful(config, kept):
        new = cut_config(config, kept)
        new.layer_types = new.layer_types[::-1]
        return new

    monkeypatch.setattr(cutting, "cut_config", forgetful)
    model = make_model("gemma3_text")
    with pytest.raises(ValueError, match="sliding"):
        keep_blocks(model, (0, 1, 2, 3))
    assert len(find_blocks(model)) == 6


# --- blocks applied again ------------------------------------------------------------------------


def in_turn(model, ids, times):
    """The last state of the model when its blocks are run again and again, by a naive loop."""
    blocks = find_blocks(model)
    stack = torch.nn.ModuleList(copy.deepcopy(block) for _ in range(times) for block in blocks)
    for index, block in enumerate(stack):
        for module in block.modules():
            for name, value in vars(module).items():
                if name in {"layer_idx", "layer_id"} and isinstance(value, int):
                    setattr(module, name, index)
    deep = copy.deepcopy(model)
    deep.model.layers = stack
    deep.config.num_hidden_layers = len(stack)
    if getattr(deep.config, "layer_types", None):
        deep.config.layer_types = list(deep.config.layer_types) * times
    return logits(deep, ids)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_looped_blocks_are_the_blocks_in_turn(make_model, ids, tmp_path, name):
    model = keep_blocks(make_model(name), [0, 1, 2, 5])
    goal, size = in_turn(model, ids, 3), sum(p.numel() for p in model.parameters())
    loop_blocks(model, 3)  # twelve blocks, of a model that had six
    assert len(find_blocks(model)) == model.config.num_hidden_layers == 12
    assert torch.equal(logits(model, ids), goal)
    assert sum(p.numel() for p in model.parameters()) == size
    torch.testing.assert_close(cached(model, ids), goal, rtol=1e-9, atol=1e-9)
    unshare_blocks(model)
    assert torch.equal(logits(model, ids), goal)
    model.save_pretrained(tmp_path)
    again, said = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=model.dtype, output_loading_info=True
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert torch.equal(logits(again.eval(), ids), goal)


def test_a_gradient_of_looped_blocks_is_the_sum_over_their_turns(make_model, ids):
    model = keep_blocks(make_model("llama"), [0, 1])
    loop_blocks(model, 2)
    apart = unshared(model)
    for each in (model, apart):
        each(ids, use_cache=False).logits.square().mean().backward()
    names = dict(apart.named_parameters())
    for name, weight in model.named_parameters():
        own = names[name].grad
        if ".layers." in name:
            number = int(name.split(".layers.")[1].split(".")[0])
            own = own + names[name.replace(f".layers.{number}.", f".layers.{number + 2}.")].grad
        torch.testing.assert_close(weight.grad, own, rtol=1e-10, atol=1e-12)


def unshared(model):
    other = copy.deepcopy(model)
    unshare_blocks(other)
    return other


@pytest.mark.parametrize("name", ["gpt2_scaled", "gemma3n_text"])
def test_blocks_that_know_their_place_cannot_be_looped(make_model, name):
    model = make_model(name)
    depth = len(find_blocks(model))
    with pytest.raises(BadInput, match="cannot be applied again|cannot be cut"):
        loop_blocks(model, 2)
    assert len(find_blocks(model)) == depth


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2"])
def test_kinds_of_blocks_are_repeated_in_their_order(make_model, ids, name):
    model = make_model(name)
    kinds = model.config.layer_types
    loop_blocks(model, 2)
    assert model.config.layer_types == kinds * 2
    unshare_blocks(model)
    twin = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin, ids), logits(model, ids))
