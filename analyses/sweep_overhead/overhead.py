"""What a sweep costs beside its trials: seconds that are not training or evaluation.

    python analyses/sweep_overhead/overhead.py [--trials 10] [--epochs 30] [--jobs 1]

A sweep of so many equal trainings (the embedded log, two blocks of the embedded backbone, item
vectors that are learnt), as a user runs it: imports, workers, tables and report are in it. The
timing of all depths is a measurement that the user asks for, and stands apart.
"""

# ruff: noqa: S603 - it runs itself
from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from depthprobe.cli import main as depthprobe
from depthprobe.sweep import worker
from depthprobe.training.checkpoint import Checkpoint

STUDY = """
name = "overhead"
layers = "2"
methods = ["finetune"]
seeds = {trials}
device = "cpu"
item_table = "learned"
[data]
source = "embedded"
[backbone]
source = "embedded"
[recipe]
epochs = {epochs}
patience = {epochs}
"""
TOLD = "ENGINE_SECONDS"  # the file that children write their seconds to


def main() -> None:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    study, told = folder / "study.toml", folder / "seconds.txt"
    study.write_text(STUDY.format(trials=options.trials, epochs=options.epochs))
    command = [sys.executable, __file__, "sweep", str(study), "--output", str(folder / "run")]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--jobs", str(options.jobs)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, TOLD: str(told)},
    )
    trials, at = list[float](), dict[str, float]()
    assert process.stderr is not None  # noqa: S101
    for line in process.stderr:
        now = time.perf_counter() - began
        if found := re.search(r"\[\d+/\d+\] .* done  ([\d.]+) s", line):
            trials.append(float(found[1]))
            at["last trial"] = now
        for name in ("timing every depth", "every depth is timed", "trials to run"):
            if name in line:
                at[name] = now
    if process.wait() or len(trials) != options.trials:
        sys.exit(f"the sweep did not end well; see {folder}")
    wall = time.perf_counter() - began
    inside = Counter[str]()
    for line in told.read_text().splitlines():
        name, seconds = line.split()
        inside[name] += float(seconds)
    timing = at["every depth is timed"] - at["timing every depth"]
    work = sum(trials) / options.jobs
    before = at["trials to run"] - timing
    between = at["last trial"] - at["trials to run"] - work
    after = wall - at["last trial"]
    written = sum(inside.values()) / options.jobs
    spent = before + between + after + written
    print(f"{options.trials} trials of {statistics.median(trials):.1f} s (median), load", end=" ")
    print(f"{os.getloadavg()[0]:.1f} at the end; timing of all depths, apart: {timing:.1f} s")
    print(f"sweep without it: {wall - timing:.1f} s, of these")
    print(f"  before the plan (imports, log, backbone): {before:.1f} s")
    print(f"  workers begin, and between trials: {between:.1f} s")
    print(
        f"  in trials, checkpoints {inside['write']:.2f} s, records {inside['write_result']:.2f} s"
    )
    print(f"  tables and report: {after:.1f} s")
    print(f"in all {spent:.1f} s, {spent / (wall - timing):.2%}")
    print(f"without what comes once: {written / (wall - timing):.2%}")


def _timed(action: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and its seconds go to the file."""

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = action(*given, **named)
        with Path(os.environ[TOLD]).open("a") as file:
            file.write(f"{action.__name__} {time.perf_counter() - began}\n")
        return found

    return timed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1)
    return parser.parse_args()


if TOLD in os.environ:  # a sweep, or a worker of it
    Checkpoint.write = _timed(Checkpoint.write)  # type: ignore[method-assign]
    worker.write_result = _timed(worker.write_result)  # type: ignore[attr-defined]

if __name__ == "__main__":
    if TOLD in os.environ:
        depthprobe()
    main()
