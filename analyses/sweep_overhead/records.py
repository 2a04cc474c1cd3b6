"""How long a run of 10,000 records takes to open, and to be found finished.

    depthprobe sweep --methods popularity,sasrec,full,finetune,heal,distill,random-init --seeds 1 \
        --output runs/one
    python analyses/sweep_overhead/records.py runs/one [--records 10000] [--folder DIR]

The trials of the finished run stand for those of other seeds, until there are so many; weights
are left out. Each figure is of a process of its own, imports apart; medians of rounds.
"""

# ruff: noqa: S603 - it runs itself
from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from depthprobe.files import write_json
from depthprobe.runs.records import MANIFEST, STUDY, TABLES
from depthprobe.runs.store import Run, open_run
from depthprobe.study import load_study, study_to_toml

LARGE = 60.0  # seconds after which a measurement is not repeated


def main() -> None:
    options = _options()
    if options.action:
        _measure(options.action, options.run)
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="records-"))
    run = _many(options.run, folder / "run", options.records)
    opened = open_run(run)
    print(f"{len(opened.records)} records, {opened.manifest.data.users} users", flush=True)
    _row("sweep", run, 1)  # which writes the tables
    for action in ("trials", "metrics", "continue"):
        _row(action, run, options.rounds)
    for name in TABLES:
        (run / name).unlink()
    for action in ("trials", "metrics"):
        _row(action, run, options.rounds, "tables deleted: ")


def _many(source: Path, run: Path, wanted: int) -> Path:
    """A run of as many seeds as make so many records."""
    study = load_study(source / STUDY)
    shutil.copytree(source, run, ignore=shutil.ignore_patterns("model", "figures", "logs", *TABLES))
    own = [path for path in (run / "trials").iterdir() if path.name != "popularity-s0"]
    seeds = -(-(wanted - 1) // len(own))
    for folder in own:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        for seed in range(1, seeds):
            name = f"{record['id'].removesuffix('-s0')}-s{seed}"
            place = Path(shutil.copytree(folder, folder.with_name(name)))
            write_json(place / "record.json", record | {"id": name, "seed": seed})
    many = replace(study, seeds=seeds)
    (run / STUDY).write_text(study_to_toml(many), encoding="utf-8")
    manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    write_json(run / MANIFEST, manifest | {"study_hash": many.digest()})
    return run


def _row(action: str, run: Path, rounds: int, note: str = "") -> None:
    """Print what an action takes, in processes of its own."""
    seconds, work = list[float](), list[float]()
    while len(seconds) < rounds and sum(seconds) < LARGE:
        command = [sys.executable, __file__, str(run), "--action", action]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        wall, processor = map(float, told.stdout.split()[-2:])
        seconds.append(wall)
        work.append(processor)
    spread = f"{min(seconds):.2f}-{max(seconds):.2f}, {len(seconds)} times"
    print(f"{note}{action}: {statistics.median(seconds):.2f} s ({spread})", end="; ")
    print(f"of the processor {statistics.median(work):.2f} s", flush=True)


def _measure(action: str, folder: Path) -> None:
    actions: dict[str, Callable[[Run], object]] = {
        "trials": lambda run: run.trials,
        "metrics": lambda run: run.metrics,
        "sweep": _sweep,
        "continue": _sweep,
    }

    began, worked = time.perf_counter(), time.process_time()
    actions[action](open_run(folder))
    print(time.perf_counter() - began, time.process_time() - worked)


def _sweep(run: Run) -> None:
    """A sweep that finds nothing left to do."""
    from depthprobe.runs.sweep import run_sweep

    run_sweep(run.study, run.path, jobs=0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a new folder; default: a temporary one")
    parser.add_argument("--action", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
