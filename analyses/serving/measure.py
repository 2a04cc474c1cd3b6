"""What serving costs beside the bare model, its memory, and whether users should leave early.

    python analyses/serving/measure.py speed DIR
    python analyses/serving/measure.py memory DIR
    python analyses/serving/measure.py exits RUN TRIAL [METHOD ...]

The ways take turns, after a turn that is not counted; medians of ratios within a turn, in CPU
seconds of one thread, so that other work on the machine matters less. Memory is the peak of a
process of its own. ``exits`` reads the test users of a run and compares early exit of users, at
every strictness, with a fixed depth for all: of TRIAL's own blocks, and of other methods' trials.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depthprobe.cli.recommend import count_left, histories, recommendations, writer
from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import ratio_interval
from depthprobe.models.build import cut_copy
from depthprobe.models.exits import LIST, Exit, read_outs
from depthprobe.models.export import BATCH, ExportedRecommender, load_recommender
from depthprobe.probing.exits import exit_places, read_out_users
from depthprobe.runs.context import Context
from depthprobe.runs.export import export_trial
from depthprobe.runs.layout import machine as this_machine
from depthprobe.runs.store import open_run
from depthprobe.study import Data

TURNS, USERS = 3, 512
Ways = dict[str, Callable[[], object]]


def main() -> None:
    """Measure what the first argument says."""
    torch.set_num_threads(1)
    machine = this_machine(torch.device("cpu"))
    print(f"{machine.cpu}, 1 thread of {machine.cores} cores, torch {torch.__version__}")
    what, *given = sys.argv[1:]
    {"speed": show_speed, "memory": show_memory, "exits": show_exits}[what](*given)


def timed(ways: Ways) -> dict[str, list[float]]:
    """CPU seconds of each way in each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            took = time.process_time() - began
            seconds[name] += [took] * bool(turn)
    return seconds


def show_speed(folder: str) -> None:
    """Users a second of the bare encoding, of Python, and of the command by what it writes."""
    model: Any = load_recommender(folder)
    with tempfile.TemporaryDirectory() as place:
        ways: Ways = {}
        for form, suffix in (("lines", ".tsv"), ("csv", ".parquet")):
            source = Path(place, f"users.{form}")
            write_histories(source, model.item_ids, USERS)
            read = partial(histories, source, source, Data(source=str(source)), model)
            own = [list(items) for _, _, items in read()()]
            if not ways:
                ways["encode alone"] = partial(encode, model, own)
                ways["recommend, in Python"] = partial(model.recommend, own)
            output = Path(place, f"answers{suffix}")
            ways[f"{form} to {suffix}"] = partial(command, model, read, source, output)
        seconds = timed(ways)
    bare = np.array(seconds["encode alone"])
    for name, own in seconds.items():
        rate, share = USERS / np.median(own), np.median(bare / np.array(own))
        print(f"{name:24s} {rate:8,.0f} users/s {100 * share:6.1f} %")


def write_histories(path: Path, ids: list[str], users: int) -> None:
    """Users of 1 to 39 random items: a line each, or a log of an interaction a row."""
    draw = random.Random(0)  # noqa: S311 - no secrets are made
    with path.open("w", encoding="utf-8") as file:
        if path.suffix == ".csv":
            file.write("user_id,item_id,timestamp\n")
        for user in range(users):
            had = draw.choices(ids, k=draw.randint(1, 39))
            if path.suffix == ".csv":
                rows = enumerate(had, start=1_700_000_000)
                file.writelines(f"u{user},{item},{time}\n" for time, item in rows)
            else:
                file.write(f"u{user} {' '.join(had)}\n")


@torch.inference_mode()
def encode(model: ExportedRecommender, users: list[list[str]]) -> None:
    """What no server can leave out: user vectors, in batches of like length."""
    known = [np.array([model.numbers[item] for item in items]) for items in users]
    order = sorted(known, key=lambda items: min(len(items), model.max_history), reverse=True)
    own: Any = model.model
    prompt = own.prepare_prompt()
    for first in range(0, len(order), BATCH):
        own.encode(*model._padded(order[first : first + BATCH]), prompt)


def command(
    model: ExportedRecommender, read: Callable[[], Any], source: Path, output: Path
) -> None:
    """All that the command does once the model is loaded."""
    again = read()
    count_left(again, source, model, top=10, unknown=False)
    with writer(output, output.suffix) as write:
        for part in recommendations(again, model, top=10):
            write(part)


def show_memory(folder: str) -> None:
    """The peak of the command at ten thousand and a hundred thousand users."""
    ids = load_recommender(folder).item_ids
    with tempfile.TemporaryDirectory() as place:
        for form, suffix in (("txt", ".tsv"), ("csv", ".parquet")):
            for users in (10_000, 100_000):
                source, output = Path(place, f"users.{form}"), Path(place, f"out{suffix}")
                write_histories(source, ids, users)
                words = ["recommend", folder, "--history", str(source), "--output", str(output)]
                began = time.monotonic()
                whole = [sys.executable, "-m", "depthprobe", *words]
                with subprocess.Popen(whole) as process:  # noqa: S603 - our own command
                    _, status, used = os.wait4(process.pid, 0)
                    process.returncode = status
                took = time.monotonic() - began
                peak = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
                name = f"{form} to {suffix}, {users:,} users"
                print(f"{name:36s} {peak:6.0f} MiB {took:6.0f} s, status {status}", flush=True)


def show_exits(run_path: str, trial: str, *methods: str) -> None:
    """Mean depth, time and accuracy of each rule, beside those of fixed depths."""
    run = open_run(run_path)
    context = Context(run.path, run.study)
    metric, level = run.study.protocol.metric, run.study.protocol.level
    with tempfile.TemporaryDirectory() as place:
        loaded = load_recommender(export_trial(run.path, trial, Path(place, "model")))
    model: Any = loaded.model
    users = context.eval_set("test")
    ranks, kept = read_out_users(model, users, device=torch.device("cpu"))
    values, depths = per_user_metric(ranks, metric), np.array(read_outs(model.depth))
    raw = [[loaded.item_ids[item - 1] for item in had] for had in users.seen or users.histories]
    raw = raw[: USERS // 2]  # for the times
    rows: dict[str, tuple[float, np.ndarray]] = {}
    ways: Ways = {}
    for place_, depth in enumerate(depths.tolist()):
        cut = (
            loaded if depth == model.depth else replace(loaded, model=cut_copy(model, range(depth)))
        )
        rows[f"{trial}, first {depth} blocks"] = float(depth), values[:, place_]
        ways[f"{trial}, first {depth} blocks"] = partial(cut.recommend, raw)
    for method in methods:  # trained, and as fast as TRIAL's own first blocks
        for record in run.records:
            if record.method == method and record.depth < model.depth:
                table = run.users[run.users["trial"] == record.id]
                table = table[table["protocol"] == "full"].set_index("user")
                own = per_user_metric(table.loc[users.users, "rank"].to_numpy(), metric)
                rows[record.id] = float(record.depth), own
    for same in (10, 9, 8, 7, 6, 4, 0):
        places = exit_places(kept, same)
        own = values[np.arange(len(places)), places]
        rule = Exit(same=same, metric=metric, margin=0, level=level, users=1, depth=0, kept=1)
        name = f"early exit, {same} of {LIST} stay"
        rows[name] = float(depths[places].mean()), own
        ways[name] = partial(replace(loaded, exit=rule).recommend, raw, exit=True)
    seconds, full = timed(ways), values[:, -1]
    whole = np.array(seconds[f"{trial}, first {model.depth} blocks"])
    print(f"\n{len(values)} test users, {metric} of {trial} {full.mean():.4f}\n")
    print(f"| | mean depth | share of its time | share of its {metric} | {level:.0%} interval |")
    print("|---|---:|---:|---:|---|")
    for name, (depth, own) in rows.items():
        ratio = ratio_interval(own, full, level=level)
        took = f"{np.median(np.array(seconds[name]) / whole):.2f}" if name in seconds else ""
        ends = f"{ratio.low:.3f} to {ratio.high:.3f}"
        print(f"| {name} | {depth:.2f} | {took} | {ratio.value:.3f} | {ends} |")


if __name__ == "__main__":
    main()
