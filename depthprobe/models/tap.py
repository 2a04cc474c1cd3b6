"""The state after every block, from the model's own forward pass, through hooks on the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from depthprobe.models.blocks import find_blocks

_paused: ContextVar[bool] = ContextVar("depthprobe_taps_paused", default=False)


class BlockTap:
    """What a tapped forward pass left: ``states[k]`` is the state after ``k`` blocks.

    Nothing is detached: a loss on a state trains the blocks before it.
    """

    def __init__(self, n_blocks: int, select: Callable[[Tensor], Tensor] | None) -> None:
        """Use :func:`tap_blocks`."""
        self._select = select
        self._states: list[Tensor | None] = [None] * (n_blocks + 1)

    @property
    def states(self) -> list[Tensor]:
        """The L + 1 selected states of the latest forward pass, h_0 (the input) to h_L.

        h_L is the output of the last block, before the final norm. The list stays as it is when
        the model runs again.

        Raises:
            RuntimeError: if no forward pass has run, or if a block did not run in it.
        """
        if all(state is None for state in self._states):
            raise RuntimeError("no states: the model has not run since the tap was set or cleared")
        complete = [state for state in self._states if state is not None]
        if len(complete) != len(self._states):
            absent = [index - 1 for index, state in enumerate(self._states) if state is None]
            raise RuntimeError(
                f"{len(complete)} states instead of {len(self._states)}: blocks {absent} did not"
                " run in the latest forward pass"
            )
        return complete

    def clear(self) -> None:
        """Forget the states (and free the graph they hold)."""
        self._states = [None] * len(self._states)

    def record(self, index: int, state: Tensor) -> None:
        """Store the state after ``index`` blocks; 0 starts a new forward pass."""
        if index == 0:
            self.clear()
        self._states[index] = state if self._select is None else self._select(state)


@contextmanager
def tap_blocks(
    model: nn.Module, select: Callable[[Tensor], Tensor] | None = None
) -> Iterator[BlockTap]:
    """Record the state before the first and after every block during each forward pass.

    Own hooks on the blocks, since ``output_hidden_states`` returns a wrong number after a cut and
    puts the final norm into its last entry. Blocks left out by ``skip_blocks`` are recorded too:
    their state is the one before them.

    Args:
        model: a Hugging Face decoder, also under PEFT.
        select: applied to each state (B, T, D) as it is produced, for example to keep only the
            last position, so that memory stays small. Default: the state as it is.

    Yields:
        the :class:`BlockTap`; read its ``states`` after the forward pass.
    """
    blocks = find_blocks(model)
    tap = BlockTap(len(blocks), select)

    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _paused.get():
            tap.record(0, args[0] if args else kwargs["hidden_states"])

    def after(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not _paused.get():
                tap.record(index + 1, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [block.register_forward_hook(after(index)) for index, block in enumerate(blocks)]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def paused_taps() -> Iterator[None]:
    """Forward passes inside leave all taps as they are."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)
