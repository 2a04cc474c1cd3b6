"""Time and memory of ranking a large catalogue, of lists beside ranks, and of intervals.

    python analyses/evaluation_speed/measure.py [RUN]

Each way takes its turn in every round, after a round that is not counted; ratios are medians over
rounds, so that what slows a whole round down cancels. Memory is the peak of a process of its own.
With a run's folder, also how long its tables take to write and to open; of a copy.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from depthprobe.evaluation.metrics import TOP
from depthprobe.evaluation.ranks import CHUNK_BYTES, EvalSet, evaluate, rank_users
from depthprobe.evaluation.statistics import difference_interval, mean_interval, ratio_interval
from depthprobe.models.sasrec import SASRec
from depthprobe.runs.layout import machine as this_machine
from depthprobe.runs.store import open_run, write_tables

MEMORY = "memory"
UNIT = 1 if sys.platform == "darwin" else 1024  # of the peak that the system tells
MATMUL, RANKS, LISTS = "the bare matmul, in chunks", "ranks", "ranks and top-10 lists"


def main() -> None:
    """Measure ranking, then evaluation, then intervals, then a run's tables."""
    machine = this_machine(torch.device("cpu"))
    print(f"{machine.cpu}, {machine.cores} cores, torch {torch.__version__}\n")
    show_memory()  # first: a new process begins with the peak of the one that starts it
    show_ranking(users=512, items=1_000_000, width=128, rounds=9)
    show_ranking(users=2048, items=12_101, width=64, rounds=31)
    show_evaluation()
    show_intervals()
    for run in sys.argv[1:]:
        show_tables(Path(run))


def show_ranking(*, users: int, items: int, width: int, rounds: int) -> None:
    """Ranks against the product that they need at least."""
    vectors, table, targets = make(users, items, width)
    seen = [np.random.default_rng(user).integers(1, items + 1, 20) for user in range(users)]
    ways: dict[str, Callable[[], object]] = {
        MATMUL: lambda: matmul(vectors, table),
        RANKS: lambda: rank_users(vectors, table, targets, seen=seen),
        LISTS: lambda: rank_users(vectors, table, targets, seen=seen, top=TOP),
    }
    wall, cpu = timed(ways, rounds)
    print(
        f"| {users} users, {items:,} items, {width} wide | wall s | CPU s | of the matmul's CPU |"
    )
    print("|---|---|---|---|")
    for name in ways:
        ratio = statistics.median(a / b for a, b in zip(cpu[name], cpu[MATMUL], strict=True))
        print(
            f"| {name} | {statistics.median(wall[name]):.3f} | {statistics.median(cpu[name]):.3f}"
            f" | {ratio:.2f} |",
            flush=True,
        )
    print()


def matmul(vectors: torch.Tensor, table: torch.Tensor) -> None:
    """All scores, in the chunks of the ranking and into memory that is used again."""
    size = max(1, CHUNK_BYTES // (4 * (len(table) - 1)))
    room = torch.empty(min(size, len(vectors)), len(table) - 1)
    for part in vectors.split(size):
        torch.mm(part, table[1:].T, out=room[: len(part)])


def show_memory() -> None:
    """Peak memory of ranking a million items, with lists, and of its imports and inputs alone."""
    print("| 512 users, 1,000,000 items, 128 wide | peak GB |\n|---|---|")
    for name in ("imports", "imports and inputs", RANKS, LISTS):
        command = [sys.executable, __file__, MEMORY, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        print(f"| {name} | {float(done.stdout):.2f} |", flush=True)
    print()


def peak(name: str) -> None:
    """Do one thing, and print the peak of this process in GB."""
    if name != "imports":
        vectors, table, targets = make(512, 1_000_000, 128)
        if name != "imports and inputs":
            rank_users(vectors, table, targets, top=TOP if name == LISTS else 0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / 1e9)


def show_evaluation(users: int = 2048, items: int = 12_101) -> None:
    """The smallest model there is, so that what lists cost shows most."""
    torch.manual_seed(0)
    model = SASRec(items, width=64, blocks=2, heads=2, drop=0.0, longest=50).eval()
    draw = np.random.default_rng(0)
    histories = [draw.integers(1, items + 1, draw.integers(3, 20)) for _ in range(users)]
    asked = EvalSet(
        users=np.arange(users),
        histories=histories,
        targets=draw.integers(1, items + 1, users),
        seen=histories,
        negatives=draw.integers(1, items + 1, (users, 999)),
    )
    device = torch.device("cpu")
    ways: dict[str, Callable[[], object]] = {
        RANKS: lambda: evaluate(model, asked, device=device),
        LISTS: lambda: evaluate(model, replace(asked, lists=True), device=device),
    }
    wall, cpu = timed(ways, rounds=15)
    print(f"| SASRec, {users} users, {items:,} items, both protocols | wall s | CPU s |")
    print("|---|---|---|")
    for name in ways:
        medians = (statistics.median(each[name]) for each in (wall, cpu))
        print("| {} | {:.3f} | {:.3f} |".format(name, *medians), flush=True)
    print()


def show_intervals(users: int = 300_000) -> None:
    """NDCG@10 of a teacher and a model with the same users and three seeds."""
    values = np.random.default_rng(0).random((2, 3, users))
    ways: dict[str, Callable[[], object]] = {
        "mean": lambda: mean_interval(values[0]),
        "paired difference": lambda: difference_interval(*values),
        "paired ratio": lambda: ratio_interval(*values),
    }
    print(f"| intervals of {users:,} users, 3 seeds | wall s | CPU s |\n|---|---|---|")
    for name, way in ways.items():
        wall, cpu = time.perf_counter(), time.process_time()
        way()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"| {name} | {wall:.3f} | {cpu:.3f} |", flush=True)
    print()


def show_tables(path: Path) -> None:
    """Write the tables of a run anew, then open them."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(path, Path(folder, "run"))
        began = time.perf_counter(), time.process_time()
        run = open_run(copy)
        write_tables(run)
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        trials, users = len(run.trials), len(run.slices)
        print(f"| {trials:,} trials, {users:,} users, {len(run.metrics):,} rows | wall s | CPU s |")
        print(f"|---|---|---|\n| write the tables | {wall:.2f} | {cpu:.2f} |")
        began = time.perf_counter(), time.process_time()
        _ = open_run(copy).metrics
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        print(f"| open the metrics | {wall:.2f} | {cpu:.2f} |\n")


def make(users: int, items: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """User vectors, items with padding before them, and targets."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(users, width, generator=draw)
    table = torch.randn(items + 1, width, generator=draw)
    return vectors, table, torch.randint(1, items + 1, (users,), generator=draw)


def timed(
    ways: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of each way in each round."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter(), time.process_time()
            way()
            ended = time.perf_counter(), time.process_time()
            if number:
                wall[name].append(ended[0] - began[0])
                cpu[name].append(ended[1] - began[1])
    return wall, cpu


if __name__ == "__main__":
    if sys.argv[1:2] == [MEMORY]:
        peak(sys.argv[2])
    else:
        main()
