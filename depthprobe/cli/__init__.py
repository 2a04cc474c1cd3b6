"""The command line: one thin module a command; importing it imports no torch."""

from __future__ import annotations

from depthprobe.cli.app import main

__all__ = ["main"]
