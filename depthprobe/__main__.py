"""``python -m depthprobe`` is the command line."""

from __future__ import annotations

from depthprobe.cli import main

if __name__ == "__main__":
    main()
