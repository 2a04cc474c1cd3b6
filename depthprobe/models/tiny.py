"""Tiny copies of an architecture: few, narrow, random blocks of the same kinds, in order."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from depthprobe.models.cutting import as_plain_fields, block_kinds, cut_config, is_computed

DEPTH = 8  # enough for one period of the usual patterns of block kinds
TOKENS = 9  # longer than the shrunk attention windows
LARGEST = 50_000_000  # most parameters of a copy whose width could not be shrunk


def _caps(table: dict[int, str]) -> dict[str, int]:
    """From ``{limit: "field field"}`` to ``{field: limit}``."""
    return {name: most for most, names in table.items() for name in names.split()}


# What a field may be at most in the tiny copy. Absent fields stay absent.
CONTENT = _caps(
    {
        128: "vocab_size vocab_size_per_layer_input max_position_embeddings",
        4: "sliding_window attention_chunk_size num_experts num_local_experts n_routed_experts",
        2: "num_experts_per_tok",
        48: "intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size n_inner dim_ff",
        16: (
            "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
            "moe_shared_expert_intermediate_size rel_extent"
        ),
        1: "n_group topk_group",
    }
)
# With state-space layers: twice the width is as many heads as fit.
WIDTH = _caps(
    {
        32: "hidden_size embedding_dim embedding_size lru_width",
        16: "word_embed_proj_dim attention_head_dim",
        4: (
            "num_attention_heads rotary_dim qk_rope_head_dim qk_nope_head_dim "
            "swa_num_attention_heads linear_num_value_heads linear_num_heads laurel_rank "
            "mamba_dt_rank time_step_rank chunk_size mamba_chunk_size"
        ),
        8: (
            "head_dim dim_head kv_channels adapter_rank q_lora_rank kv_lora_rank o_lora_rank "
            "v_head_dim qk_head_dim index_head_dim swa_head_dim linear_key_head_dim "
            "linear_value_head_dim linear_head_dim hidden_size_per_layer_input state_size "
            "ssm_state_size mamba_d_state mamba_d_head mamba_head_dim mamba_headdim "
            "mamba_n_heads mamba_num_heads n_mamba_heads"
        ),
        2: "index_n_heads swa_num_key_value_heads linear_num_key_heads n_groups mamba_n_groups",
        64: "mamba_d_ssm",
    }
)
STATE_SPACE_HEADS = 8
OTHER = {"num_hidden_layers": 1, "depth": 1, "kv_n_heads": 2}  # parts beside the text's blocks

_auto: Any = AutoModelForCausalLM  # untyped in transformers


def tiny_model(config: PreTrainedConfig, *, depth: int = DEPTH) -> PreTrainedModel:
    """A random model of the narrowest copy that can be built and run, in evaluation mode.

    In float64, or float32 if a family can't compute in float64. Its weights are five times as large
    as usual initial ones, with which a wrong mask would change almost nothing. The caller's random
    state is not changed.
    """
    failure: Exception | None = None
    for width in (True, False):
        for dtype in (torch.float64, torch.float32):
            try:
                return build_tiny(tiny_config(config, width=width, depth=depth), dtype)
            except Exception as error:  # try the next one; the last error is raised
                failure = failure or error
    lines = str(failure).strip().splitlines()
    reason = lines[0] if lines else type(failure).__name__
    raise ValueError(f"no small copy can be built and run on text: {reason}") from failure


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a configuration names; None if it names none."""
    text = config.get_text_config(decoder=True)
    named = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((most for most in named if type(most) is int and most > 0), None)


def steady_positions(config: PreTrainedConfig) -> int | None:
    """Up to how many positions a state depends only on its own text; None if there is no limit.

    Two kinds of rotary tables change with the length of a pass: beyond that many positions all
    users of a batch get the table of its longest, and a cached prompt keeps that of a short one.
    """
    text = config.get_text_config(decoder=True)
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        kind = str(rope.get("rope_type"))
        if kind == "longrope":
            return int(rope["original_max_position_embeddings"])
        if "dynamic" in kind:
            return positions_of(config)
    return None


def ends_at_positions(config: PreTrainedConfig) -> bool:
    """Whether a model can't compute beyond its last position, as with learned position embeddings.

    Tried on a tiny copy. If none can be built, the answer is no, unless the model has fewer
    positions than a copy is tried with.
    """
    try:
        model = tiny_model(config)
    except ValueError:
        return (positions_of(config) or TOKENS) < TOKENS
    tokens = torch.ones(1, (positions_of(model.config) or 0) + TOKENS, dtype=torch.long)
    try:
        with torch.inference_mode():
            model(tokens, use_cache=False)
    except Exception:  # an index out of range, or shapes that do not fit
        return True
    return False


def build_tiny(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The random model of a tiny configuration, after one successful run."""
    with torch.device("meta"):
        trusted = brings_code(config)
        size = _auto.from_config(copy.deepcopy(config), trust_remote_code=trusted).num_parameters()
    if size > LARGEST:
        raise ValueError(f"it would have {size:,} parameters")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        # Fused experts do not support float64.
        model: PreTrainedModel = _auto.from_config(
            config, dtype=dtype, experts_implementation="eager", trust_remote_code=trusted
        ).eval()
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
        model(torch.ones(1, TOKENS, dtype=torch.long), use_cache=False)
    return model


def brings_code(config: PreTrainedConfig) -> bool:
    """Whether a configuration's class is a model's own code, which the user has trusted."""
    return type(config).__module__.startswith("transformers_modules.")


def tiny_config(
    config: PreTrainedConfig, *, width: bool = True, depth: int = DEPTH
) -> PreTrainedConfig:
    """A copy with few, narrow blocks of the same kinds in the same order.

    If the configuration holds other models too (a vision tower), those shrink as well. At most
    ``depth`` blocks stay: the first ones, and the first of each kind. Without ``width`` the hidden
    size and the heads stay as they are.
    """
    tiny = cut_config(config, _representative(config, depth))
    text = tiny.get_text_config(decoder=True)
    for name in getattr(tiny, "sub_configs", None) or {}:
        other = getattr(tiny, name, None)
        if isinstance(other, PreTrainedConfig) and other is not text:
            _cap(other, CONTENT | WIDTH | OTHER)
    caps = CONTENT | (WIDTH if width else {})
    with as_plain_fields(text) as overrides:
        _shrink(text, caps, width=width)
        for fields in overrides.values():
            fields.update({k: min(v, caps.get(k, v)) for k, v in fields.items() if type(v) is int})
    return tiny


def _representative(config: PreTrainedConfig, depth: int) -> list[int]:
    """The first blocks, the first block of each other kind, and the last."""
    kinds = block_kinds(config)
    firsts = {kind: place for place, kind in reversed(list(enumerate(kinds)))}
    late = sorted({*(p for p in firsts.values() if p >= depth - 1), len(kinds) - 1})[-depth:]
    return [place for place in range(len(kinds)) if place < depth - len(late) or place in late]


def _shrink(text: PreTrainedConfig, caps: dict[str, int], *, width: bool) -> None:
    heads = getattr(text, "num_attention_heads", None)
    key_heads = getattr(text, "num_key_value_heads", None)
    inner, outer = getattr(text, "attention_hidden_size", None), text.hidden_size
    _cap(text, caps)
    if width and inner and not is_computed(text, "attention_hidden_size"):
        text.attention_hidden_size = inner * text.hidden_size // outer
    rotary = getattr(text, "qk_rope_head_dim", None)
    if width and rotary and hasattr(text, "head_dim") and not is_computed(text, "head_dim"):
        text.head_dim = rotary  # multi-head latent attention: what the rotary table is made for
    if width and heads and key_heads and not is_computed(text, "num_key_value_heads"):
        few = text.num_attention_heads  # key-value heads: as many as heads, one, or fewer
        shared = 1 if key_heads == 1 else few // 2
        text.num_key_value_heads = few if key_heads == heads else shared
    if width and hasattr(text, "expand") and hasattr(text, "num_heads"):
        text.num_heads = STATE_SPACE_HEADS
    for name, value in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        setattr(text, name, value)
    if isinstance(getattr(text, "rope_parameters", None), dict):
        text.rope_parameters = _plain_rope(text.rope_parameters)


def _cap(config: PreTrainedConfig, caps: dict[str, int]) -> None:
    for name, most in caps.items():
        value = getattr(config, name, None)
        if isinstance(value, list) and all(type(item) is int for item in value):
            setattr(config, name, [min(item, most) for item in value])
        elif type(value) is int and not is_computed(config, name):
            setattr(config, name, min(value, most))


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings without per-frequency tables, which fit only one head size."""
    kept = "rope_theta partial_rotary_factor original_max_position_embeddings llama_4_scaling_beta"
    if "rope_type" in rope or not any(isinstance(value, dict) for value in rope.values()):
        return {"rope_type": "default"} | {
            name: rope[name] for name in kept.split() if name in rope
        }
    return {
        kind: _plain_rope(value) if isinstance(value, dict) else value
        for kind, value in rope.items()
    }
