"""``python -m depthprobe`` is the command line."""

from __future__ import annotations

import sys

import depthprobe

# Python puts the current folder first: a file there would be taken for a module. It stays where
# the package itself comes from it.
if not sys.flags.safe_path and not depthprobe.__path__[0].startswith(f"{sys.path[0]}/"):
    del sys.path[0]

from depthprobe.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
