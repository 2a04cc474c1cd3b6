"""The sub-layers of a block, found by what they do: attention mixes positions, the MLP does not.

A block of a residual network returns ``x + sum of branches``. The modules that end its branches are
those whose outputs, all set to zero, leave ``x`` (up to the one factor some blocks scale their
output by). Of these, one that lets a position see another is attention, or what stands in its
place: a convolution, a recurrence. Names are never read, so any architecture will do; one whose
blocks are no such sums (a norm on the residual stream itself, as in BERT) is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from depthprobe.models.blocks import evaluating, find_blocks, input_device, refusal, unwrap
from depthprobe.models.taps import (
    BlockCalls,
    first_tensor,
    input_state,
    paused_taps,
    record_calls,
    removed_after,
)

Part = Literal["block", "attention", "mlp"]
TOKENS = 4  # fewer than any attention window, and enough for one position to see another
ATTEMPTS = 64  # sets of modules tried on a block before it counts as no sum of branches


@dataclass(frozen=True)
class Branch:
    """A module whose output is added to the residual stream."""

    path: str  # inside the block
    mixes: bool  # whether a position's output depends on other positions
    flat: bool  # whether it returns (B T, D) for (B, T, ...)
    width: int  # D
    dtype: torch.dtype
    extra: int | None  # values it returns beside the state; None: the state alone


def find_sublayers(model: nn.Module, indices: Iterable[int] | None = None) -> list[list[Branch]]:
    """The branches of each block, in the order in which they run.

    Learnt from one pass over four tokens and a few calls of each block, in evaluation mode; the
    model, its random state and its taps stay as they are.

    Args:
        model: a Hugging Face decoder, also under PEFT.
        indices: blocks to look at; None: all.

    Raises:
        BadInput: if a block is not a sum of its input and its sub-layers.
    """
    inner = unwrap(model)
    blocks = find_blocks(inner)
    chosen = range(len(blocks)) if indices is None else list(indices)
    with _undisturbed(inner):
        calls = _calls_on_few_tokens(inner)
        return [_branches(inner, _Replay(blocks[index], calls, index)) for index in chosen]


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Passes inside are those of the plain model in evaluation mode, and leave no trace."""
    with torch.no_grad(), paused_taps(), evaluating(model), original_forwards(model):
        yield


def _calls_on_few_tokens(model: PreTrainedModel) -> BlockCalls:
    """How the blocks are called in a pass over ``TOKENS`` tokens, to call them so again."""
    embeddings: Any = model.get_input_embeddings()
    # from the end: the first ids are often padding, and some models see those differently
    last = embeddings.weight.shape[0] - 1
    ids = torch.arange(last, last - TOKENS, -1, device=input_device(model))[None]
    with record_calls(find_blocks(model)) as calls:
        model.base_model(input_ids=ids, use_cache=False)
    return calls


class Replaced:
    """A stand-in for a module's forward that knows what it stands in for."""

    def __init__(self, stand_in: Callable[..., Any], before: Callable[..., Any] | None) -> None:
        self.stand_in = stand_in
        self.before = before  # what the module's own dictionary held; None: nothing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stand-in's answer."""
        return self.stand_in(*args, **kwargs)


@contextmanager
def original_forwards(model: nn.Module) -> Iterator[None]:
    """Undo the skips that are in force, for a while."""
    undone: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            while isinstance(current := vars(module).get("forward"), Replaced):
                undone.append((module, current))
                restore_forward(module, current.before)
        yield
    finally:
        for module, forward in reversed(undone):
            vars(module)["forward"] = forward


def restore_forward(module: nn.Module, before: Callable[..., Any] | None) -> None:
    """Give a module back what its own dictionary held as ``forward``."""
    if before is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = before


@dataclass(frozen=True)
class _Replay:
    """A block called again as in the recorded pass."""

    block: nn.Module
    calls: BlockCalls
    index: int

    @property
    def state(self) -> Tensor:
        """The block's input, (..., T, D)."""
        return self.calls.states[self.index].detach()

    def run(self, state: Tensor, zeroed: Collection[str] = ()) -> Tensor:
        """The block's output on a state, with the outputs of these sub-modules set to zero."""

        def silence(_: nn.Module, __: Any, output: Any) -> Any:
            zero = torch.zeros_like(first_tensor(output))
            rebuild = getattr(type(output), "_make", type(output))  # named tuples have their own
            return rebuild([zero, *output[1:]]) if isinstance(output, tuple | list) else zero

        with removed_after(
            [self.block.get_submodule(p).register_forward_hook(silence) for p in zeroed]
        ):
            # a copy, as some blocks add to their input in place
            output: Tensor = first_tensor(self.calls.repeat(self.block, self.index, state.clone()))
        return output


@dataclass(frozen=True)
class _Call:
    """What one call of a sub-module looked like."""

    state: Any  # that it was called with
    output: Any

    def returned_state(self, like: Tensor) -> bool:
        """Whether it returned a state, position by position, maybe with the batch flattened."""
        source, result = self.state, first_tensor(self.output)
        if not isinstance(source, Tensor) or not isinstance(result, Tensor) or not result.dim():
            return False
        positions = (source.shape[:-1], (source.shape[:-1].numel(),))
        same_size = result.shape[-1] == like.shape[-1] and result.numel() == like.numel()
        return same_size and result.shape[:-1] in positions


def _branches(model: PreTrainedModel, replay: _Replay) -> list[Branch]:
    """Search for the modules that end the branches, from the outermost ones inwards."""
    calls = _observe(replay)
    waiting = deque([_outermost(replay, calls, "")])
    tried: set[tuple[str, ...]] = set()
    while waiting and len(tried) < ATTEMPTS:
        paths = waiting.popleft()
        if not paths or paths in tried:
            continue
        tried.add(paths)
        if _is_identity(replay, paths):
            needed = _needed(replay, paths)
            return [_branch(replay, calls, needed, path) for path in needed]
        # one of them holds the stream itself, or ends in a norm that adds a bias: look inside it
        for place, path in enumerate(paths):
            inner = _outermost(replay, calls, path)
            waiting.append((*paths[:place], *inner, *paths[place + 1 :]))
    raise refusal(
        model,
        f"the blocks ({type(replay.block).__name__}) are not sums of their input and sub-layers, so"
        " leaving one out is not defined",
    )


def _observe(replay: _Replay) -> dict[str, _Call]:
    """The sub-modules that run, in order of their return."""
    calls: dict[str, _Call] = {}

    def hook(path: str) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            calls[path] = _Call(input_state(args, kwargs), out)

        return after

    handles = [
        module.register_forward_hook(hook(path), with_kwargs=True)
        for path, module in replay.block.named_modules()
        if path
    ]
    with removed_after(handles):
        replay.run(replay.state)
    return calls


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
    """Another state: of no constant sum, and of another size at each position.

    A norm would return a normed state as it was, and look like no norm at all.
    """
    *_, tokens, width = state.shape
    size = float(state.double().square().mean().sqrt()) or 1.0
    return state + (_wave(tokens, width) * size).to(state)


def _wave(tokens: int, width: int) -> Tensor:
    """Numbers in float64, (T, D), that grow with the position."""
    wave = torch.arange(tokens * width, dtype=torch.float64).sin().reshape(tokens, width)
    return wave * torch.arange(1, tokens + 1, dtype=torch.float64)[:, None]


def _needed(replay: _Replay, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Without those whose silence changes nothing once the later ones are silent."""
    needed = list(paths)
    for path in paths:
        fewer = [other for other in needed if other != path]
        if fewer and _is_identity(replay, fewer):
            needed = fewer
    return tuple(needed)


def _branch(replay: _Replay, calls: dict[str, _Call], paths: tuple[str, ...], path: str) -> Branch:
    """What one of the branches does: change all positions but the last, and see if that changes."""
    others = [other for other in paths if other != path]
    before = replay.state
    after = _disturbed(before)
    after[..., -1, :] = before[..., -1, :]
    last, changed = (replay.run(state, others)[..., -1, :] for state in (before, after))  # (..., D)
    output = calls[path].output
    state: Tensor = first_tensor(output)
    return Branch(
        path=path,
        mixes=bool((last - changed).abs().max() > _rounding(state.dtype) * state.abs().max()),
        flat=state.dim() < calls[path].state.dim(),
        width=state.shape[-1],
        dtype=state.dtype,
        extra=len(output) - 1 if isinstance(output, tuple) else None,
    )


def _rounding(dtype: torch.dtype) -> float:
    """What other positions may change by rounding alone: they shape the batches of experts."""
    # some of a float64 model's work is float32 whatever its weights are
    return min(64 * max(torch.finfo(kind).eps for kind in (dtype, torch.float32)), 0.06)


# Read-out by depth. AltUp (Gemma 3n) passes several streams from block to block and makes one of
# them behind the last. All of them are the state: joined, they are compared and kept like any
# other.


def check_readable(model: nn.Module, *, streams: bool = True) -> None:
    """Refuse a decoder whose blocks hand on neither states (B, T, D) nor streams (A, B, T, D).

    Such as streams in another order. Learnt from a pass over four tokens; the model stays as it is.

    Args:
        model: a Hugging Face decoder, also under PEFT.
        streams: whether several of them can be dealt with, or plain states alone.

    Raises:
        BadInput: in that case, or if a block does not run on text.
    """
    inner = unwrap(model)
    with _undisturbed(inner):
        states = _calls_on_few_tokens(inner).states
    family = inner.config.get_text_config(decoder=True).model_type
    idle = [
        index
        for index, state in enumerate(states)
        if not isinstance(state, Tensor) or not state.numel()
    ]
    if idle:
        reason = f"{family} can't be read out by depth: blocks {idle} do not run on text"
        raise refusal(inner, reason)
    shape = tuple(states[0].shape)
    if shape[-3:-1] != (1, TOKENS) or len(shape) > (4 if streams else 3):
        raise refusal(
            inner,
            f"{family} can't be read out by depth: its blocks hand on {shape} for {TOKENS} tokens,"
            f" not states (1, {TOKENS}, D) or streams of them",
        )


def join_streams(state: Tensor) -> Tensor:
    """The state of one position each, (B, D), of A streams (A, B, D) as (B, A D)."""
    return state if state.dim() == 2 else state.movedim(0, -2).flatten(-2)


def split_streams(model: nn.Module, states: Tensor) -> Tensor:
    """Joined states (B, A D) as the blocks hand them on, (A, B, 1, D); (B, D) as (B, 1, D)."""
    width = int(unwrap(model).config.get_text_config(decoder=True).hidden_size)
    if states.shape[-1] <= width:
        return states[:, None]
    streams: Tensor = states.unflatten(-1, (-1, width)).movedim(1, 0)
    return streams[:, :, None]


# The linear map that ends a block's MLP. If what it returns goes into the stream as it is, a map of
# the stream can be folded into its weights. Names are not trusted: a pass over a few tokens shows
# what the module computes, and what the block makes of it.

_States = dict[nn.Module, tuple[Tensor, Tensor]]  # a module's first input and output


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
    with _undisturbed(inner):
        replay = _Replay(block, _calls_on_few_tokens(inner), index)
        states, before = _observe_inside(branch, replay)
        written = states[branch][1]  # M
        same = [m for m, (_, output) in states.items() if _equal(output, written)]
        if any(hasattr(module, "base_layer") for module in same):
            raise ValueError(f"the MLP of block {index} is under an adapter: merge it first")
        linear = [module for module in same if isinstance(module, nn.Linear | Conv1D)]
        if not linear:
            raise ValueError(
                f"the MLP of block {index} does not end in one linear map (mixture of experts?)"
            )
        projection = linear[-1]
        _check_weights(inner, projection, index)
        _check_linear(projection, *states[projection], index)
        _check_added(projection, written, before, replay)
    return projection


def _observe_inside(branch: nn.Module, replay: _Replay) -> tuple[_States, Tensor]:
    """What the modules of a branch read and return, and what the block returns, (B, T, D)."""
    states: _States = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        result = first_tensor(output)
        if isinstance(result, Tensor) and args:
            states[module] = (args[0].clone(), result.clone())

    with removed_after([module.register_forward_hook(hook) for module in branch.modules()]):
        output = replay.run(replay.state)
    return states, output


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def _check_weights(model: nn.Module, projection: Any, index: int) -> None:
    """That weight and bias are plain parameters of this module alone."""
    where = f"the MLP's last linear map in block {index}"
    own = dict(projection.named_parameters(recurse=False))
    for name in ("weight", "bias"):
        value = getattr(projection, name)
        if value is None and name == "bias":
            continue
        if name not in own:
            raise ValueError(f"{where} computes its {name} from others: it takes no map")
        # the 8-bit floats are for storage only
        if value.is_meta or not value.is_floating_point() or value.element_size() < 2:
            raise ValueError(f"{where} is quantised or offloaded: it takes no map")
        users = [p for _, p in model.named_parameters(remove_duplicate=False) if p is value]
        if len(users) > 1:
            raise ValueError(f"{where} shares its {name} with another module: it takes no map")


def _check_linear(projection: Any, source: Tensor, output: Tensor, index: int) -> None:
    matrix = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
    product = source @ matrix
    product = product if projection.bias is None else product + projection.bias
    error = _exact(product - output).norm() / _exact(output).norm().clamp_min(1e-300)
    if not float(error) <= 64 * torch.finfo(output.dtype).eps:
        raise ValueError(f"the MLP of block {index} does more than its last weights times an input")


def _check_added(projection: nn.Module, written: Tensor, before: Tensor, replay: _Replay) -> None:
    """That the stream takes M as it is, and that nothing else in the block reads it."""
    size = float(_exact(before).square().mean().sqrt())
    other = (_wave(TOKENS, written.numel() // TOKENS) * size).reshape(written.shape).to(written)
    with projection.register_forward_hook(lambda *_: other.clone()):  # Z
        after = replay.run(replay.state)
    change = _exact(other).reshape(before.shape) - _exact(written).reshape(before.shape)
    moved = _exact(after) - _exact(before)
    terms = _exact(before).abs() + _exact(after).abs() + change.abs()
    if bool(((moved - change).abs() <= 16 * torch.finfo(before.dtype).eps * terms).all()):
        return
    factor = (moved * change).sum() / change.square().sum()
    scaled = (moved - factor * change).norm() <= 1e-2 * moved.norm()
    between = f"a factor of {float(factor):.3g}" if scaled else "a norm, or more than a sum,"
    raise ValueError(
        f"block {replay.index} has {between} between its MLP and the stream: no map fits in"
    )


def _exact(values: Tensor) -> Tensor:
    """In float64, on the CPU since not every device has it; of a few tokens."""
    return values.detach().cpu().double()
