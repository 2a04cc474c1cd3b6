"""Cut blocks out of a Hugging Face model so that what is left is an ordinary, shallower model."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from depthprobe.models.blocks import find_blocks, list_at, locate, unwrap
from depthprobe.models.config_fields import cut_config
from depthprobe.models.reloading import compare_reload
from depthprobe.study import BadInput

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
