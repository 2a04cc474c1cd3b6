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

from depthprobe.models.blocks import find_blocks, input_device, unwrap
from depthprobe.models.tap import (
    BlockCalls,
    first_tensor,
    input_state,
    paused_taps,
    record_calls,
)

Part = Literal["attention", "mlp"]
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


@dataclass(frozen=True)
class _Seen:
    """What one call of a sub-module looked like."""

    source: Any  # the state it was called with
    output: Any

    def like(self, state: Tensor) -> bool:
        """Whether it returned a state, position by position, maybe with the batch flattened."""
        source, found = self.source, first_tensor(self.output)
        if not isinstance(source, Tensor) or not isinstance(found, Tensor) or not found.dim():
            return False
        positions = (source.shape[:-1], (source.shape[:-1].numel(),))
        same_size = found.shape[-1] == state.shape[-1] and found.numel() == state.numel()
        return same_size and found.shape[:-1] in positions


def find_sublayers(model: nn.Module, indices: Iterable[int] | None = None) -> list[list[Branch]]:
    """The branches of each block, in the order in which they run.

    Learnt from one pass over four tokens and a few calls of each block, in evaluation mode; the
    model, its random state and its taps stay as they are.

    Args:
        model: a Hugging Face decoder, also under PEFT.
        indices: blocks to look at; None: all.

    Raises:
        ValueError: if a block is not a sum of its input and its sub-layers.
    """
    inner = unwrap(model)
    blocks = find_blocks(inner)
    chosen = range(len(blocks)) if indices is None else list(indices)
    with torch.no_grad(), paused_taps(), evaluating(inner), original_forwards(inner):
        calls = calls_on_few_tokens(inner)
        return [_branches(_replay(blocks[index], calls, index)) for index in chosen]


def calls_on_few_tokens(model: PreTrainedModel) -> BlockCalls:
    """How the blocks are called in a pass over ``TOKENS`` tokens, to call them so again."""
    embeddings: Any = model.get_input_embeddings()
    # from the end: the first ids are often padding, and some models see those differently
    last = embeddings.weight.shape[0] - 1
    ids = torch.arange(last, last - TOKENS, -1, device=input_device(model))[None]
    with record_calls(find_blocks(model)) as calls:
        model.base_model(input_ids=ids, use_cache=False)
    return calls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
    found: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            while isinstance(current := vars(module).get("forward"), Replaced):
                found.append((module, current))
                restore_forward(module, current.before)
        yield
    finally:
        for module, forward in reversed(found):
            vars(module)["forward"] = forward


def restore_forward(module: nn.Module, before: Callable[..., Any] | None) -> None:
    """Give a module back what its own dictionary held as ``forward``."""
    if before is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = before


_Run = Callable[[Collection[str], Tensor], Tensor]


@dataclass(frozen=True)
class _Replay:
    """A block called again as in the recorded pass."""

    block: nn.Module
    state: Tensor  # (..., T, D), its input
    run: _Run  # with the outputs of these sub-modules set to zero, on this state


def _replay(block: nn.Module, calls: BlockCalls, index: int) -> _Replay:
    def run(zeroed: Collection[str], state: Tensor) -> Tensor:
        def silence(_: nn.Module, __: Any, output: Any) -> Any:
            zero = torch.zeros_like(first_tensor(output))
            rebuild = getattr(type(output), "_make", type(output))  # named tuples have their own
            return rebuild([zero, *output[1:]]) if isinstance(output, tuple | list) else zero

        handles = [block.get_submodule(p).register_forward_hook(silence) for p in zeroed]
        try:
            output: Tensor = first_tensor(calls.repeat(block, index, state.clone()))
        finally:
            for handle in handles:
                handle.remove()
        return output

    return _Replay(block, calls.states[index].detach().clone(), run)


def _branches(replay: _Replay) -> list[Branch]:
    seen = _observe(replay)
    waiting = deque([_outermost(replay, seen, "")])
    tried: set[tuple[str, ...]] = set()
    while waiting and len(tried) < ATTEMPTS:
        paths = waiting.popleft()
        if not paths or paths in tried:
            continue
        tried.add(paths)
        if _is_identity(replay, paths):
            needed = _needed(replay, paths)
            return [_branch(replay, seen, needed, path) for path in needed]
        # one of them holds the stream itself, or ends in a norm that adds a bias: look inside it
        for place, path in enumerate(paths):
            inner = _outermost(replay, seen, path)
            waiting.append((*paths[:place], *inner, *paths[place + 1 :]))
    raise ValueError(
        f"the blocks ({type(replay.block).__name__}) are not sums of their input and sub-layers, so"
        " leaving one out is not defined"
    )


def _observe(replay: _Replay) -> dict[str, _Seen]:
    """The sub-modules that run, in order of their return."""
    seen: dict[str, _Seen] = {}

    def hook(path: str) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            seen[path] = _Seen(input_state(args, kwargs), out)

        return after

    handles = [
        module.register_forward_hook(hook(path), with_kwargs=True)
        for path, module in replay.block.named_modules()
        if path
    ]
    try:
        replay.run((), replay.state)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _outermost(replay: _Replay, seen: dict[str, _Seen], within: str) -> tuple[str, ...]:
    """The largest modules below ``within`` that return a state and hold a matrix, in order."""
    prefix = f"{within}." if within else ""
    found: list[str] = []
    for path, module in replay.block.named_modules():
        below = path.startswith(prefix) and path != within
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if not below or nested or path not in seen or not seen[path].like(replay.state):
            continue
        if any(parameter.dim() > 1 for parameter in module.parameters()):
            found.append(path)
    return tuple(sorted(found, key=list(seen).index))


def _is_identity(replay: _Replay, zeroed: Collection[str]) -> bool:
    """Whether the block returns its input, or a multiple of it, with these outputs at zero."""
    # at another size at each position: a norm would return a normed state as it was
    state = _disturbed(replay.state)
    found, state = replay.run(zeroed, state).double(), state.double()
    if found.shape != state.shape:
        return False
    factor = (found * state).sum() / state.square().sum()
    scale = (factor * state).abs().max()
    error = (found - factor * state).abs().max() / scale
    allowed = 1e-5 if replay.state.dtype in (torch.float32, torch.float64) else 3e-2
    return bool(factor.abs() > allowed and error <= allowed)


def _disturbed(state: Tensor) -> Tensor:
    """Another state: of no constant sum, no constant size, other than what any norm returns."""
    *_, tokens, width = state.shape
    wave = torch.arange(tokens * width, dtype=torch.float64).sin().reshape(tokens, width)
    growth = torch.arange(1, tokens + 1, dtype=torch.float64)[:, None]
    size = float(state.double().square().mean().sqrt()) or 1.0
    return state + (wave * growth * size).to(state)


def _needed(replay: _Replay, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Without those whose silence changes nothing once the later ones are silent."""
    kept = list(paths)
    for path in paths:
        fewer = [other for other in kept if other != path]
        if fewer and _is_identity(replay, fewer):
            kept = fewer
    return tuple(kept)


def _branch(replay: _Replay, seen: dict[str, _Seen], paths: tuple[str, ...], path: str) -> Branch:
    others = [other for other in paths if other != path]
    before = replay.state
    after = _disturbed(before)
    after[..., -1, :] = before[..., -1, :]
    one, other = replay.run(others, before)[..., -1, :], replay.run(others, after)[..., -1, :]
    output = seen[path].output
    state: Tensor = first_tensor(output)
    return Branch(
        path=path,
        mixes=bool((one - other).abs().max() > _rounding(state.dtype) * state.abs().max()),
        flat=state.dim() < seen[path].source.dim(),
        width=state.shape[-1],
        dtype=state.dtype,
        extra=len(output) - 1 if isinstance(output, tuple) else None,
    )


def _rounding(dtype: torch.dtype) -> float:
    """What other positions may change by rounding alone: they shape the batches of experts."""
    # some of a float64 model's work is float32 whatever its weights are
    return min(64 * max(torch.finfo(kind).eps for kind in (dtype, torch.float32)), 0.06)
