"""Skip blocks, or their attention or MLP, inside a context that restores everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, cache_utils
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from depthprobe.errors import BadInput, one_of
from depthprobe.models.blocks import (
    block_indices,
    find_blocks,
    find_decoder,
    keys_are_read,
    refusal,
    unwrap,
)
from depthprobe.models.parts import Branch, Part, few_tokens, find_sublayers
from depthprobe.models.taps import Plan, input_state, paused_taps, standing_in

# Layers that store nothing: a class of its own, which transformers has from 5.23 on.
_DummyLayer: Any = getattr(cache_utils, "DummyLayer", ())
# Class of a block -> how many values its forward returns besides the state; None: only the state.
_extra_outputs: dict[type[nn.Module], int | None] = {}


@contextmanager
def skip_blocks(
    model: nn.Module, skipped: Iterable[int], *, part: Part = "block"
) -> Iterator[None]:
    """Within the context, the blocks ``skipped``, or one part of each, leave the state unchanged.

    Equal to the model with these blocks removed, or with the part's branch of the residual sum left
    out; what is skipped is not computed. The model is restored on leaving, also after an exception;
    contexts nest (their union is skipped). Works under PEFT, accelerate, autocast, gradient
    checkpointing and ``torch.compile`` (which compiles anew), and with hooks on the blocks.

    Caches: a key-value cache works if every pass that filled it skipped the same, prefix included.
    Positions and masks are derived from the length of single cache layers (usually block 0's), so
    a skipped block or attention puts a placeholder of one number a token into its layer instead of
    leaving it empty. A cache that was filled otherwise is refused; a recurrent block has no length
    to keep, so it is skipped in the first pass over a cache only.

    Args:
        model: a Hugging Face decoder.
        skipped: block indices, 0-based; may be empty.
        part: the whole ``block``; its ``attention``, which lets a position see others (also a
            convolution or a recurrence); or its ``mlp``, which does not (also a mixture of
            experts).

    Raises:
        BadInput: if an index is not a block's, or there is no such part; if a later block reads the
            keys and values of a skipped one, if a block has no such part or is no sum of parts.
        ValueError: inside the context, if the cache was not made under the same skip.
    """
    with standing_in(plan_skip(model, skipped, part=part)):
        yield


def plan_skip(model: nn.Module, skipped: Iterable[int], *, part: Part = "block") -> Plan:
    """Plan what :func:`skip_blocks` does, to apply it repeatedly with :func:`standing_in`.

    Same arguments and errors. The plan is valid while the model's modules stay the same.
    """
    blocks = find_blocks(model)
    indices = sorted(set(block_indices("skip", skipped, len(blocks))))
    one_of("part", part, get_args(Part))
    plan: Plan = []
    if part == "block":
        for index in indices:
            if not set(range(index + 1, len(blocks))) <= set(indices):
                refuse_shared(blocks, index)
            extra = _count_extra_outputs(unwrap(model), index)
            plan.append((blocks[index], _pass_through(index, extra)))
        return plan
    sublayers = find_sublayers(model, indices) if indices else []
    for index, branches in zip(indices, sublayers, strict=True):
        chosen = [branch for branch in branches if branch.mixes == (part == "attention")]
        if not chosen:
            raise refusal(unwrap(model), f"block {index} has no {part} to skip")
        if part == "attention":
            refuse_shared(blocks, index)
        plan += plan_branches(blocks[index], index, chosen)
    return plan


def plan_branches(block: nn.Module, index: int, branches: Iterable[Branch]) -> Plan:
    """Plan to skip the branches of one kind in the ``index``-th block."""
    # all mixers of a block share one layer of the cache, which grows once per pass
    return [
        (block.get_submodule(branch.path), _nothing(branch, None if place else index))
        for place, branch in enumerate(branches)
    ]


def after_blocks(model: nn.Module, state: Tensor, *, head: bool = False) -> Tensor:
    """Apply what the base model does after its last block (final norm, projection) to a state.

    With ``head`` the whole model, up to the logits of its own language-model head.

    With the states of ``tap_blocks`` this is the early read-out: ``after_blocks(model, states[k])``
    equals the last hidden state of the model cut to its first ``k`` blocks, bit for bit. Holds for
    any architecture, at the price of one embedding look-up. Differentiable. States are (B, T, D) of
    any positions, since nothing after the blocks looks across them; returns (B, T, D').
    """
    inner = unwrap(model)
    blocks = find_blocks(inner)
    # skip all blocks, and let the last one return the given state in place of the embeddings
    ids = torch.zeros(state.shape[-3:-1], dtype=torch.long, device=state.device)  # (B, T)
    with paused_taps(), skip_blocks(inner, range(len(blocks))):
        extra = _count_extra_outputs(inner, len(blocks) - 1)
        vars(blocks[-1])["forward"] = lambda *_, **__: _as_output(state, extra)
        last = inner if head else find_decoder(inner)
        result: Tensor = last(input_ids=ids, use_cache=False)[0]
    return result


def _pass_through(index: int, extra: int | None) -> Callable[..., Any]:
    """A block that returns its input."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        state: Tensor = input_state(args, kwargs)
        _keep_length(args, kwargs, index, state)
        return _as_output(state, extra)

    return forward


def _nothing(branch: Branch, index: int | None) -> Callable[..., Any]:
    """A branch that adds zeros to the stream; with the block's index if its cache must grow."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        state: Tensor = input_state(args, kwargs)
        if index is not None:
            _keep_length(args, kwargs, index, state)
        positions = (-1,) if branch.flat else state.shape[:-1]
        zeros = state.new_zeros(*state.shape[:-1], branch.width, dtype=branch.dtype)
        return _as_output(zeros.view(*positions, branch.width), branch.extra)

    return forward


def _as_output(state: Tensor, extra: int | None) -> Any:
    """The state, and None for each other value that a module returns."""
    return state if extra is None else (state, *[None] * extra)


def _keep_length(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, state: Tensor) -> None:
    """Put a placeholder of one number per token into a skipped block's cache, if there is one."""
    cache = next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)
    if cache is None:
        return
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(layer, _DummyLayer):
        return
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        if getattr(layer, "depthprobe_skipped", False) or any(layer.has_previous_state.values()):
            raise ValueError(
                f"block {index} is recurrent and cannot be skipped with a filled cache: run with"
                " use_cache=False or cut with keep_blocks"
            )
        layer.depthprobe_skipped = True  # type: ignore[attr-defined]
        return
    filled = layer is not None and layer.is_initialized and layer.keys.numel() > 0
    if filled and (layer.keys.shape[1], layer.keys.shape[3]) != (1, 1):
        raise ValueError(
            f"the cache was filled with block {index} active: make it under the same skip_blocks"
        )
    placeholder = state.new_zeros(state.shape[-3], 1, state.shape[-2], 1)  # (B, 1, T, 1)
    cache.update(placeholder, placeholder, index)


def refuse_shared(blocks: nn.ModuleList, index: int) -> None:
    """Refuse to skip a block whose keys and values later blocks read."""
    stores = any(getattr(m, "store_full_length_kv", False) for m in blocks[index].modules())
    if stores and keys_are_read(blocks):
        raise BadInput(
            "skip", index, "cannot skip a block whose keys and values later blocks read", fault=True
        )


def _count_extra_outputs(model: PreTrainedModel, index: int) -> int | None:
    """How many values blocks of this class return besides the state, found from one call."""
    block = find_blocks(model)[index]
    kind = type(block)
    if kind not in _extra_outputs:
        with few_tokens(model) as calls:
            output = calls.repeat(block, index, calls.states[index].clone())
        _extra_outputs[kind] = len(output) - 1 if isinstance(output, tuple | list) else None
    return _extra_outputs[kind]
