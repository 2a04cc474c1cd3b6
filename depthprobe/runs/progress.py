"""What a sweep tells whoever watches it: the plan, where it is, each trial as it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Progress(Protocol):
    """Receives a sweep's events; nothing of it may raise or take long."""

    def plan(self, trials: Sequence[str]) -> None:
        """The trials that will run now, in order; those already complete are not among them."""

    def message(self, text: str) -> None:
        """What is being done right now, one short line."""

    def done(self, trial: str, status: str, seconds: float, note: str) -> None:
        """A trial ended: ``done`` or ``failed``, after so many seconds, its result or error."""


class Silent:
    """Progress that nobody watches."""

    def plan(self, trials: Sequence[str]) -> None:
        """Ignore the plan."""

    def message(self, text: str) -> None:
        """Ignore the message."""

    def done(self, trial: str, status: str, seconds: float, note: str) -> None:
        """Ignore the end of a trial."""
