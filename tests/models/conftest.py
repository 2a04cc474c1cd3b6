"""Tiny random models of many families, in float64, with weights large enough to matter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BLOCKS = 6
MODERN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OLD = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
HEAD = {"head_dim": 8}
WINDOW = {"sliding_window": 4}
MULTI = {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"] * 2
GPTJ = {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64, "rotary_dim": 4}

# Families whose every subset of blocks can be cut. The self-test's slow run covers all others.
FREE: dict[str, dict[str, Any]] = {
    "llama": MODERN,
    "mistral": MODERN | WINDOW,
    "qwen2": MODERN | WINDOW | {"use_sliding_window": True, "max_window_layers": 3,
      "layer_types": None},
    "qwen3": MODERN | HEAD,
    "gpt2": {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64},
    "opt": OLD | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "gpt_neox": OLD | {"intermediate_size": 48, "max_position_embeddings": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": BLOCKS, "num_heads": 4,
      "attention_types": [[["global", "local"], 3]], "window_size": 4,
      "max_position_embeddings": 64},
    "falcon": OLD,
    "bloom": {"hidden_size": 32, "n_layer": BLOCKS, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": BLOCKS, "n_heads": 4, "max_seq_len": 64},
    "gptj": GPTJ,
    "phi": MODERN,
    "gemma2": MODERN | HEAD | WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": MODERN | HEAD | WINDOW | {"layer_types": PATTERN},
    "olmo2": MODERN,
    "stablelm": MODERN,
    "starcoder2": MODERN,
    "cohere": MODERN,
    "mixtral": MODERN | {"num_local_experts": 4},
    "gemma": MODERN | HEAD,
    "granitemoe": MODERN | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": MODERN | HEAD,
    "gpt_bigcode": {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64},
    "codegen": GPTJ,
    "biogpt": OLD | {"intermediate_size": 48, "max_position_embeddings": 64},
    "qwen2_moe": MODERN | EXPERTS | {"shared_expert_intermediate_size": 16,
      "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "qwen3_moe": MODERN | EXPERTS | HEAD | {"mlp_only_layers": [0, 3]},
    "deepseek_v3": MODERN | MULTI | {"first_k_dense_replace": 2, "moe_intermediate_size": 16,
      "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
      "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
      "v_head_dim": 8},
    "smollm3": MODERN | {"pad_token_id": 0, "no_rope_layer_interval": 3},
    "llama4_text": MODERN | HEAD | {"intermediate_size_mlp": 48, "num_local_experts": 4,
      "moe_layers": [1, 3, 5], "attention_chunk_size": 4},
}  # fmt: skip
# Families where some cuts must be refused.
BOUND: dict[str, dict[str, Any]] = {
    "gpt2_scaled": {"model_type": "gpt2", "n_embd": 32, "n_layer": BLOCKS, "n_head": 4,
      "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    "qwen3_next": MODERN | EXPERTS | HEAD | LINEAR | {"shared_expert_intermediate_size": 16,
      "layer_types": (["linear_attention"] * 2 + ["full_attention"]) * 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": BLOCKS, "state_size": 4},
    "lfm2": MODERN | {"layer_types": ["conv", "conv", "full_attention"] * 2, "block_ff_dim": 48},
    "bert": OLD | {"intermediate_size": 48, "is_decoder": True},
    "jamba": MODERN | {"num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1,
      "expert_layer_period": 2, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "gemma3n_text": MODERN | HEAD | WINDOW | {"intermediate_size": [48] * BLOCKS,
      "layer_types": PATTERN, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 61,
      "hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.0] * BLOCKS,
      "laurel_rank": 4},
}  # fmt: skip


# Run with every change. The other families are slow: ``make test-all`` runs them.
ALWAYS = {"llama", "gpt2", "opt", "gemma2", "gemma3n_text", "qwen3_moe", "mamba", "falcon"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with a ``family`` argument once for each family that can be cut freely."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", sorted(FREE))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is parametrized with one of the other families as slow."""
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent == Path(__file__).parent:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            names = {params.get("family"), params.get("name")}
            if names & ((FREE.keys() | BOUND.keys()) - ALWAYS):
                item.add_marker("slow")


@cache
def _build(family: str, seed: int) -> PreTrainedModel:
    fields = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    fields |= (FREE | BOUND)[family]
    if family == "gemma3n_text":
        fields["vocab_size"] = 64
    config = CONFIG_MAPPING[fields.pop("model_type", family)](**fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, experts_implementation="eager"
    )
    return enlarge(model.eval())


def enlarge(model: PreTrainedModel) -> PreTrainedModel:
    """Fresh weights are so small that a wrong mask would change almost nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """``make_model(family, seed=0)``: a fresh copy of the tiny model."""
    return lambda family, seed=0: copy.deepcopy(_build(family, seed))


@pytest.fixture
def saved(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint of Qwen 3 in a folder, float32."""
    folder = tmp_path / "saved"
    make_model("qwen3").float().save_pretrained(folder)
    return folder


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """``edit_config(folder, field=value)``: a configuration as somebody else wrote it."""

    def edit(folder: Path, **changes: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids, (2, 9): longer than the sliding windows."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 60, (2, 9), generator=generator)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Its state is one a process: none comes in from other tests, none goes out to them."""
    for last in (False, True):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # accelerate has no public way
        if not last:
            yield


@pytest.fixture
def bypass() -> Callable[..., Any]:
    """``bypass(blocks, indices)``: an oracle for skipping: let blocks run, undo what they did."""

    def install(blocks: nn.ModuleList, indices: set[int]) -> list[Any]:
        def undo(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            state = args[0] if args else kwargs["hidden_states"]
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return [blocks[i].register_forward_hook(undo, with_kwargs=True) for i in indices]

    return install
