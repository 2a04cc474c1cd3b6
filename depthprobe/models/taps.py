"""Record the state after every block, and how blocks are called, by hooks that are all removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from depthprobe.models.blocks import find_blocks

Plan = list[tuple[nn.Module, Callable[..., Any]]]  # modules and the replacements of their forward

_paused: ContextVar[bool] = ContextVar("depthprobe_taps_paused", default=False)


class BlockTap:
    """The result of a tapped forward pass: ``states[k]`` is the state after ``k`` blocks.

    Nothing is detached, so a loss on a state trains the blocks before it. With ``positions``, (B,),
    which may be set before each pass, only one position of each row is kept: (B, D).
    """

    def __init__(
        self,
        n_blocks: int,
        dtype: torch.dtype | None,
        consume: Callable[[int, Tensor], None] | None,
    ) -> None:
        """Use :func:`tap_blocks`."""
        self.positions: Tensor | None = None
        self._size, self._dtype, self._consume = n_blocks + 1, dtype, consume
        self._states: dict[int, Tensor | None] = {}  # by depth; None: given to ``consume``

    @property
    def states(self) -> list[Tensor]:
        """The L + 1 states of the latest forward pass, h_0 (the input) to h_L.

        h_L is the output of the last block, before the final norm. The list does not change when
        the model runs again. Raises ``RuntimeError`` if a state is missing.
        """
        if self._consume is not None:
            raise RuntimeError("no states: they were handed to the tap's consumer")
        if not self._states:
            raise RuntimeError("no states: the model has not run since the tap was set or cleared")
        self.check_complete()
        states = (self._states[depth] for depth in range(self._size))
        return [state for state in states if state is not None]

    def clear(self) -> None:
        """Delete the states (and the graph they hold)."""
        self._states = {}

    def check_complete(self) -> None:
        """Raise if a block did not run in the latest pass; a tap without a pass is complete."""
        absent = [k - 1 for k in range(self._size) if k not in self._states]
        if absent and self._states:
            raise RuntimeError(
                f"{len(self._states)} states instead of {self._size}: blocks {absent} did not run"
                " in the latest forward pass"
            )

    def record(self, index: int, state: Tensor) -> None:
        """Take the state after ``index`` blocks; 0 starts a new forward pass."""
        if index == 0:
            if self._consume is not None:
                self.check_complete()
            self.clear()
        if self.positions is not None:
            # (..., B, T, D) -> (..., B, D): one position a row; streams (A, B, T, D) keep their A
            rows = torch.arange(state.shape[-3], device=state.device)
            state = state[..., rows, self.positions.to(state.device), :]
        if self._dtype is not None:
            state = state.to(self._dtype)
        self._states[index] = state if self._consume is None else None
        if self._consume is not None:
            self._consume(index, state)


@contextmanager
def tap_blocks(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    consume: Callable[[int, Tensor], None] | None = None,
) -> Iterator[BlockTap]:
    """Record the state before the first and after every block during each forward pass.

    It uses hooks of its own, since ``output_hidden_states`` returns a wrong number of states after
    a cut and applies the final norm to the last. Blocks left out by ``skip_blocks`` are recorded
    too: their state is the one before them. A model under ``torch.compile`` runs uncompiled inside,
    because compiled code ignores the hooks.

    Args:
        model: a Hugging Face decoder, also under PEFT.
        dtype: of the recorded states; None: unchanged. Similarities need float32, since bfloat16
            rounds away the difference of neighbouring states.
        consume: takes ``(k, state)`` as each state is produced, in order; nothing is stored then,
            so memory does not grow with the depth.

    Yields:
        the :class:`BlockTap`: set its ``positions`` before a forward pass, read its ``states``
        after.

    Raises:
        RuntimeError: on leaving, with a ``consume``, if a block did not run in the latest pass.
    """
    blocks = find_blocks(model)
    tap = BlockTap(len(blocks), dtype, consume)

    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _paused.get():
            tap.record(0, input_state(args, kwargs))

    def after(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not _paused.get():
                tap.record(index + 1, first_tensor(output))

        return hook

    handles = [blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [block.register_forward_hook(after(index)) for index, block in enumerate(blocks)]
    with removed_after(handles):
        with torch.compiler.set_stance("force_eager"):
            yield tap
        if consume is not None:
            tap.check_complete()


@contextmanager
def paused_taps() -> Iterator[None]:
    """Forward passes inside do not change any tap."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """A list for hooks, which are removed on leaving, also after an exception."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class BlockCalls:
    """How each block was called in the latest forward pass: its state and all other arguments."""

    def __init__(self, n_blocks: int) -> None:
        """Use :func:`record_calls`."""
        self.states: list[Tensor] = [torch.empty(0)] * n_blocks
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store a block's call."""
        self.states[index] = input_state(args, kwargs)
        self._calls[index] = (args, kwargs)

    def repeat(
        self, block: nn.Module, index: int, state: Tensor, cache: Cache | None = None
    ) -> Any:
        """Call a block as the ``index``-th was called, on another state and another cache."""
        if index not in self._calls:
            raise ValueError(f"block {index} does not run on text alone")
        given, named = self._calls[index]
        args = [cache if isinstance(v, Cache) else v for v in given]
        kwargs = {k: cache if isinstance(v, Cache) else v for k, v in named.items()}
        if args:
            args[0] = state
        else:
            kwargs["hidden_states"] = state
        return block(*args, **kwargs)


@contextmanager
def record_calls(blocks: nn.ModuleList) -> Iterator[BlockCalls]:
    """Record how each block is called during each forward pass, to repeat the call."""
    calls = BlockCalls(len(blocks))

    def hook(index: int) -> Any:
        return lambda _, args, kwargs: calls.record(index, args, kwargs)

    with removed_after(
        [
            block.register_forward_pre_hook(hook(index), with_kwargs=True)
            for index, block in enumerate(blocks)
        ]
    ):
        yield calls


def input_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The state that a module was called with."""
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    tensors = (v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point())
    return next(tensors, None)


def first_tensor(output: Any) -> Any:
    """The state in a module's output."""
    return output[0] if isinstance(output, tuple | list) and output else output


# Replacements of a module's forward.


class _StandIn:
    """A replacement that knows what the module's own dictionary held before; None: nothing."""

    def __init__(self, forward: Callable[..., Any], before: Callable[..., Any] | None) -> None:
        self.forward, self.before = forward, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@contextmanager
def standing_in(plan: Plan) -> Iterator[None]:
    """Within the context, each planned stand-in replaces its module's forward."""
    with _forwards(
        (module, _StandIn(forward, vars(module).get("forward"))) for module, forward in plan
    ):
        yield


@contextmanager
def original_forwards(model: nn.Module) -> Iterator[None]:
    """Within the context, undo all stand-ins."""
    undone = []
    for module in model.modules():
        forward = vars(module).get("forward")
        while isinstance(forward, _StandIn):
            forward = forward.before
        undone.append((module, forward))
    with _forwards(undone):
        yield


@contextmanager
def _forwards(chosen: Iterable[tuple[nn.Module, Callable[..., Any] | None]]) -> Iterator[None]:
    """Within the context, set these forwards on the modules; None: the class's own forward."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in chosen:
            before.append((module, vars(module).get("forward")))
            _set_forward(module, forward)
        yield
    finally:
        for module, forward in reversed(before):
            _set_forward(module, forward)


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    vars(module).pop("forward", None)
    if forward is not None:
        vars(module)["forward"] = forward
