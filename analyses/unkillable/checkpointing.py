"""The `depthprobe` command, but a training leaves a checkpoint after each step, not each minute.

So a kill finds one, though the trainings here take seconds. Workers import this file, too.
"""

from __future__ import annotations

import os
import select
import time

from depthprobe.cli import main
from depthprobe.training.checkpoint import Checkpoint

Checkpoint.is_due = lambda self: True  # type: ignore[method-assign]

if "faketime" in os.environ.get("LD_PRELOAD", ""):
    # under it Python's sleep is an invalid argument, unless the monotonic clock is faked, too
    time.sleep = lambda seconds: select.select([], [], [], seconds) and None  # type: ignore[assignment]

if __name__ == "__main__":
    main()
