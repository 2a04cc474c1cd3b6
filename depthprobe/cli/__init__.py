"""The command line: one thin module per command. Importing it does not import torch."""

from __future__ import annotations

from depthprobe.cli.app import main

__all__ = ["main"]
