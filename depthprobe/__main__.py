"""``python -m depthprobe`` is the command line."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import depthprobe

# Python puts the current folder first: a file there would be taken for a module. It stays where
# the package itself comes from it.
with suppress(OSError):
    if sys.path[0] == os.getcwd() != os.path.dirname(depthprobe.__path__[0]):
        del sys.path[0]

from depthprobe.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
