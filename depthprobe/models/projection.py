"""The linear map that ends a block's MLP, if what it returns goes into the stream as it is.

A map of the stream can then be folded into its weights. Nothing is believed for a name: a pass over
a few tokens shows what the module computes, and what the block makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from depthprobe.models.blocks import find_blocks, unwrap
from depthprobe.models.sublayers import (
    TOKENS,
    calls_on_few_tokens,
    evaluating,
    find_sublayers,
    original_forwards,
)
from depthprobe.models.tap import first_tensor, paused_taps


def find_projection(model: nn.Module, index: int) -> Any:
    """The linear map whose output is the last thing that a block adds to the stream.

    Proved on a pass over a few tokens: its output is its weights times its input, it is what the
    block's MLP returns, and if Z takes its place, ``h - M + Z`` is what the block returns.

    Args:
        model: a Hugging Face decoder.
        index: of the block.

    Returns:
        an ``nn.Linear`` or transformers' ``Conv1D``.

    Raises:
        ValueError: if there is none, or its weights can't be changed.
    """
    inner = unwrap(model)
    if getattr(inner, "is_quantized", False):
        raise ValueError("quantised weights take no map: probe the unquantised model")
    block = find_blocks(inner)[index]
    branches = [branch for branch in find_sublayers(inner, [index])[0] if not branch.mixes]
    if len(branches) != 1:
        raise ValueError(f"block {index} has {len(branches)} MLPs, not one to fold a map into")
    branch = block.get_submodule(branches[0].path)
    with torch.no_grad(), paused_taps(), evaluating(inner), original_forwards(inner):
        again = _replay(inner, index)
        seen, before = _observe(branch, again)
        written = seen[branch][1]  # M
        same = [m for m, (_, out) in seen.items() if _equal(out, written)]
        if any(hasattr(module, "base_layer") for module in same):
            raise ValueError(f"the MLP of block {index} is under an adapter: merge it first")
        linear = [module for module in same if isinstance(module, nn.Linear | Conv1D)]
        if not linear:
            raise ValueError(
                f"the MLP of block {index} does not end in one linear map (mixture of experts?)"
            )
        projection = linear[-1]
        _check_weights(inner, projection, index)
        _check_linear(projection, *seen[projection], index)
        _check_added(projection, written, before, again, index)
    return projection


def _replay(model: PreTrainedModel, index: int) -> Callable[[], Tensor]:
    """The block's output (B, T, D), computed again on the same few tokens."""
    block, calls = find_blocks(model)[index], calls_on_few_tokens(model)
    state = calls.states[index].clone()

    def again() -> Tensor:
        # some blocks add to their input in place
        found: Tensor = first_tensor(calls.repeat(block, index, state.clone()))
        return found

    return again


_Seen = dict[nn.Module, tuple[Tensor, Tensor]]  # a module's first input and output


def _observe(branch: nn.Module, again: Callable[[], Tensor]) -> tuple[_Seen, Tensor]:
    seen: _Seen = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = first_tensor(output)
        if isinstance(found, Tensor) and args:
            seen[module] = (args[0].clone(), found.clone())

    handles = [module.register_forward_hook(hook) for module in branch.modules()]
    try:
        output = again()
    finally:
        for handle in handles:
            handle.remove()
    return seen, output


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def _check_weights(model: nn.Module, projection: Any, index: int) -> None:
    where = f"the MLP's last linear map in block {index}"
    for name in ("weight", "bias"):
        value = getattr(projection, name)
        if value is None and name == "bias":
            continue
        if projection._parameters.get(name) is None:
            raise ValueError(f"{where} computes its {name} from others: it takes no map")
        # the 8-bit floats are for storage only
        if value.is_meta or not value.is_floating_point() or value.element_size() < 2:
            raise ValueError(f"{where} is quantised or offloaded: it takes no map")
        users = [p for _, p in model.named_parameters(remove_duplicate=False) if p is value]
        if len(users) > 1:
            raise ValueError(f"{where} shares its {name} with another module: it takes no map")


def _check_linear(projection: Any, source: Tensor, output: Tensor, index: int) -> None:
    matrix = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
    found = source @ matrix
    found = found if projection.bias is None else found + projection.bias
    error = _exact(found - output).norm() / _exact(output).norm().clamp_min(1e-300)
    if not float(error) <= 64 * torch.finfo(output.dtype).eps:
        raise ValueError(f"the MLP of block {index} does more than its last weights times an input")


def _check_added(
    projection: nn.Module,
    written: Tensor,
    before: Tensor,
    again: Callable[[], Tensor],
    index: int,
) -> None:
    """That the stream takes M as it is, and that nothing else in the block reads it."""
    # another size at each position: a norm would return a normed state as it was
    wave = torch.arange(written.numel(), dtype=torch.float64).sin().reshape(TOKENS, -1)
    wave *= torch.arange(1, TOKENS + 1)[:, None] * float(_exact(before).square().mean().sqrt())
    other = wave.reshape(written.shape).to(written)  # Z
    handle = projection.register_forward_hook(lambda *_: other.clone())
    try:
        after = again()
    finally:
        handle.remove()
    change = _exact(other).reshape(before.shape) - _exact(written).reshape(before.shape)
    found = _exact(after) - _exact(before)
    terms = _exact(before).abs() + _exact(after).abs() + change.abs()
    if bool(((found - change).abs() <= 16 * torch.finfo(before.dtype).eps * terms).all()):
        return
    factor = (found * change).sum() / change.square().sum()
    scaled = (found - factor * change).norm() <= 1e-2 * found.norm()
    between = f"a factor of {float(factor):.3g}" if scaled else "a norm, or more than a sum,"
    raise ValueError(f"block {index} has {between} between its MLP and the stream: no map fits in")


def _exact(values: Tensor) -> Tensor:
    """In float64, on the CPU since not every device has it; of a few tokens."""
    return values.detach().cpu().double()
