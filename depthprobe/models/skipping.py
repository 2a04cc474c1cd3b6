"""Leave blocks out for a while: their hidden state passes through unchanged, nothing is cut."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DummyLayer, LinearAttentionCacheLayerMixin

from depthprobe.models.blocks import find_blocks, unwrap
from depthprobe.models.tap import paused_taps
from depthprobe.study import BadInput

# Class of a block -> how many values its forward returns beside the state; None: only the state.
_extra_outputs: dict[type[nn.Module], int | None] = {}


@contextmanager
def skip_blocks(model: nn.Module, skipped: Iterable[int]) -> Iterator[None]:
    """Within the context, the blocks ``skipped`` return their hidden state unchanged.

    Equal to the model with these blocks removed. The model is restored on leaving, also after an
    exception; contexts nest (their union is skipped); PEFT, gradients and hooks on the blocks work.

    Caches: a key-value cache works if every pass that filled it skipped the same blocks, prefix
    included. Positions and masks are derived from the length of single cache layers (usually
    block 0's), so a skipped block puts a placeholder of one number a token into its layer instead
    of leaving it empty. A cache that another set of blocks has filled is refused; a recurrent
    block has no length to keep, so it is skipped in the first pass over a cache only.

    Args:
        model: a Hugging Face decoder.
        skipped: block indices, 0-based; may be empty.

    Raises:
        BadInput: if an index is not a block's.
        ValueError: if a later block reads the keys and values of a skipped one; inside the
            context, if the cache was not made under the same skip.
    """
    blocks = find_blocks(model)
    indices = _check_skipped(skipped, len(blocks))
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for index in indices:
            block = blocks[index]
            extra = _count_extra_outputs(unwrap(model), block)
            replaced.append((block, vars(block).get("forward")))
            vars(block)["forward"] = _pass_through(index, extra)
        yield
    finally:
        for block, forward in reversed(replaced):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


def after_blocks(model: nn.Module, state: Tensor) -> Tensor:
    """What the base model does after its last block (final norm, projection) on a given state.

    With the states of ``tap_blocks`` this is the early read-out: ``after_blocks(model, states[k])``
    equals the last hidden state of the model cut to its first ``k`` blocks, bit for bit. Holds for
    any architecture, at the price of one embedding look-up. Differentiable.

    Args:
        model: a Hugging Face decoder, also under PEFT.
        state: (B, T, D); any positions, since nothing after the blocks looks across them.

    Returns:
        (B, T, D'), the base model's last hidden state.
    """
    inner = unwrap(model)
    blocks = find_blocks(inner)
    last = len(blocks) - 1
    ids = torch.zeros(state.shape[-3:-1], dtype=torch.long, device=state.device)  # (B, T)
    with paused_taps(), skip_blocks(inner, range(len(blocks))):
        extra = _count_extra_outputs(inner, blocks[last])
        vars(blocks[last])["forward"] = lambda *_, **__: _as_output(state, extra)
        result: Tensor = inner.base_model(input_ids=ids, use_cache=False)[0]
    return result


def _check_skipped(skipped: Iterable[int], depth: int) -> list[int]:
    allowed = f"block indices from 0 to {depth - 1}"
    try:
        values = list(skipped)
        indices = sorted({operator.index(value) for value in values})
    except TypeError:
        raise BadInput("skip", skipped, allowed) from None
    if indices and (indices[0] < 0 or indices[-1] >= depth):
        raise BadInput("skip", values, allowed)
    return indices


def _pass_through(index: int, extra: int | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        state: Tensor = args[0] if args else kwargs["hidden_states"]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                _keep_length(value, index, state)
        return _as_output(state, extra)

    return forward


def _as_output(state: Tensor, extra: int | None) -> Any:
    return state if extra is None else (state, *[None] * extra)


def _keep_length(cache: Cache, index: int, state: Tensor) -> None:
    """Let the cache layer of a skipped block grow by the tokens of this pass."""
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(layer, DummyLayer):
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


def _count_extra_outputs(model: PreTrainedModel, block: nn.Module) -> int | None:
    """Whether blocks of this class return a tuple, learnt from one pass over one token."""
    for module in block.modules():
        if getattr(module, "store_full_length_kv", False):
            raise ValueError("cannot skip a block whose keys and values later blocks read")
    kind = type(block)
    if kind not in _extra_outputs:
        seen: list[Any] = []
        handle = block.register_forward_hook(lambda _, __, output: seen.append(output))
        modes = [(module, module.training) for module in model.modules()]
        embeddings: Any = model.get_input_embeddings()
        ids = torch.zeros(1, 1, dtype=torch.long, device=embeddings.weight.device)
        try:
            model.eval()
            with torch.no_grad(), paused_taps():
                model.base_model(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
            for module, training in modes:
                module.training = training
        (output,) = seen
        _extra_outputs[kind] = len(output) - 1 if isinstance(output, tuple) else None
    return _extra_outputs[kind]
