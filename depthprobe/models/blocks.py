"""Block surgery: find the decoder blocks of any Hugging Face model and cut some of them out."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from depthprobe.models.config_fields import cut_config
from depthprobe.study import BadInput

ModelT = TypeVar("ModelT", bound=nn.Module)

INDEX_ATTRIBUTE = re.compile(r"(layer|block)_?(idx|index|id|number)$")
RECURRENT = frozenset({"linear_attention", "conv", "mamba", "recurrent", "moe", "mlp"})


@dataclass(frozen=True)
class Renumbering:
    """One attribute of one sub-module that holds a block's index."""

    block: int  # new index
    module: str  # path inside the block
    attribute: str
    value: int


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside PEFT, ``torch.compile`` and data-parallel wrappers.

    Raises:
        ValueError: if there is none.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise ValueError(f"{type(model).__name__} is not a Hugging Face PreTrainedModel")
    return inner


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a Hugging Face model, in order, found by structure and not by name.

    They are the only ``ModuleList`` under the base model (not inside another candidate) that is
    as long as the text configuration's ``num_hidden_layers``. Sees through PEFT.

    Raises:
        ValueError: if there is no such list, more than one, or the model is no plain decoder.
    """
    owner, name = _locate(unwrap(model))
    return _list_at(owner, name)


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
    owner, name = _locate(inner)
    blocks = find_blocks(inner)
    chosen = _check_kept(kept, len(blocks))
    if len(chosen) == len(blocks):
        return model
    _refuse_unsafe(model, inner, name, chosen)
    new_config = cut_config(inner.config, chosen)
    renumberings, outside = _compare(inner, new_config, chosen)

    parent, _, attribute = name.rpartition(".")
    setattr(owner.get_submodule(parent), attribute, nn.ModuleList(blocks[old] for old in chosen))
    remaining = _list_at(owner, name)
    for item in renumberings:
        setattr(remaining[item.block].get_submodule(item.module), item.attribute, item.value)
    for path, attribute, value in outside:
        setattr(inner.base_model.get_submodule(path), attribute, value)
    _replace_config(model, inner.config, new_config)
    return model


def _list_at(owner: nn.Module, name: str) -> nn.ModuleList:
    """The ``ModuleList`` at a path, typed."""
    found = owner.get_submodule(name)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"{name} of {type(owner).__name__} is not a ModuleList")
    return found


def _locate(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The base model and the path of the blocks in it."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder: only decoders can be cut")
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    base: nn.Module = model.base_model
    paths = _candidates(base, depth)
    if len(paths) > 1:
        # A vision tower may be as deep as the text decoder.
        base = model.get_decoder()
        paths = _candidates(base, depth)
    if len(paths) != 1:
        what = "no list of blocks" if not paths else f"more than one list of blocks ({paths})"
        raise ValueError(
            f"{type(model).__name__} has {what} as long as its configuration says"
            f" (num_hidden_layers={depth})"
        )
    return base, paths[0]


def _candidates(base: nn.Module, depth: int | None) -> list[str]:
    found: list[str] = []
    for name, module in base.named_modules():
        nested = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not nested:
            found.append(name)
    return found


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
    if any(inside.search(key) for pair in tied.items() for key in pair):
        raise ValueError(f"{family} cannot be cut: its blocks share weights with each other")
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


def _compare(
    inner: PreTrainedModel, new_config: PreTrainedConfig, chosen: tuple[int, ...]
) -> tuple[list[Renumbering], list[tuple[str, str, int]]]:
    """What must be renumbered; refuses if the new configuration describes different blocks."""
    family = type(inner).__name__
    before = _skeleton(inner, inner.config)
    after = _skeleton(inner, new_config)
    old_blocks, new_blocks = find_blocks(before), find_blocks(after)
    if len(new_blocks) != len(chosen):
        raise ValueError(f"{family} cannot be cut: the depth in its configuration is not obeyed")
    position = {old: new for new, old in enumerate(chosen)}
    renumberings = []
    for new, old in enumerate(chosen):
        for path, attribute, was, becomes in _differences(old_blocks[old], new_blocks[new]):
            if not _is_index(attribute, was, becomes):
                raise ValueError(
                    f"{family} cannot be cut to blocks {list(chosen)}: reloaded, block {old} would"
                    f" become block {new} with {path or 'its'} {attribute} = {becomes!r},"
                    f" not {was!r}"
                )
            if position.get(was) != becomes:
                raise ValueError(
                    f"{family} cannot be cut to blocks {list(chosen)}: block {old} depends on"
                    f" block {was} ({attribute})"
                )
            renumberings.append(Renumbering(new, path, attribute, becomes))
    prefix = next(path for path, module in before.named_modules() if module is old_blocks)
    stored = before.state_dict().keys() | after.state_dict().keys()
    outside = []
    for path, attribute, was, becomes in _differences(before, after, without=prefix):
        # A rotary table of a kind of attention that no block has any more may disappear.
        if attribute == "shape" and (path in stored or (was and becomes)):
            raise ValueError(
                f"{family} cannot be cut: the shape of {path} depends on the number of blocks"
            )
        if isinstance(was, int) and isinstance(becomes, int) and "layer" in attribute:
            outside.append((path, attribute, becomes))
    return renumberings, outside


def _is_index(attribute: str, was: object, becomes: object) -> bool:
    return type(was) is int and type(becomes) is int and bool(INDEX_ATTRIBUTE.search(attribute))


def _skeleton(inner: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The base model that a configuration describes once saved and read back, without memory."""
    kind: Any = type(inner.base_model)
    try:
        saved = type(config).from_dict(json.loads(config.to_json_string()))
        with torch.device("meta"):
            skeleton: PreTrainedModel = kind(saved)
    except Exception as error:
        raise ValueError(
            f"{type(inner).__name__} cannot be cut: its configuration does not rebuild it ({error})"
        ) from error
    return skeleton


def _differences(
    old: nn.Module, new: nn.Module, *, without: str | None = None
) -> Iterator[tuple[str, str, Any, Any]]:
    """(path, attribute, old value, new value) of all that differs between two module trees."""
    old_facts, new_facts = _facts(old, without), _facts(new, without)
    for path in sorted(old_facts.keys() | new_facts.keys()):
        left, right = old_facts.get(path, {}), new_facts.get(path, {})
        for attribute in sorted(left.keys() | right.keys()):
            was, becomes = left.get(attribute), right.get(attribute)
            if type(was) is not type(becomes) or was != becomes:
                yield path, attribute, was, becomes


def _facts(root: nn.Module, without: str | None) -> dict[str, dict[str, Any]]:
    """Class, plain settings and shapes of every sub-module, parameter and buffer."""
    facts: dict[str, dict[str, Any]] = {}
    for path, module in root.named_modules():
        facts[path] = {"class": type(module).__name__} | {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and isinstance(value, bool | int | float | str | None)
        }
    for path, tensor in [*root.named_parameters(), *root.named_buffers()]:
        facts[path] = {"shape": tuple(tensor.shape)}
    if without is not None:
        facts = {path: fact for path, fact in facts.items() if not path.startswith(without)}
    return facts


def _replace_config(model: nn.Module, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Point every module that holds the old configuration, or its text part, to the new one."""
    replacement = {id(old): new}
    replacement[id(old.get_text_config(decoder=True))] = new.get_text_config(decoder=True)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in replacement:
                setattr(module, name, replacement[id(value)])
