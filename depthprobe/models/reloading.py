"""What a reload would make of a cut model, found without memory: what to change, what to refuse.

The configuration of the cut model is written and read back, both models are built on the meta
device, and every sub-module, shape and setting is compared. Whatever differs is an index that moves
with its block, or a reason to refuse: the cut model would silently come back as another one.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from depthprobe.models.blocks import find_blocks, keys_are_read

INDEX_ATTRIBUTE = re.compile(r"(layer|block)_?(idx|index|id|number)$")
# Weights outside the blocks that hold a chunk for each of them (Gemma 3n and 4).
PER_BLOCK_WEIGHTS = re.compile(r"(^|\.)(embed_tokens_per_layer|per_layer_model_projection)(\.|$)")


@dataclass(frozen=True)
class Renumbering:
    """One attribute of one sub-module that holds a block's index."""

    block: int  # new index
    path: str  # inside the block
    attribute: str
    value: int


@dataclass(frozen=True)
class Changes:
    """What a cut changes beside the list of blocks."""

    inside: list[Renumbering] = field(default_factory=list)
    outside: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> settings
    chunked: dict[str, int] = field(default_factory=dict)  # weight -> dimension with block chunks


def compare_reload(
    inner: PreTrainedModel, new_config: PreTrainedConfig, chosen: tuple[int, ...]
) -> Changes:
    """What must change so that the cut model is what its configuration, once reloaded, describes.

    Args:
        inner: the model before the cut; not changed.
        new_config: of the cut model.
        chosen: the blocks that it keeps.

    Raises:
        ValueError: if a kept block, or another weight, would come back as a different one.
    """
    family = type(inner).__name__
    before = _skeleton(inner, inner.config, reloaded=False)  # what is in memory
    after = _skeleton(inner, new_config, reloaded=True)
    old_blocks, new_blocks = find_blocks(before), find_blocks(after)
    if len(new_blocks) != len(chosen):
        raise ValueError(f"{family} cannot be cut: the depth in its configuration is not obeyed")
    changes = Changes()
    position = {old: new for new, old in enumerate(chosen)}
    for new, old in enumerate(chosen):
        for path, attribute, was, becomes in _differences(old_blocks[old], new_blocks[new]):
            if attribute == "store_full_length_kv" and not keys_are_read(new_blocks):
                continue  # whether it keeps what no block reads
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
            changes.inside.append(Renumbering(new, path, attribute, becomes))
    prefix = next(path for path, module in before.named_modules() if module is old_blocks)
    stored = before.state_dict().keys() | after.state_dict().keys()
    for path, attribute, was, becomes in _differences(before, after, without=prefix):
        is_shape = attribute == "shape"
        if is_shape and PER_BLOCK_WEIGHTS.search(path):
            changes.chunked[path] = _chunked_dim(was, becomes)
        # A rotary table of a kind of attention that no block has any more may disappear.
        elif is_shape and (path in stored or (was and becomes)):
            raise ValueError(
                f"{family} cannot be cut: the shape of {path} depends on the number of blocks"
            )
        elif PER_BLOCK_WEIGHTS.search(path) or (type(becomes) is int and "layer" in attribute):
            changes.outside.setdefault(path, {})[attribute] = becomes
    return changes


def _chunked_dim(was: tuple[int, ...], becomes: tuple[int, ...]) -> int:
    """The one dimension in which two shapes differ."""
    (dim,) = [dim for dim, (old, new) in enumerate(zip(was, becomes, strict=True)) if old != new]
    return dim


def _is_index(attribute: str, was: object, becomes: object) -> bool:
    return type(was) is int and type(becomes) is int and bool(INDEX_ATTRIBUTE.search(attribute))


def _skeleton(
    inner: PreTrainedModel, config: PreTrainedConfig, *, reloaded: bool
) -> PreTrainedModel:
    """The base model that a configuration describes, maybe once read back; it holds no memory."""
    kind: Any = type(inner.base_model)
    saved = copy.deepcopy(config)
    try:
        if reloaded:
            with tempfile.TemporaryDirectory() as folder:
                config.save_pretrained(folder)
                saved = type(config).from_pretrained(folder)
        # from_pretrained, too, sets what a file can only name
        saved.get_text_config(decoder=True).dtype = inner.dtype
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
            if not _same(was, becomes):
                yield path, attribute, was, becomes


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)  # derived anew from the number of blocks
    return type(one) is type(other) and one == other


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):  # such as which shared module a block's index stands for
        return all(isinstance(item, int) for pair in value.items() for item in pair)
    return isinstance(value, bool | int | float | str | None)


def _facts(root: nn.Module, without: str | None) -> dict[str, dict[str, Any]]:
    """Class, plain settings and shapes of every sub-module, parameter and buffer."""
    facts: dict[str, dict[str, Any]] = {}
    for path, module in root.named_modules():
        facts[path] = {"class": type(module).__name__} | {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and _is_plain(value)
        }
    for path, tensor in [*root.named_parameters(), *root.named_buffers()]:
        facts[path] = {"shape": tuple(tensor.shape)}
    if without is not None:
        facts = {path: fact for path, fact in facts.items() if not path.startswith(without)}
    return facts
