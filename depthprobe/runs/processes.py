"""The processes that run a sweep together, as ``accelerate launch -m depthprobe`` starts them.

All of them read, plan and train; the first one alone writes, shows progress, and measures time.
The command line asks whether there are several: importing this imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProcessGroup:
    """Which of how many processes this is."""

    rank: int = 0
    processes: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all processes have come here, and see what the first one has written."""
        if self.processes > 1:
            import torch

            torch.distributed.barrier()

    def agree(self, value: Any) -> Any:
        """What the first process says, in all of them."""
        if self.processes == 1:
            return value
        import torch

        told = [value]
        torch.distributed.broadcast_object_list(told)
        return told[0]

    def leave(self) -> None:
        """End the group of processes, when nothing is left to do together."""
        if self.processes > 1:
            import torch

            torch.distributed.destroy_process_group()


def launched_processes() -> int:
    """How many processes a launcher started to work together; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether a launcher started several processes to work together."""
    return launched_processes() > 1


def join_processes(device: str) -> ProcessGroup:
    """The team that the launcher made; alone without one.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``: where they will train.
    """
    if not launched():
        return ProcessGroup()
    from depthprobe.training.distributed import join

    state = join(device)
    return ProcessGroup(int(state.process_index), int(state.num_processes))
