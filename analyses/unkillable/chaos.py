"""Kill sweeps at random moments, damage what they left, and compare with a sweep in peace.

    python analyses/unkillable/chaos.py [--kills 30] [--seed 0] [--folder DIR]

Whatever is not as it should be ends the script with an error.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from damage import damages
from kills import in_peace, one, two
from sweeps import TASKS, write_study

from depthprobe.runs.store import open_run


def main() -> None:
    options = _options()
    draw = random.Random(options.seed)  # noqa: S311 - no secret
    folder = options.folder or Path(tempfile.mkdtemp(prefix="unkillable-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    study = write_study(folder)
    life = in_peace(study, folder / "quiet")
    spent = f"{life.before:.0f} + {life.workers:.0f} + {life.tasks:.0f} + {life.after:.0f} s"
    _say(f"in peace: plan, workers, {TASKS} tasks, tables and report in {spent}", began)
    quiet = open_run(folder / "quiet")
    if options.kills:
        _say(f"one sweep: {one(study, folder, quiet, life, options.kills, draw)}", began)
        _say(f"two at a time: {two(study, folder, quiet, life, options.kills // 3, draw)}", began)
    for told in damages(study, folder, quiet):
        _say(told, began)


def _say(text: str, began: float) -> None:
    print(f"{time.perf_counter() - began:5.0f} s  {text}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of one sweep; 0: damage alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new folder; default: a temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
