"""The processes that run a sweep together, as ``accelerate launch -m depthprobe`` starts them.

All of them read, plan and train; only the first writes, shows progress, and measures time. The
command line asks whether there are several, so importing this imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from depthprobe.errors import BadInput

T = TypeVar("T")

# for started processes: Python must not import from the folder that it runs in
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
# variables that launchers set, and that torch and accelerate read as numbers
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class FirstProcessError(RuntimeError):
    """Raised in the other processes, with the message of what the first one raised."""


class Progress:
    """Receives a sweep's events, and ignores them. A subclass must be quick and never raise."""

    def plan(self, trials: Sequence[str]) -> None:
        """The trials that will run now, in order, without those already complete."""

    def message(self, text: str) -> None:
        """What the sweep does now, in one short line."""

    def done(self, trial: str, status: str, seconds: float, note: str) -> None:
        """A trial ended: ``done`` or ``failed``, its seconds, its result or error."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process's number, and how many train together."""

    rank: int = 0
    processes: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.processes > 1:
            import torch

            torch.distributed.barrier()

    def from_first(self, action: Callable[[], T]) -> T:
        """Call the action in the first process; all processes return its result, or raise.

        Otherwise an error there would leave the others waiting for ever.
        """
        if self.processes == 1:
            return action()
        import torch

        outcome: list[Any] = [None, None]  # a result or an error
        if self.writes:
            try:
                outcome[0] = action()
            except Exception as error:  # other errors as text, since not every error can be pickled
                words = f"the first process failed: {type(error).__name__}: {error}"
                outcome[1] = error if isinstance(error, BadInput) else FirstProcessError(words)
                torch.distributed.broadcast_object_list(outcome)
                raise
        torch.distributed.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def leave(self) -> None:
        """End the group, once nothing is left to do together."""
        if self.processes > 1:
            import torch

            torch.distributed.destroy_process_group()


def launched_processes() -> int:
    """How many processes a launcher started to work together; 1 without a launcher.

    ``BadInput`` if a launcher's variable holds no number; an empty one counts as unset.
    """
    for name in LAUNCHER:
        text = os.environ.get(name, "").strip()
        if not re.fullmatch(r"(-?[0-9]{1,9})?", text, re.ASCII):
            raise BadInput(name, text, "a whole number in the environment, or no such variable")
    return int(os.environ.get("WORLD_SIZE", "").strip() or 1)


def launched() -> bool:
    """Whether a launcher started several processes to work together."""
    return launched_processes() > 1


def join_processes(device: str) -> ProcessGroup:
    """Join the launcher's group, to train on a device; a group of one without a launcher."""
    several = launched()
    for name in LAUNCHER:
        if not os.environ.get(name, "-").strip():
            del os.environ[name]  # accelerate would take it for a number
    if not several:
        return ProcessGroup()
    from depthprobe.training.distributed import join

    state = join(device)
    return ProcessGroup(int(state.process_index), int(state.num_processes))
