"""Which configuration fields speak of single blocks, and what they become after a cut."""

from __future__ import annotations

import copy
import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.models.blocks import find_blocks, list_at, locate, unwrap
from depthprobe.models.reloading import compare_reload

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


# Cut blocks out of a Hugging Face model so that what is left is an ordinary, shallower model.

ModelT = TypeVar("ModelT", bound=nn.Module)

# Kinds of blocks in which no position sees another through keys and values.
RECURRENT = frozenset({"linear_attention", "conv", "mamba", "recurrent", "moe", "mlp"})


def keep_blocks(model: ModelT, kept: Iterable[int]) -> ModelT:
    """Remove all blocks but ``kept``, in place, and return the model.

    The model gets a new ``ModuleList`` and a new configuration (the old configuration object may
    be shared with other models and is not changed); block indices inside the blocks are renumbered,
    so caches, ``save_pretrained`` and ``from_pretrained`` work as for any model of that depth.
    Works on a causal language model, on its base model, and under PEFT.

    Before anything is changed, the model that the new configuration describes is compared with the
    old one, block by block (sub-modules, shapes, settings), on the meta device: a cut that would
    not survive ``save_pretrained`` and ``from_pretrained`` is refused.

    Args:
        model: a Hugging Face decoder.
        kept: increasing, unique, original indices, 0-based; at least one.

    Raises:
        BadInput: if ``kept`` is not that.
        ValueError: if the architecture cannot be cut this way; the model is unchanged.
    """
    inner = unwrap(model)
    owner, name = locate(inner)
    blocks = find_blocks(inner)
    chosen = _check_kept(kept, len(blocks))
    if len(chosen) == len(blocks):
        return model
    _refuse_unsafe(model, inner, name, chosen)
    new_config = cut_config(inner.config, chosen)
    changes = compare_reload(inner, new_config, chosen)

    parent, _, attribute = name.rpartition(".")
    setattr(owner.get_submodule(parent), attribute, nn.ModuleList(blocks[old] for old in chosen))
    remaining = list_at(owner, name)
    for item in changes.inside:
        setattr(remaining[item.block].get_submodule(item.path), item.attribute, item.value)
    for path, settings in changes.outside.items():
        vars(inner.base_model.get_submodule(path)).update(settings)
    for path, dim in changes.chunked.items():
        _keep_chunks(inner.base_model, path, dim, len(blocks), chosen)
    _replace_config(model, inner.config, new_config)
    return model


def _check_kept(kept: Iterable[int], depth: int) -> tuple[int, ...]:
    allowed = f"increasing block indices from 0 to {depth - 1}, at least one"
    try:
        values = list(kept)
        chosen = tuple(operator.index(value) for value in values)
    except TypeError:
        raise BadInput("kept", kept, allowed) from None
    increasing = all(low < high for low, high in zip(chosen, chosen[1:], strict=False))
    if not chosen or not increasing or chosen[0] < 0 or chosen[-1] >= depth:
        raise BadInput("kept", values, allowed)
    return chosen


def _refuse_unsafe(
    model: nn.Module, inner: PreTrainedModel, name: str, chosen: tuple[int, ...]
) -> None:
    family = type(inner).__name__
    tied = getattr(inner, "all_tied_weights_keys", None) or {}
    inside = re.compile(rf"(^|\.){re.escape(name)}\.\d+\.")
    owners: dict[int, int] = {}
    for index, block in enumerate(find_blocks(inner)):
        for parameter in block.parameters():
            owners.setdefault(id(parameter), index)
    shared = any(
        owners[id(p)] != index for index, b in enumerate(find_blocks(inner)) for p in b.parameters()
    )
    if shared or any(inside.search(key) for pair in tied.items() for key in pair):
        raise ValueError(f"{family} cannot be cut: its blocks share weights with each other")
    if getattr(inner.config, "rescale_every", 0):
        raise ValueError(f"{family} cannot be cut: it rescales its weights by their block's index")
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "layers_to_transform", None) is not None:
            raise ValueError(
                "cannot cut under an adapter with layers_to_transform: cut first, adapt afterwards"
            )
    kinds = getattr(inner.config.get_text_config(decoder=True), "layer_types", None)
    if not kinds:
        return
    attentive = [kind not in RECURRENT for kind in kinds]
    if any(attentive) and not any(attentive[old] for old in chosen):
        raise ValueError(
            f"{family} cannot be cut to blocks {list(chosen)}: none of them has attention, and a"
            " hybrid needs at least one such block to count positions"
        )


def _keep_chunks(base: nn.Module, path: str, dim: int, depth: int, chosen: tuple[int, ...]) -> None:
    """Of a weight that holds a chunk a block along ``dim``, keep those of the chosen blocks."""
    parent, _, name = path.rpartition(".")
    weight: nn.Parameter = getattr(base.get_submodule(parent), name)
    chunks = weight.detach().unflatten(dim, (depth, -1))
    index = torch.tensor(chosen, device=weight.device)
    kept = chunks.index_select(dim, index).flatten(dim, dim + 1)
    setattr(base.get_submodule(parent), name, nn.Parameter(kept, weight.requires_grad))


def _replace_config(model: nn.Module, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Point every module that holds the old configuration, or its text part, to the new one."""
    replacement = {id(old): new}
    replacement[id(old.get_text_config(decoder=True))] = new.get_text_config(decoder=True)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in replacement:
                setattr(module, name, replacement[id(value)])
