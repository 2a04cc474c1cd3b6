"""Block surgery: find the decoder blocks of any Hugging Face model and cut some of them out."""

from __future__ import annotations

import copy
import math
import operator
import re
import tempfile
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
# Weights outside the blocks that hold a chunk for each of them (Gemma 3n and 4).
PER_BLOCK_WEIGHTS = re.compile(r"(^|\.)(embed_tokens_per_layer|per_layer_model_projection)(\.|$)")
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

    They are the only ``ModuleList`` of composite modules under the base model (not inside another
    candidate) that is as long as the text configuration's ``num_hidden_layers``. Sees through PEFT.

    Raises:
        ValueError: if there is no such list, more than one, or the model is no plain decoder.
    """
    owner, name = _locate(unwrap(model))
    return _list_at(owner, name)


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """The decoder without its language-model head: embeddings, blocks, final norm.

    Raises:
        ValueError: as :func:`find_blocks`.
    """
    inner = unwrap(model)
    if inner.base_model is not inner:
        return inner.base_model  # type: ignore[return-value]
    # some classes name a base model that they don't have: the innermost model around the blocks
    owner, name = _locate(inner)
    parts = name.split(".")
    around = [owner.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    return next(module for module in reversed(around) if isinstance(module, PreTrainedModel))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its token ids, also when accelerate keeps its weights elsewhere."""
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    hook = getattr(embeddings, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return torch.device(execution) if device.type == "meta" and execution is not None else device


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
    renumberings, outside, sliced = _compare(inner, new_config, chosen)

    parent, _, attribute = name.rpartition(".")
    setattr(owner.get_submodule(parent), attribute, nn.ModuleList(blocks[old] for old in chosen))
    remaining = _list_at(owner, name)
    for item in renumberings:
        setattr(remaining[item.block].get_submodule(item.module), item.attribute, item.value)
    for path, attribute, value in outside:
        setattr(inner.base_model.get_submodule(path), attribute, value)
    for path, dim in sliced:
        _keep_chunks(inner.base_model, path, dim, len(blocks), chosen)
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
        as_long = isinstance(module, nn.ModuleList) and len(module) == depth
        # a block is made of modules; a list of projections or of rotary tables is none of blocks
        if as_long and not nested and all(any(part.children()) for part in module):
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


def _compare(
    inner: PreTrainedModel, new_config: PreTrainedConfig, chosen: tuple[int, ...]
) -> tuple[list[Renumbering], list[tuple[str, str, int]], list[tuple[str, int]]]:
    """What must be renumbered, set and sliced; refuses if the blocks would become different."""
    family = type(inner).__name__
    before = _skeleton(inner, inner.config, reloaded=False)  # what is in memory
    after = _skeleton(inner, new_config, reloaded=True)  # what a reload would make
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
    outside, sliced = [], []
    for path, attribute, was, becomes in _differences(before, after, without=prefix):
        if PER_BLOCK_WEIGHTS.search(path):
            if attribute == "shape":
                sliced.append((path, _chunked_dim(was, becomes)))
            else:
                outside.append((path, attribute, becomes))
        # A rotary table of a kind of attention that no block has any more may disappear.
        elif attribute == "shape" and (path in stored or (was and becomes)):
            raise ValueError(
                f"{family} cannot be cut: the shape of {path} depends on the number of blocks"
            )
        elif isinstance(was, int) and isinstance(becomes, int) and "layer" in attribute:
            outside.append((path, attribute, becomes))
    return renumberings, outside, sliced


def _chunked_dim(was: tuple[int, ...], becomes: tuple[int, ...]) -> int:
    """The one dimension in which two shapes differ."""
    (dim,) = [dim for dim, (old, new) in enumerate(zip(was, becomes, strict=True)) if old != new]
    return dim


def _keep_chunks(base: nn.Module, path: str, dim: int, depth: int, chosen: tuple[int, ...]) -> None:
    """Of a weight that holds a chunk a block along ``dim``, keep those of the chosen blocks."""
    parent, _, name = path.rpartition(".")
    weight: nn.Parameter = getattr(base.get_submodule(parent), name)
    chunks = weight.detach().unflatten(dim, (depth, -1))
    index = torch.tensor(chosen, device=weight.device)
    kept = chunks.index_select(dim, index).flatten(dim, dim + 1)
    setattr(base.get_submodule(parent), name, nn.Parameter(kept, weight.requires_grad))


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


def _replace_config(model: nn.Module, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Point every module that holds the old configuration, or its text part, to the new one."""
    replacement = {id(old): new}
    replacement[id(old.get_text_config(decoder=True))] = new.get_text_config(decoder=True)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in replacement:
                setattr(module, name, replacement[id(value)])
