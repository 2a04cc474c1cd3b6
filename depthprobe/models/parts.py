"""The sub-layers of a block, found by what they do: attention mixes positions, the MLP does not.

A block of a residual network returns ``x + sum of branches``. The modules that end its branches are
those whose outputs, all set to zero, leave ``x`` (up to the one factor some blocks scale their
output by). Of these, one that lets a position see another is attention, or what stands in its
place: a convolution, a recurrence. Names are never read, so any architecture works, except one
whose blocks are no such sums (a norm on the residual stream itself, as in BERT).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from depthprobe.models.blocks import evaluating, find_blocks, input_device, refusal, unwrap
from depthprobe.models.taps import (
    BlockCalls,
    first_tensor,
    input_state,
    original_forwards,
    paused_taps,
    record_calls,
    removed_after,
)

Part = Literal["block", "attention", "mlp"]
TOKENS = 4  # fewer than any attention window, and enough for one position to see another
ATTEMPTS = 64  # sets of modules to try before a block counts as no sum of branches


@dataclass(frozen=True)
class Branch:
    """A module whose output is added to the residual stream."""

    path: str  # inside the block
    mixes: bool  # whether a position's output depends on other positions
    flat: bool  # whether it returns (B T, D) for (B, T, ...)
    width: int  # D
    dtype: torch.dtype
    extra: int | None  # values it returns besides the state; None: only the state


def find_sublayers(model: nn.Module, indices: Iterable[int] | None = None) -> list[list[Branch]]:
    """The branches of each block, in the order in which they run.

    Found with one pass over four tokens and a few calls of each block, in evaluation mode; the
    model, its random state and its taps are not changed. None means all blocks. A block that is no
    sum of its input and its sub-layers is refused.
    """
    inner = unwrap(model)
    chosen = range(len(find_blocks(inner))) if indices is None else indices
    with few_tokens(inner) as calls:
        return [_branches(inner, _Replay(inner, calls, index)) for index in chosen]


@contextmanager
def few_tokens(model: PreTrainedModel) -> Iterator[BlockCalls]:
    """Record how blocks are called in a pass over ``TOKENS`` tokens, to repeat the calls.

    Inside, the plain model runs in evaluation mode; on leaving, everything is as before.
    """
    embeddings: Any = model.get_input_embeddings()
    # ids from the end: the first are often padding, which some models treat differently
    last = embeddings.weight.shape[0] - 1
    ids = torch.arange(last, last - TOKENS, -1, device=input_device(model))[None]
    with torch.no_grad(), paused_taps(), evaluating(model), original_forwards(model):
        with record_calls(find_blocks(model)) as calls:
            model.base_model(input_ids=ids, use_cache=False)
        yield calls


class _Call(NamedTuple):
    """The input and output of one call of a sub-module."""

    state: Any
    result: Any
    extra: int | None  # values returned besides the result; None: only the result

    def returned_state(self, like: Tensor) -> bool:
        """Whether it returned a state per position, possibly with a flattened batch."""
        source, result = self.state, self.result
        if not isinstance(source, Tensor) or not isinstance(result, Tensor) or not result.dim():
            return False
        positions = (source.shape[:-1], (source.shape[:-1].numel(),))
        same_size = result.shape[-1] == like.shape[-1] and result.numel() == like.numel()
        return same_size and result.shape[:-1] in positions


class _Replay:
    """A block called again as in the recorded pass."""

    def __init__(self, model: PreTrainedModel, calls: BlockCalls, index: int) -> None:
        self.block, self.calls, self.index = find_blocks(model)[index], calls, index
        self.state = calls.states[index].detach()  # the block's input, (..., T, D)

    def run(self, state: Tensor, zeroed: Collection[str] = ()) -> Tensor:
        """The block's output on a state, with the outputs of these sub-modules set to zero."""

        def silence(_: nn.Module, __: Any, output: Any) -> Any:
            zero = torch.zeros_like(first_tensor(output))
            rebuild = getattr(type(output), "_make", type(output))  # named tuples need theirs
            return rebuild([zero, *output[1:]]) if isinstance(output, tuple | list) else zero

        with removed_after(
            [self.block.get_submodule(p).register_forward_hook(silence) for p in zeroed]
        ):
            # a copy, since some blocks add to their input in place
            output: Tensor = first_tensor(self.calls.repeat(self.block, self.index, state.clone()))
        return output

    def observe(self) -> tuple[dict[str, _Call], Tensor]:
        """The calls of the sub-modules, in order of their return, and the block's output."""
        calls: dict[str, _Call] = {}

        def hook(path: str) -> Callable[..., None]:
            def after(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                # copies, since later code may add to them in place
                both = (input_state(args, kwargs), first_tensor(output))
                state, result = (v.clone() if isinstance(v, Tensor) else v for v in both)
                extra = len(output) - 1 if isinstance(output, tuple) else None
                calls[path] = _Call(state, result, extra)

            return after

        handles = [
            module.register_forward_hook(hook(path), with_kwargs=True)
            for path, module in self.block.named_modules()
            if path
        ]
        with removed_after(handles):
            output = self.run(self.state)
        return calls, output


def _branches(model: PreTrainedModel, replay: _Replay) -> list[Branch]:
    """Search from the outermost modules inwards for those that end the branches."""
    calls, _ = replay.observe()
    waiting = deque([_outermost(replay, calls, "")])
    tried: set[tuple[str, ...]] = set()
    while waiting and len(tried) < ATTEMPTS:
        paths = waiting.popleft()
        if not paths or paths in tried:
            continue
        tried.add(paths)
        if _is_identity(replay, paths):
            needed = list(paths)
            for path in paths:  # drop modules that need not be silenced
                fewer = [other for other in needed if other != path]
                if fewer and _is_identity(replay, fewer):
                    needed = fewer
            return [_branch(replay, calls[path], needed, path) for path in needed]
        # one holds the stream itself, or ends in a norm that adds a bias: look inside it
        for place, path in enumerate(paths):
            inner = _outermost(replay, calls, path)
            waiting.append((*paths[:place], *inner, *paths[place + 1 :]))
    raise refusal(
        model,
        f"the blocks ({type(replay.block).__name__}) are not sums of their input and sub-layers, so"
        " leaving one out is not defined",
    )


def _outermost(replay: _Replay, calls: dict[str, _Call], within: str) -> tuple[str, ...]:
    """The largest modules below ``within`` that return a state and hold a matrix, in order."""
    prefix = f"{within}." if within else ""
    largest: list[str] = []
    for path, module in replay.block.named_modules():
        below = path.startswith(prefix) and path != within
        nested = any(path.startswith(f"{outer}.") for outer in largest)
        if not below or nested or path not in calls:
            continue
        has_matrix = any(parameter.dim() > 1 for parameter in module.parameters())
        if has_matrix and calls[path].returned_state(replay.state):
            largest.append(path)
    return tuple(sorted(largest, key=list(calls).index))


def _is_identity(replay: _Replay, zeroed: Collection[str]) -> bool:
    """Whether the block returns its input, or a multiple of it, with these outputs at zero."""
    state = _disturbed(replay.state)
    result, state = replay.run(state, zeroed).double(), state.double()
    if result.shape != state.shape:
        return False
    factor = (result * state).sum() / state.square().sum()  # least squares: result = factor state
    scale = (factor * state).abs().max()
    error = (result - factor * state).abs().max() / scale
    allowed = 1e-5 if replay.state.dtype in (torch.float32, torch.float64) else 3e-2
    return bool(factor.abs() > allowed and error <= allowed)


def _disturbed(state: Tensor) -> Tensor:
    """A changed state, with no constant sum and with a different size at each position.

    On a normed state, a norm would look like the identity.
    """
    *_, tokens, width = state.shape
    size = float(state.double().square().mean().sqrt()) or 1.0
    return state + (_wave(tokens, width) * size).to(state)


def _wave(tokens: int, width: int) -> Tensor:
    """Numbers in float64, (T, D), that grow with the position."""
    wave = torch.arange(tokens * width, dtype=torch.float64).sin().reshape(tokens, width)
    return wave * torch.arange(1, tokens + 1, dtype=torch.float64)[:, None]


def _branch(replay: _Replay, call: _Call, paths: list[str], path: str) -> Branch:
    """Describe a branch: change all positions but the last, and see if the last one changes."""
    others = [other for other in paths if other != path]
    before = replay.state
    after = _disturbed(before)
    after[..., -1, :] = before[..., -1, :]
    last, changed = (replay.run(state, others)[..., -1, :] for state in (before, after))  # (..., D)
    result: Tensor = call.result
    # allow for rounding: other positions shape the experts' batches, and parts of a float64 model
    # compute in float32
    eps = max(torch.finfo(kind).eps for kind in (result.dtype, torch.float32))
    rounding = min(64 * eps, 0.06) * result.abs().max()
    return Branch(
        path=path,
        mixes=bool((last - changed).abs().max() > rounding),
        flat=result.dim() < call.state.dim(),
        width=result.shape[-1],
        dtype=result.dtype,
        extra=call.extra,
    )


# Read-out by depth. AltUp (Gemma 3n) passes several streams from block to block and merges them
# after the last. All of them are the state: joined, they are compared and stored like any other.


def check_readable(model: nn.Module, *, streams: bool = True) -> None:
    """Refuse a decoder whose blocks return neither states (B, T, D) nor streams (A, B, T, D).

    Also refuse one with a block that does not run on text, and with ``streams=False`` one with
    streams. Found with a pass over four tokens; the model is not changed.
    """
    inner = unwrap(model)
    with few_tokens(inner) as calls:
        states = calls.states
    cannot = f"{inner.config.get_text_config(decoder=True).model_type} can't be read out by depth"
    idle = [k for k, state in enumerate(states) if not isinstance(state, Tensor) or not len(state)]
    if idle:
        raise refusal(inner, f"{cannot}: blocks {idle} do not run on text")
    shape = tuple(states[0].shape)
    if shape[-3:-1] != (1, TOKENS) or len(shape) > (4 if streams else 3):
        reason = f"its blocks hand on {shape} for {TOKENS} tokens, not states (1, {TOKENS}, D)"
        raise refusal(inner, f"{cannot}: {reason} or streams of them")


def join_streams(state: Tensor) -> Tensor:
    """The state of one position each, (B, D), of A streams (A, B, D) as (B, A D)."""
    return state if state.dim() == 2 else state.movedim(0, -2).flatten(-2)


def split_streams(model: nn.Module, states: Tensor) -> Tensor:
    """Joined states (B, A D) as the blocks pass them on, (A, B, 1, D); (B, D) as (B, 1, D)."""
    width = int(unwrap(model).config.get_text_config(decoder=True).hidden_size)
    if states.shape[-1] <= width:
        return states[:, None]
    streams: Tensor = states.unflatten(-1, (-1, width)).movedim(1, 0)
    return streams[:, :, None]


# The linear map that ends a block's MLP. If its output is added to the stream unchanged, a map of
# the stream can be folded into its weights. Names are not trusted: a pass over a few tokens shows
# what the module computes, and what the block does with it.


def find_projection(model: nn.Module, index: int) -> Any:
    """The linear map whose output is the last thing that a block adds to the stream.

    Proved on a pass over a few tokens: its output is its weights times its input, it is what the
    block's MLP returns, and if Z takes its place, ``h - M + Z`` is what the block returns. It is an
    ``nn.Linear`` or transformers' ``Conv1D``; without one there is a ``ValueError``.
    """
    inner = unwrap(model)
    branches = [branch.path for branch in find_sublayers(inner, [index])[0] if not branch.mixes]
    with few_tokens(inner) as recorded:
        replay = _Replay(inner, recorded, index)
        calls, before = replay.observe()  # before: the block's output, (B, T, D)
        same = [  # the module that returns M, the MLP's output: the MLP or a part of it
            (replay.block.get_submodule(path), call)
            for path, call in calls.items()
            if any(f"{path}.".startswith(f"{mlp}.") for mlp in branches)
            and isinstance(call.result, Tensor)
            and torch.equal(call.result.flatten(), calls[branches[0]].result.flatten())
        ]
        linear = [each for each in same if isinstance(each[0], nn.Linear | Conv1D)]
        if len(branches) != 1 or not linear:
            reason = "its MLP does not end in one linear map (a mixture of experts?)"
        elif not _own_weights(inner, linear[-1][0]) or any(
            hasattr(m, "base_layer") for m, _ in same
        ):
            reason = "the MLP's last weights are quantised, adapted, computed, or others' too"
        elif not _is_linear(*linear[-1]):
            reason = "the MLP's last module does more than its weights times an input"
        elif not _is_added(linear[-1][0], linear[-1][1].result, before, replay):
            reason = "a factor, a norm, or more than a sum is between its MLP and the stream"
        else:
            return linear[-1][0]
    raise ValueError(f"no map can be folded into block {index}: {reason}")


def _own_weights(model: nn.Module, projection: nn.Module) -> bool:
    """Whether weight and bias are plain parameters of this module alone."""
    own = dict(projection.named_parameters(recurse=False))
    everywhere = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return (
        not getattr(model, "is_quantized", False)
        and "weight" in own  # otherwise it is computed from other parameters
        and all(everywhere.count(id(p)) == 1 for p in own.values())
        # 8-bit floats only store numbers
        and not any(
            p.is_meta or not p.is_floating_point() or p.element_size() < 2 for p in own.values()
        )
    )


def _is_linear(projection: Any, call: _Call) -> bool:
    matrix = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
    product = call.state @ matrix
    product = product if projection.bias is None else product + projection.bias
    error = _exact(product - call.result).norm() / _exact(call.result).norm().clamp_min(1e-300)
    return bool(error <= 64 * torch.finfo(call.result.dtype).eps)


def _is_added(projection: nn.Module, written: Tensor, before: Tensor, replay: _Replay) -> bool:
    """Whether M is added to the stream unchanged, and nothing else in the block reads it."""
    size = float(_exact(before).square().mean().sqrt())
    other = (_wave(TOKENS, written.numel() // TOKENS) * size).reshape(written.shape).to(written)
    with projection.register_forward_hook(lambda *_: other.clone()):  # Z
        after = replay.run(replay.state)
    change = _exact(other).reshape(before.shape) - _exact(written).reshape(before.shape)
    moved = _exact(after) - _exact(before)
    terms = _exact(before).abs() + _exact(after).abs() + change.abs()
    return bool(((moved - change).abs() <= 16 * torch.finfo(before.dtype).eps * terms).all())


def _exact(values: Tensor) -> Tensor:
    """A few tokens' values in float64, on the CPU, since not every device has float64."""
    return values.detach().cpu().double()
