"""Which configuration fields speak of single blocks, and what they become after a cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

# One entry a block: sliced.
PER_BLOCK_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "indexer_types",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "activation_sparsity_pattern",
    "attention_layers",
    "attn_layers",
    "intermediate_size",
)
# Indices of blocks: those kept, renumbered.
BLOCK_INDICES = (
    "mlp_only_layers",
    "full_attn_idxs",
    "moe_layers",
    "hybrid_layer_ids",
    "cross_attention_layers",
)
# The first n blocks are special: the kept ones among them are again the first.
LEADING_BLOCKS = (
    "first_k_dense_replace",
    "num_dense_layers",
    "max_window_layers",
    "moe_layer_start_index",
)
# The last n blocks are special.
TRAILING_BLOCKS = ("num_kv_shared_layers",)


def cut_config(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """A copy of ``config`` that describes the model with only the ``kept`` blocks.

    Per-block lists are sliced and block indices renumbered **by name**: a list that happens to be
    as long as the model is deep is left alone. ``config`` is not changed, and needs no weights.

    Args:
        config: of a decoder, or of a model that contains one.
        kept: increasing original indices, 0-based.
    """
    new = copy.deepcopy(config)
    text = new.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    position = {old: index for index, old in enumerate(kept)}
    heterogeneous = getattr(text, "is_heterogeneous", False)
    # Read before anything changes: as a property it is derived from the other fields.
    overrides = text.to_dict().get("per_layer_config") if heterogeneous else None
    if overrides is not None:
        text.per_layer_config = None

    changes: dict[str, Any] = {}
    for name in PER_BLOCK_LISTS:
        values = getattr(text, name, None)
        if isinstance(values, list | tuple) and len(values) == depth:
            changes[name] = [values[old] for old in kept]
    for name in BLOCK_INDICES:
        values = getattr(text, name, None)
        if isinstance(values, list | tuple):
            changes[name] = [position[old] for old in values if old in position]
    for name in LEADING_BLOCKS:
        value = getattr(text, name, None)
        if isinstance(value, int):
            changes[name] = sum(old < value for old in kept)
    for name in TRAILING_BLOCKS:
        value = getattr(text, name, None)
        if isinstance(value, int):
            changes[name] = sum(old >= depth - value for old in kept)
    last_sparse = getattr(text, "moe_layer_end_index", None)
    if isinstance(last_sparse, int) and last_sparse >= 0:
        changes["moe_layer_end_index"] = sum(old <= last_sparse for old in kept) - 1
    changes |= _gpt_neo_pattern(changes.get("attention_layers"), text)
    changes |= _sparse_step(text, kept)
    for name, value in changes.items():
        _assign(text, name, value)
    text.num_hidden_layers = len(kept)
    if overrides is not None:
        original = {int(old): override for old, override in overrides.items()}
        text.per_layer_config = {
            position[old]: override for old, override in original.items() if old in position
        }
    return new


def _gpt_neo_pattern(attention: list[str] | None, config: PreTrainedConfig) -> dict[str, Any]:
    """GPT-Neo derives its per-block list from ``[[kinds, repeats], ...]``: one group a block."""
    if attention is None or not hasattr(config, "attention_types"):
        return {}
    return {"attention_types": [[[kind], 1] for kind in attention]}


def _sparse_step(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Qwen MoE models: experts in every n-th block, as an explicit list of the dense blocks."""
    step = getattr(config, "decoder_sparse_step", None)
    if not isinstance(step, int) or step <= 1:
        return {}
    explicit = getattr(config, "mlp_only_layers", None) or []
    dense = [new for new, old in enumerate(kept) if old in explicit or (old + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _assign(config: PreTrainedConfig, name: str, value: object) -> None:
    """Set a field unless the configuration computes it from others (a read-only property)."""
    computed = getattr(type(config), name, None)
    if isinstance(computed, property) and computed.fset is None:
        return
    setattr(config, name, value)
