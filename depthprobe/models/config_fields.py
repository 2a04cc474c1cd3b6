"""Which configuration fields speak of single blocks, and what they become after a cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    "attn_layer_indices",
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
    with as_plain_fields(text) as overrides:
        for name, value in _changes(text, kept, depth, position).items():
            if not is_computed(text, name):
                setattr(text, name, value)
        if not is_computed(text, "num_hidden_layers"):
            text.num_hidden_layers = len(kept)
        renumbered = {position[old]: of for old, of in overrides.items() if old in position}
        overrides.clear()
        overrides.update(renumbered)
    return new


def block_kinds(config: PreTrainedConfig) -> list[tuple[Any, ...]]:
    """What the configuration says of each block's kind; equal blocks have equal entries."""
    text = copy.deepcopy(config.get_text_config(decoder=True))
    depth = text.num_hidden_layers
    with as_plain_fields(text) as overrides:
        found = [getattr(text, name, None) for name in PER_BLOCK_LISTS]
        lists = [v for v in found if isinstance(v, list | tuple) and len(v) == depth]
        indices = [getattr(text, name, None) for name in BLOCK_INDICES]
        chosen = [v for v in indices if isinstance(v, list | tuple)]
        return [
            (
                *(str(values[block]) for values in lists),
                *(block in values for values in chosen),
                str(overrides.get(block)),
            )
            for block in range(depth)
        ]


@contextmanager
def as_plain_fields(config: PreTrainedConfig) -> Iterator[dict[int, dict[str, Any]]]:
    """Within, a configuration whose blocks override single fields is as one without.

    Such a configuration refuses to tell a field that varies from block to block.

    Yields:
        the overrides by block; what they are on leaving is what the configuration gets.
    """
    heterogeneous = getattr(config, "is_heterogeneous", False)
    # Read before anything changes: as a property it is derived from the other fields.
    found = config.to_dict()["per_layer_config"] if heterogeneous else {}
    overrides = {int(block): dict(fields) for block, fields in found.items()}
    if heterogeneous:
        config.per_layer_config = None
    yield overrides
    if heterogeneous:
        applied: dict[int | str, dict[str, Any]] = dict(overrides.items())
        config.per_layer_config = applied


def is_computed(config: PreTrainedConfig, name: str) -> bool:
    """Whether the configuration derives a field from others (a read-only property)."""
    found = getattr(type(config), config.attribute_map.get(name, name), None)
    return isinstance(found, property) and found.fset is None


def _changes(
    text: PreTrainedConfig, kept: Sequence[int], depth: int, position: dict[int, int]
) -> dict[str, Any]:
    """The fields that a cut changes, and what they become."""
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
    if getattr(text, "num_blocks", None) == depth:  # the same number under a second name
        changes["num_blocks"] = len(kept)
    last_sparse = getattr(text, "moe_layer_end_index", None)
    if isinstance(last_sparse, int) and last_sparse >= 0:
        changes["moe_layer_end_index"] = sum(old <= last_sparse for old in kept) - 1
    if getattr(text, "scale_depth", None):  # divided by the root of the depth
        changes["scale_depth"] = text.scale_depth * math.sqrt(len(kept) / depth)
    if isinstance(getattr(text, "block_types", None), list):  # a pattern, repeated over the blocks
        changes["block_types"] = [text.block_types[old % len(text.block_types)] for old in kept]
    changes |= _gpt_neo_pattern(changes.get("attention_layers"), text)
    changes |= _sparse_step(text, kept)
    return changes


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
