"""Narrow the blocks of a Hugging Face model: the same share of channels and heads out of each.

A unit is a channel of the MLP, or an attention head. The weights that hold a unit are found, not
listed: make the configuration narrower, write it and read it back; the weights whose shape changes
hold units. Their layout along a dimension (queries, keys and values in one matrix, by group or one
after the other) is tried on a tiny copy: a layout is right if the narrow copy, rebuilt from its
configuration, computes the same as the full one with the removed units silenced.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.models.blocks import PlainDecoder, find_blocks, refusal, unwrap
from depthprobe.models.cutting import (
    ModelT,
    as_plain_fields,
    differences,
    is_computed,
    replace_config,
    skeleton,
)
from depthprobe.models.tiny import TOKENS, build_tiny, tiny_model

Kind = Literal["channels", "heads"]
# By kind, (L, units): of channels (L, C); of heads (L, H + G), G groups of heads behind the H heads
UnitScores = Mapping[Kind, Tensor]

MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff")
NO_CHANNELS = "its configuration does not say how wide the MLP of its blocks is"
NO_HEADS = "its configuration can't say fewer heads of the same size"


@dataclass(frozen=True)
class Width:
    """How wide each block is."""

    channels: int
    groups: int  # of heads that share keys and values
    alike: int  # heads of a group
    size: int  # of a head

    @property
    def heads(self) -> int:
        """Attention heads, H."""
        return self.groups * self.alike

    def narrower(self, share: float) -> Width:
        """The width nearest to this share, at least one unit.

        Heads are removed as whole groups with their keys and values, evenly from every group, or
        both, whichever comes nearest; among equals, the one with the fewest groups.
        """
        pairs = product(range(1, self.groups + 1), range(1, self.alike + 1))
        groups, alike = min(pairs, key=lambda pair: abs(pair[0] * pair[1] - share * self.heads))
        return Width(max(1, round(share * self.channels)), groups, alike, self.size)


@dataclass(frozen=True)
class Narrowing:
    """A plan to make a model narrower."""

    before: Width
    after: Width
    config: PreTrainedConfig  # of the narrower model
    #: path of a weight in its block, a dimension, the kind of units along it, and their layout
    cuts: tuple[tuple[str, int, Kind, str], ...]

    @property
    def units(self) -> dict[Kind, int]:
        """How many scores a block has for each kind of unit."""
        width, cut = self.before, {kind for _, _, kind, _ in self.cuts}
        units = {"channels": width.channels, "heads": width.heads + width.groups}
        return {kind: units[kind] for kind in sorted(cut)}

    def owners(self) -> list[tuple[str, int, Kind, Tensor]]:
        """The cuts, with the unit that each place of the dimension belongs to."""
        layouts = {kind: _layouts(self.before, kind) for _, _, kind, _ in self.cuts}
        return [(path, dim, kind, layouts[kind][how]) for path, dim, kind, how in self.cuts]

    def ends(self, block: nn.Module) -> list[tuple[Kind, nn.Linear]]:
        """The linear maps that read each kind of unit: the last of the MLP and of attention."""
        read_by = [(path, kind) for path, dim, kind, how in self.cuts if how == kind and dim == 1]
        maps = [(kind, block.get_submodule(path.rpartition(".")[0])) for path, kind in read_by]
        return [(kind, each) for kind, each in maps if isinstance(each, nn.Linear)]


def plan_narrowing(model: nn.Module, share: float) -> Narrowing:
    """Plan how to keep about a ``share`` of the channels and heads in every block.

    Raises:
        BadInput: with the reason, if no configuration can describe it, or a block's units do not
            act separately (a norm over all heads, a mixture of experts).
    """
    inner = unwrap(model)
    before = _width(inner)
    after = before.narrower(share)
    if after == before:
        raise BadInput("width", share, "a share that leaves out a channel or a head of every block")
    fits = _fits(inner, before, after)
    try:
        tiny = tiny_model(inner.config)
    except ValueError as error:
        raise _refused(inner, str(error)) from error
    small = _width(tiny)
    sizes = zip(astuple(small), astuple(after), astuple(before), strict=True)
    less = Width(*(max(1, n // 2) if now < then else n for n, now, then in sizes))
    tiny_fits, config = _fits(tiny, small, less), _config(tiny.config, small, less)
    common = {key: [how for how in tiny_fits.get(key, ()) if how in fits[key]] for key in fits}
    for layout in product(*common.values()):
        cuts = tuple((*key, how) for key, how in zip(common, layout, strict=True))
        if _holds(tiny, Narrowing(small, less, config, cuts)):
            return Narrowing(before, after, _config(inner.config, before, after), cuts)
    reason = "narrower, it computes something else than it does with these units silenced"
    raise _refused(inner, f"{reason} (a norm over all heads, a mixture of experts)")


def narrow_blocks(model: ModelT, plan: Narrowing, scores: UnitScores | None = None) -> ModelT:
    """Keep the units with the highest scores in each block, in place, and return the model.

    Without scores it keeps the first ones, for a model that gets its trained weights afterwards.
    """
    inner = unwrap(model)
    old = skeleton(inner, inner.config, reloaded=False)
    new = skeleton(inner, plan.config, reloaded=True)
    blocks, owners = find_blocks(inner), plan.owners()
    changed = [
        [each for each in differences(one, other) if each[1] != "shape"]
        for one, other in zip(find_blocks(old), find_blocks(new), strict=True)
    ]
    for index, block in enumerate(blocks):
        own = None if scores is None else {kind: each[index] for kind, each in scores.items()}
        for path, dim, kind, owner in owners:
            weight = block.get_parameter(path)
            places = torch.isin(owner, _chosen(plan, kind, own)).nonzero()[:, 0]
            left = weight.detach().index_select(dim, places.to(weight.device))
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, nn.Parameter(left, weight.requires_grad))
        for path, attribute, _, becomes in changed[index]:
            setattr(block.get_submodule(path), attribute, becomes)
    replace_config(model, inner.config, plan.config)
    return model


def _width(inner: PreTrainedModel) -> Width:
    if isinstance(inner, PlainDecoder):
        raise _refused(inner, "no configuration rebuilds it")
    text = copy.deepcopy(inner.config.get_text_config(decoder=True))
    with as_plain_fields(text):
        field = _mlp_field(text)
        channels = 0 if field is None else getattr(text, field) or 4 * text.hidden_size
        heads = getattr(text, "num_attention_heads", None)
        if type(channels) is not int or not channels:
            raise _refused(inner, NO_CHANNELS)
        if type(heads) is not int or not heads:
            raise _refused(inner, "its blocks have no attention heads")
        groups = getattr(text, "num_key_value_heads", None) or heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Width(channels, groups, heads // groups, size)


def _mlp_field(text: PreTrainedConfig) -> str | None:
    return next((name for name in MLP_WIDTHS if hasattr(text, name)), None)


def _config(config: PreTrainedConfig, before: Width, after: Width) -> PreTrainedConfig:
    """A copy of the configuration with another width and an explicit head size."""
    new = copy.deepcopy(config)
    text = new.get_text_config(decoder=True)
    changes: dict[str, Any] = {}
    if after.channels != before.channels:
        changes[_mlp_field(text) or ""] = after.channels
    if after.heads != before.heads:
        changes |= {"num_attention_heads": after.heads, "head_dim": before.size}
        changes["num_key_value_heads"] = after.groups
    with as_plain_fields(text):
        for name, value in changes.items():
            if not is_computed(text, name):
                setattr(text, name, value)
    return new


def _layouts(width: Width, kind: Kind) -> dict[str, Tensor]:
    """The unit at each place of a dimension, for each layout that models use."""
    if kind == "channels":
        channel = torch.arange(width.channels)
        return {kind: channel, "gate and up": channel.repeat(2)}
    head, group = torch.arange(width.heads), width.heads + torch.arange(width.groups)
    by_group = torch.cat([head.view(width.groups, -1), group[:, None], group[:, None]], 1)
    both = torch.cat([head, group, group])  # queries, keys and values in one matrix
    orders = {kind: head, "one after the other": both, "by group": by_group.flatten()}
    single = {"one a head": head}
    if width.alike > 1:  # otherwise a group is one head
        orders["groups"], single["one a group"] = group, group
    wide = {name: order.repeat_interleave(width.size) for name, order in orders.items()}
    return wide | single


def _fits(
    inner: PreTrainedModel, before: Width, after: Width
) -> dict[tuple[str, int, Kind], list[str]]:
    """The weights of a block that hold units, by path and dimension, with possible layouts."""
    steps: dict[Kind, Width] = {
        "channels": replace(before, channels=after.channels),
        "heads": replace(after, channels=before.channels),
    }
    fits: dict[tuple[str, int, Kind], list[str]] = {}
    old = skeleton(inner, inner.config, reloaded=False)
    blocks = find_blocks(old)
    prefix = next(path for path, module in old.named_modules() if module is blocks)
    for kind, width in steps.items():
        if width == before:
            continue
        plan = Narrowing(before, width, inner.config, ())
        left, layouts = _chosen(plan, kind, None), _layouts(before, kind)
        config = _config(inner.config, before, width)
        new, found = skeleton(inner, config, reloaded=True, change="narrowed"), Counter[str]()
        for path, attribute, was, becomes in differences(old, new):
            if attribute == "class" or (attribute == "shape" and not path.startswith(prefix)):
                raise _refused(inner, f"{path or 'its class'} depends on how many {kind} it has")
            dims = enumerate(zip(was, becomes, strict=True)) if attribute == "shape" else ()
            for dim, (many, few) in dims:
                own = path.removeprefix(f"{prefix}.").partition(".")[2]
                how = [
                    name
                    for name, owner in layouts.items()
                    if len(owner) == many and int(torch.isin(owner, left).sum()) == few
                ]
                if many != few and not how:
                    raise _refused(inner, f"{own} is not made of equal {kind}")
                if many != few:
                    fits[own, dim, kind] = how
                    found[own] += 1
        if not found:
            raise _refused(inner, NO_CHANNELS if kind == "channels" else NO_HEADS)
        if set(found.values()) != {len(blocks)}:
            raise _refused(inner, f"not every block has {kind} that its configuration says")
    return fits


def _chosen(plan: Narrowing, kind: Kind, scores: UnitScores | None) -> Tensor:
    """The units of a block that stay: those with the highest scores, the first ones on ties.

    A group's score is the sum of its heads' and its keys' and values' scores.
    """
    before, after = plan.before, plan.after

    def best(values: Tensor, many: int) -> Tensor:
        return values.argsort(dim=-1, descending=True, stable=True)[..., :many]

    many = before.channels if kind == "channels" else before.heads + before.groups
    own = torch.zeros(many) if scores is None else scores[kind]
    if kind == "channels":
        return best(own, after.channels)
    each = own[: before.heads].view(before.groups, -1)  # (G, heads of a group)
    stay = best(each.sum(1) + own[before.heads :], after.groups)
    inside = best(each[stay], after.alike)
    return torch.cat([(stay[:, None] * before.alike + inside).flatten(), before.heads + stay])


@torch.no_grad()
def _holds(tiny: PreTrainedModel, plan: Narrowing) -> bool:
    """Whether the rebuilt narrow model equals the full one with the removed units silenced."""
    masked, narrow, blocks = copy.deepcopy(tiny), copy.deepcopy(tiny), len(find_blocks(tiny))
    generator = torch.Generator().manual_seed(0)
    scores = {k: torch.rand(blocks, n, generator=generator) for k, n in plan.units.items()}
    for index, block in enumerate(find_blocks(masked)):
        ends = plan.ends(block)
        if sorted(kind for kind, _ in ends) != sorted(plan.units):
            return False
        for kind, end in ends:
            left = _chosen(plan, kind, {name: each[index] for name, each in scores.items()})
            gone = ~torch.isin(_layouts(plan.before, kind)[kind], left)
            end.weight[:, gone] = 0
    ids = torch.arange(1, TOKENS + 1)[None]
    try:
        narrow_blocks(narrow, plan, scores)
        rebuilt = build_tiny(copy.deepcopy(plan.config), tiny.dtype)
        rebuilt.load_state_dict(narrow.state_dict())
        goal, *own = (model(ids, use_cache=False)[0] for model in (masked, narrow, rebuilt))
    except (RuntimeError, ValueError):  # shapes that do not fit each other
        return False
    close = 1e-9 if tiny.dtype == torch.float64 else 1e-4
    return all(torch.allclose(goal, each, rtol=close, atol=close) for each in own)


def _refused(inner: PreTrainedModel, reason: str) -> BadInput:
    return refusal(inner, f"it cannot be narrowed: {reason}")
