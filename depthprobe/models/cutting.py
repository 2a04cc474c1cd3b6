"""Cut blocks out of a Hugging Face model so that what is left is an ordinary, shallower model.

It takes three steps. First, derive the configuration of the shallower model. Second, write it and
read it back, build both models on the meta device, and compare every sub-module, shape and setting:
a difference must be a block's index, which moves with its block. Any other is a reason to refuse,
since the saved model would silently load as a different one. Only then change the model.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from depthprobe.errors import BadInput
from depthprobe.models.blocks import (
    PlainDecoder,
    block_indices,
    find_blocks,
    keys_are_read,
    locate,
    refusal,
    unwrap,
)

ModelT = TypeVar("ModelT", bound=nn.Module)

# Configuration fields. One entry a block: sliced.
PER_BLOCK_LISTS = (
    "layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types",
    "layer_rope_theta", "num_attention_heads_per_layer", "activation_sparsity_pattern",
    "attention_layers", "attn_layers", "intermediate_size",
)  # fmt: skip
# Indices of blocks: those kept, renumbered.
BLOCK_INDICES = (
    "mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "moe_layers", "hybrid_layer_ids",
    "cross_attention_layers",
)  # fmt: skip
# The first n blocks are special: the kept ones among them are again the first.
LEADING_BLOCKS = (
    "first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index",
)  # fmt: skip
# The last n blocks are special.
TRAILING_BLOCKS = ("num_kv_shared_layers",)
# Kinds of blocks in which no position sees another through keys and values.
RECURRENT = frozenset({"linear_attention", "conv", "mamba", "recurrent", "moe", "mlp"})

INDEX_ATTRIBUTE = re.compile(r"(layer|block)_?(idx|index|id|number)$")
# PEFT's adapters before the blocks, and the prefixes of the values of others.
BEFORE_THE_BLOCKS = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING"})
INITIAL_VALUES = frozenset({"init_lora_weights", "init_weights"})
# Weights outside the blocks that hold a chunk for each of them (Gemma 3n and 4).
PER_BLOCK_WEIGHTS = re.compile(r"(^|\.)(embed_tokens_per_layer|per_layer_model_projection)(\.|$)")


def keep_blocks(model: ModelT, kept: Iterable[int]) -> ModelT:
    """Remove all blocks but ``kept``, in place, and return the model.

    The model gets a new ``ModuleList`` and a new configuration (the old configuration object may
    be shared with other models and is not changed); block indices inside the blocks are renumbered,
    so caches, ``save_pretrained`` and ``from_pretrained`` work as for any model of that depth.
    Works on a causal language model, on its base model, and under PEFT.

    Args:
        model: a Hugging Face decoder.
        kept: increasing, unique, original indices, 0-based; at least one.

    Raises:
        BadInput: if ``kept`` is not that, or if the cut model would not survive ``save_pretrained``
            and ``from_pretrained``; the model is unchanged.
    """
    inner = unwrap(model)
    blocks = find_blocks(inner)
    chosen = block_indices("kept", kept, len(blocks))
    if not chosen or list(chosen) != sorted(set(chosen)):
        allowed = f"increasing block indices from 0 to {len(blocks) - 1}, at least one"
        raise BadInput("kept", list(chosen), allowed)
    return model if len(chosen) == len(blocks) else _arrange(model, inner, chosen)


def loop_blocks(model: ModelT, times: int) -> ModelT:
    """Apply the blocks ``times`` times in turn, in place, and return the model.

    The model becomes one of ``times`` as many blocks: each has its own index, and so keys and
    values of its own, but the weights are those of the first ones (as in the Universal Transformer,
    arXiv 1807.03819, and ALBERT, arXiv 1909.11942). Its configuration is that of an ordinary model
    of that depth; :func:`unshare_blocks` makes it one before it is saved.

    Raises:
        BadInput: if no configuration describes it (a block that depends on its own index); the
            model is unchanged.
    """
    inner = unwrap(model)
    if times == 1:
        return model
    if isinstance(inner, PlainDecoder):
        raise refusal(inner, "it cannot be looped: no configuration rebuilds it")
    return _arrange(model, inner, (*range(len(find_blocks(inner))),) * times)


@torch.no_grad()
def unshare_blocks(model: nn.Module) -> None:
    """Give each block weights of its own, equal to those that it shared."""
    seen: set[int] = set()
    for module in find_blocks(model).modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                setattr(module, name, nn.Parameter(weight.clone(), weight.requires_grad))
            seen.add(id(weight))


def _arrange(model: ModelT, inner: PreTrainedModel, chosen: tuple[int, ...]) -> ModelT:
    """Arrange the chosen blocks in this order; a repeated block shares its weights."""
    owner, name = locate(inner)
    blocks = find_blocks(inner)
    new_config, changes = cut_config(inner.config, chosen), _Changes()
    if not isinstance(inner, PlainDecoder):  # no configuration describes it
        _refuse_unsafe(inner, name, chosen)
        changes = _compare_reload(inner, new_config, chosen)
        _compare_adapters(model, inner, new_config, chosen)
        _renumber_quantized(inner, new_config, chosen)
    if changes.chunked and len(set(chosen)) < len(chosen):
        raise _no_cut(inner, "each of its blocks reads token embeddings of its own", chosen)

    # nothing is refused from here on: change the list, indices, settings, and weights outside
    parent, _, attribute = name.rpartition(".")
    remaining = nn.ModuleList(
        blocks[old] if old not in chosen[:new] else _twin(blocks[old], inner.config)
        for new, old in enumerate(chosen)
    )
    setattr(owner.get_submodule(parent), attribute, remaining)
    for block, path, index_name, value in changes.inside:
        setattr(remaining[block].get_submodule(path), index_name, value)
    for path, settings in changes.outside.items():
        vars(inner.base_model.get_submodule(path)).update(settings)
    for path, dim in changes.chunked.items():
        _keep_chunks(inner.base_model, path, dim, len(blocks), chosen)
    replace_config(model, inner.config, new_config)
    return model


def _twin(block: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """A copy of a block around the same weights."""
    shared = [*block.parameters(), config, config.get_text_config(decoder=True)]
    return copy.deepcopy(block, {id(each): each for each in shared})


def cut_config(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """A copy of ``config`` that describes the model with only the ``kept`` blocks, in that order.

    Per-block lists are sliced and block indices renumbered **by name**: other lists of the same
    length are left alone.
    """
    new = copy.deepcopy(config)
    text = new.get_text_config(decoder=True)
    with as_plain_fields(text) as overrides:
        for name, value in _changed_fields(text, kept).items():
            if not is_computed(text, name):
                setattr(text, name, value)
        if not is_computed(text, "num_hidden_layers"):
            text.num_hidden_layers = len(kept)
        renumbered = {new: overrides[old] for new, old in enumerate(kept) if old in overrides}
        overrides.clear()
        overrides.update(renumbered)
    return new


def block_kinds(config: PreTrainedConfig) -> list[tuple[Any, ...]]:
    """What the configuration says of each block's kind; equal blocks have equal entries."""
    text = copy.deepcopy(config.get_text_config(decoder=True))
    depth = text.num_hidden_layers
    with as_plain_fields(text) as overrides:
        lists = [v for v in _sequences(text, PER_BLOCK_LISTS).values() if len(v) == depth]
        indices = _sequences(text, BLOCK_INDICES).values()
        return [
            (
                *(str(values[block]) for values in lists),
                *(block in values for values in indices),
                str(overrides.get(block)),
            )
            for block in range(depth)
        ]


@contextmanager
def as_plain_fields(config: PreTrainedConfig) -> Iterator[dict[int, dict[str, Any]]]:
    """Within it, a configuration behaves as if its blocks did not override single fields.

    Otherwise it raises for a field that varies from block to block. Yields the overrides by block;
    on leaving, the configuration gets them back, with any changes.
    """
    heterogeneous = getattr(config, "is_heterogeneous", False)
    # Read before anything changes: as a property it is derived from the other fields.
    written = config.to_dict()["per_layer_config"] if heterogeneous else {}
    overrides = {int(block): dict(fields) for block, fields in written.items()}
    if heterogeneous:
        config.per_layer_config = None
    yield overrides
    if heterogeneous:
        applied: dict[int | str, dict[str, Any]] = dict(overrides.items())
        config.per_layer_config = applied


def is_computed(config: PreTrainedConfig, name: str) -> bool:
    """Whether the configuration derives a field from others (a read-only property)."""
    attribute = getattr(type(config), config.attribute_map.get(name, name), None)
    return isinstance(attribute, property) and attribute.fset is None


def _sequences(text: PreTrainedConfig, names: Iterable[str]) -> dict[str, Sequence[Any]]:
    """The fields of these names that are lists."""
    values = {name: getattr(text, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, list | tuple)}


def _changed_fields(text: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The fields that a cut changes, with their new values."""
    depth = text.num_hidden_layers
    changes: dict[str, Any] = {
        name: [values[old] for old in kept]
        for name, values in _sequences(text, PER_BLOCK_LISTS).items()
        if len(values) == depth
    }
    for name, values in _sequences(text, BLOCK_INDICES).items():
        changes[name] = [new for new, old in enumerate(kept) if old in values]
    for name in (*LEADING_BLOCKS, *TRAILING_BLOCKS):
        value = getattr(text, name, None)
        if isinstance(value, int):
            special = range(value) if name in LEADING_BLOCKS else range(depth - value, depth)
            changes[name] = sum(old in special for old in kept)
    if getattr(text, "num_blocks", None) == depth:  # the same number under a second name
        changes["num_blocks"] = len(kept)
    last_sparse = getattr(text, "moe_layer_end_index", None)
    if isinstance(last_sparse, int) and last_sparse >= 0:
        changes["moe_layer_end_index"] = sum(old <= last_sparse for old in kept) - 1
    if getattr(text, "scale_depth", None):  # divided by the root of the depth
        changes["scale_depth"] = text.scale_depth * math.sqrt(len(kept) / depth)
    if isinstance(getattr(text, "block_types", None), list):  # a pattern, repeated over the blocks
        changes["block_types"] = [text.block_types[old % len(text.block_types)] for old in kept]
    # GPT-Neo derives its per-block list from [[kinds, repeats], ...]: one group a block
    if "attention_layers" in changes and hasattr(text, "attention_types"):
        changes["attention_types"] = [[[kind], 1] for kind in changes["attention_layers"]]
    # Qwen's mixtures have experts in every n-th block: an explicit list of the dense blocks
    step = getattr(text, "decoder_sparse_step", None)
    if isinstance(step, int) and step > 1:
        explicit = getattr(text, "mlp_only_layers", None) or []
        dense = [new for new, old in enumerate(kept) if old in explicit or (old + 1) % step]
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return changes


def _renumber_quantized(
    inner: PreTrainedModel, new_config: PreTrainedConfig, chosen: tuple[int, ...]
) -> None:
    """Renumber the blocks that a quantised checkpoint's settings exclude from quantisation.

    A pattern whose answer depends on a block's number is refused.
    """
    blocks = find_blocks(inner)
    path = next(path for path, module in inner.named_modules() if module is blocks)
    named = re.compile(rf"((?:.+\.)?{re.escape(path.rpartition('.')[2])})\.(\d+)(\..+)?")
    inside = {name for block in blocks for name, _ in block.named_modules() if name}
    position = {old: str(new) for new, old in enumerate(chosen)}

    def answers(pattern: re.Pattern[str], name: str) -> set[bool]:
        return {bool(pattern.match(f"{path}.{index}.{name}")) for index in range(len(blocks))}

    def renumbered(value: Any) -> Any:
        if isinstance(value, dict):
            pairs = ((renumbered(key), renumbered(each)) for key, each in value.items())
            return {key: each for key, each in pairs if key is not None}
        if isinstance(value, list | tuple | set):
            names = [renumbered(each) for each in value]
            return type(value)(
                new for new, old in zip(names, value, strict=True) if new is not None or old is None
            )
        if not isinstance(value, str):
            if isinstance(value, QuantizationConfigMixin) or hasattr(value, "model_fields_set"):
                vars(value).update({k: renumbered(each) for k, each in vars(value).items()})
            return value
        found = named.fullmatch(value)
        if found and f".{path}".endswith(f".{found[1]}"):
            new = position.get(int(found[2]))
            return None if new is None else f"{found[1]}.{new}{found[3] or ''}"
        try:
            pattern = re.compile(re.sub("^(re|[+-]):", "", value))
        except re.error:
            return value
        if any(len(answers(pattern, name)) > 1 for name in inside):
            raise _no_cut(inner, f"its quantization_config names blocks by {value!r}", chosen)
        return value

    settings = getattr(new_config, "quantization_config", None)
    if settings is not None:
        new_config.quantization_config = renumbered(settings)


def _refuse_unsafe(inner: PreTrainedModel, name: str, chosen: tuple[int, ...]) -> None:
    """Refuse problems that no comparison of configurations can find."""
    tied = getattr(inner, "all_tied_weights_keys", None) or {}
    inside = re.compile(rf"(^|\.){re.escape(name)}\.\d+\.")
    weights = [id(p) for block in find_blocks(inner) for p in block.parameters()]  # once a block
    shared = len(set(weights)) < len(weights)
    if shared or any(inside.search(key) for pair in tied.items() for key in pair):
        raise _no_cut(inner, "its blocks share weights with each other")
    if getattr(inner.config, "rescale_every", 0):
        raise _no_cut(inner, "it rescales its weights by their block's index")
    kinds = getattr(inner.config.get_text_config(decoder=True), "layer_types", None) or []
    attentive = [kind not in RECURRENT for kind in kinds]
    if any(attentive) and not any(attentive[old] for old in chosen):
        reason = "none of them has attention, and a hybrid needs at least one such block to count"
        raise _no_cut(inner, f"{reason} positions", chosen)


def _no_cut(inner: PreTrainedModel, reason: str, chosen: Sequence[int] = ()) -> BadInput:
    """The error for any cut, for the cut to the chosen blocks, or for loops if blocks repeat."""
    if len(set(chosen)) < len(chosen):
        return refusal(inner, f"its blocks cannot be applied again: {reason}")
    to = f" to blocks {list(chosen)}" if chosen else ""
    return refusal(inner, f"it cannot be cut{to}: {reason}")


def _keep_chunks(base: nn.Module, path: str, dim: int, depth: int, chosen: tuple[int, ...]) -> None:
    """Keep the chosen blocks' chunks of a weight that holds one chunk per block along ``dim``."""
    parent, _, name = path.rpartition(".")
    weight: nn.Parameter = getattr(base.get_submodule(parent), name)
    chunks = weight.detach().unflatten(dim, (depth, -1))
    index = torch.tensor(chosen, device=weight.device)
    kept = chunks.index_select(dim, index).flatten(dim, dim + 1)
    setattr(base.get_submodule(parent), name, nn.Parameter(kept, weight.requires_grad))


def replace_config(model: nn.Module, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Point every module that holds the old configuration, or its text part, to the new one."""
    replacement = {id(old): new}
    replacement[id(old.get_text_config(decoder=True))] = new.get_text_config(decoder=True)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in replacement:
                setattr(module, name, replacement[id(value)])


# What a reload would make of the cut model, found on the meta device.


@dataclass(frozen=True)
class _Changes:
    """What a cut changes besides the list of blocks."""

    # new index of the block, path inside it, attribute that holds an index, its new value
    inside: list[tuple[int, str, str, int]] = field(default_factory=list)
    outside: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> settings
    chunked: dict[str, int] = field(default_factory=dict)  # weight -> dimension with block chunks


def _compare_reload(
    inner: PreTrainedModel, new_config: PreTrainedConfig, chosen: tuple[int, ...]
) -> _Changes:
    """The changes that make the cut model equal to its reloaded configuration."""
    before = skeleton(inner, inner.config, reloaded=False)  # what is in memory
    after = skeleton(inner, new_config, reloaded=True)
    old_blocks, new_blocks = find_blocks(before), find_blocks(after)
    if len(new_blocks) != len(chosen):
        raise _no_cut(inner, "the depth in its configuration is not obeyed")
    changes = _Changes()
    position = {old: new for new, old in enumerate(chosen)}
    for new, old in enumerate(chosen):
        for path, attribute, was, becomes in differences(old_blocks[old], new_blocks[new]):
            if attribute == "store_full_length_kv" and not keys_are_read(new_blocks):
                continue  # whether it keeps weights that no block reads
            is_index = type(was) is int and type(becomes) is int
            if not is_index or not INDEX_ATTRIBUTE.search(attribute):
                setting = f"{path or 'its'} {attribute} = {becomes!r}, not {was!r}"
                reason = f"reloaded, block {old} would become block {new} with {setting}"
                raise _no_cut(inner, reason, chosen)
            if (was, becomes) != (old, new) and position.get(was) != becomes:
                reason = f"block {old} depends on block {was} ({attribute})"
                raise _no_cut(inner, reason, chosen)
            changes.inside.append((new, path, attribute, becomes))
    prefix = next(path for path, module in before.named_modules() if module is old_blocks)
    stored = before.state_dict().keys() | after.state_dict().keys()
    for path, attribute, was, becomes in differences(before, after, without=prefix):
        is_shape = attribute == "shape"
        pairs = enumerate(zip(was or (), becomes or (), strict=False)) if is_shape else ()
        dims = [dim for dim, (old, new) in pairs if old != new]
        if PER_BLOCK_WEIGHTS.search(path) and len(dims) == 1:
            changes.chunked[path] = dims[0]
        # The rotary table of a kind of attention that no block has any more may disappear.
        elif is_shape and (path in stored or (was and becomes)):
            raise _no_cut(inner, f"the shape of {path} depends on the number of blocks")
        elif PER_BLOCK_WEIGHTS.search(path) or (type(becomes) is int and "layer" in attribute):
            changes.outside.setdefault(path, {})[attribute] = becomes
    return changes


def _compare_adapters(
    model: nn.Module, inner: PreTrainedModel, new_config: PreTrainedConfig, chosen: tuple[int, ...]
) -> None:
    """Refuse a cut after which PEFT would put different adapters on the blocks.

    Settings that name a block by its number (patterns of ranks and scales, modules to leave out or
    to save, ...) are found by their effect.
    """
    found = (getattr(module, "peft_config", None) for module in model.modules())
    adapters = next((each for each in found if isinstance(each, dict)), {})
    injected = {k: v for k, v in adapters.items() if v.peft_type not in BEFORE_THE_BLOCKS}
    if not injected:
        return
    around = "an adapter is around it that knows its blocks by their numbers: cut first, adapt then"
    try:
        before = _adapted(skeleton(inner, inner.config, reloaded=False, whole=True), injected)
        after = _adapted(skeleton(inner, new_config, reloaded=True, whole=True), injected)
    except BadInput:
        raise
    except Exception as error:  # such as a prefix for each block
        reason = f"{around} ({str(error).partition(chr(10))[0]})"
        raise _no_cut(inner, reason, chosen) from error
    for new, old in enumerate(chosen):
        for path, attribute, was, becomes in differences(before[old], after[new]):
            if not INDEX_ATTRIBUTE.search(attribute):  # these were compared with the plain model
                setting = f"{path} {attribute} = {becomes!r}, not {was!r}"
                reason = f"{around} (reloaded, block {old} would be block {new} with {setting})"
                raise _no_cut(inner, reason, chosen)


def _adapted(skeleton: PreTrainedModel, adapters: Mapping[str, Any]) -> nn.ModuleList:
    """The blocks of a model on the meta device, with adapters."""
    from peft import inject_adapter_in_model  # imported late: it takes as long as all the rest

    for name, adapter in adapters.items():
        if adapter.peft_type == "ADALORA" and adapter.rank_pattern:
            raise ValueError("rank_pattern of AdaLoRA")
        own = copy.deepcopy(adapter)  # PEFT changes the configuration that it is given
        for initial in INITIAL_VALUES & vars(own).keys():
            setattr(own, initial, False)  # they can't be computed on the meta device
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            inject_adapter_in_model(own, skeleton, name)
    return find_blocks(skeleton)


def skeleton(
    inner: PreTrainedModel,
    config: PreTrainedConfig,
    *,
    reloaded: bool,
    whole: bool = False,
    change: str = "cut",
) -> PreTrainedModel:
    """The base model that a configuration describes, on the meta device; maybe once read back.

    With ``whole`` the whole model, head included, where the names of modules begin. ``change``
    names the refused change in an error.

    Raises:
        BadInput: if no model can be built by it.
    """
    kind: Any = type(inner if whole else inner.base_model)
    saved = copy.deepcopy(config)
    try:
        if reloaded:
            with tempfile.TemporaryDirectory() as folder:
                config.save_pretrained(folder)
                saved = type(config).from_pretrained(folder)
        # ``from_pretrained`` also sets what a file can only name
        saved.get_text_config(decoder=True).dtype = inner.dtype
        with torch.device("meta"):
            built: PreTrainedModel = kind(saved)
    except Exception as error:  # configurations check themselves in different ways
        line = str(error).partition("\n")[0]
        reason = f"it cannot be {change}: its configuration does not rebuild it ({line})"
        raise refusal(inner, reason) from error
    return built


def differences(
    old: nn.Module, new: nn.Module, *, without: str | None = None
) -> Iterator[tuple[str, str, Any, Any]]:
    """(path, attribute, old value, new value) of every difference between two module trees."""
    old_facts, new_facts = _facts(old, without), _facts(new, without)
    for path in sorted(old_facts.keys() | new_facts.keys()):
        left, right = old_facts.get(path, {}), new_facts.get(path, {})
        for attribute in sorted(left.keys() | right.keys()):
            was, becomes = left.get(attribute), right.get(attribute)
            if not _same(was, becomes):
                yield path, attribute, was, becomes


def _same(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)  # derived again from the number of blocks
    return type(one) is type(other) and one == other


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):  # which shared module an index stands for, an adapter's scale
        return all(isinstance(each, int | str) for each in value) and all(
            isinstance(each, int | float) for each in value.values()
        )
    return isinstance(value, int | float | str | None)


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
