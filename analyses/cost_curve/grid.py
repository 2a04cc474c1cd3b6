"""Llama 2 7B's shape at every depth, in the papers' layout and in ours: time, memory, energy.

    python analyses/cost_curve/grid.py --device cuda [--seconds 200]

A case is a depth, a layout, a task and a batch, measured alone: no other block is in memory, at
least ten calls are not counted, then come at least thirty calls and one second. `padded` computes
61 prompt slots, 30 items and 8 response slots for every user and trains one target a user;
`shared` computes the prompt once and trains every position. Every history has 30 items, so the
papers' layout pads nothing. Weights are random, in bfloat16; what is trained are low-rank updates
(r = 16) of the MLPs and the adapters, as in SLMRec: with AdamW of all 7B there is no room beside.

The saturating batch is the smallest with 95 % of the highest rate that doubling finds, at the full
depth. Writes `grid.csv` and `grid.json`, with the raw times, after every case.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from layouts import ITEMS, PROMPT, RANK, SIDES, SUFFIX, draw_users, recommender, side, steps
from transformers import PreTrainedModel

from depthprobe.cost.size import peak_memory
from depthprobe.cost.table import random_backbone
from depthprobe.cost.timing import machine, seconds_of, summarize
from depthprobe.files import write_json
from depthprobe.models.backbones import backbone_config
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.precision import resolve_device
from depthprobe.training.objectives import make_batch

HERE = Path(__file__).parent
TASKS = ("encode", "train")
BATCHES = ("one", "saturating")
WARMUP, CALLS, LEAST = 10, 30, 1.0  # calls that don't count; that do, at least; their seconds
ENOUGH, MOST = 0.95, 1024  # of the highest rate; users in a batch
PUBLISHED = {("train", 4): 6.6, ("encode", 4): 8.0}  # SLMRec, table of efficiency, one A100
MISSING = "unavailable"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    end = time.perf_counter() + options.seconds
    device = resolve_device(options.device)
    config = backbone_config(options.config)
    depths = sorted(map(int, options.depths.split(",")), reverse=True)
    conditions = {
        **machine(device),
        "backbone": Path(options.config).name,
        "dtype": options.dtype if options.dtype != "auto" else str(config.dtype).split(".")[-1],
        "slots": f"{PROMPT} + {ITEMS} + {SUFFIX}",
        "tuning": f"lora, r = {RANK}, on the MLPs",
    }
    backbone = random_backbone(config, options.dtype, device)
    energy = energy_counter(device)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, list[float]] = {}
    rates: dict[str, dict[int, float]] = {}
    for depth in depths:
        keep_blocks(backbone, range(depth))
        for layout, task, kind in product(SIDES, TASKS, BATCHES):
            row: dict[str, Any] = {"task": task, "layout": layout, "blocks": depth, "batch": kind}
            rows.append(row)
            try:
                if time.perf_counter() > end:
                    row["state"] = "skipped: no time left"
                    continue
                users, key = 1, f"{task}:{layout}"
                if kind == "saturating":
                    if key not in rates:
                        rates[key] = dict(_rates(backbone, layout, task, options.longest))
                    users = saturating(rates[key])
                times, found = _case(backbone, layout, task, users, options.longest, energy)
                seconds[f"{key}:{depth}:{kind}"] = times
                row |= {"state": "measured", "users": users, **found}
            except Exception as error:  # the other cases can be measured all the same
                row["state"] = f"failed: {type(error).__name__}: {error}".partition("\n")[0]
            finally:
                print(_line(row), flush=True)
                _write(rows, seconds, rates, conditions, Path(options.output))


def _call(
    backbone: PreTrainedModel, layout: str, task: str, users: int
) -> tuple[Callable[[], object], int]:
    """The call of a case, and how many targets it has."""
    padded, depth, device = layout == "padded", backbone.config.num_hidden_layers, backbone.device
    model = recommender(backbone, depth, **({} if padded else {"suffix": ()}))
    chosen = side(layout, model)
    objective = "last" if padded else "every"
    batch = make_batch(draw_users(users, "full"), np.arange(users), device, objective)
    if task == "train":
        return steps(chosen, [[batch]]), batch.count
    model.eval()
    return torch.inference_mode()(lambda: chosen.encode(batch)), users


def _rates(
    backbone: PreTrainedModel, layout: str, task: str, longest: float
) -> Iterator[tuple[int, float]]:
    """Batches and their users a second, doubled until memory or time for a case runs out."""
    users, took = 1, 0.0
    while users <= MOST and took * (WARMUP + CALLS) < longest:
        try:
            call, _ = _call(backbone, layout, task, users)
            call()
            took = min(seconds_of(call, backbone.device) for _ in range(3))
        except torch.OutOfMemoryError:
            if users == 1:
                raise
            return
        yield users, users / took
        users *= 2


def saturating(rates: dict[int, float]) -> int:
    """The smallest batch that is nearly as fast, by users a second, as the fastest."""
    return min(users for users, rate in rates.items() if rate >= ENOUGH * max(rates.values()))


def _case(
    backbone: PreTrainedModel,
    layout: str,
    task: str,
    users: int,
    longest: float,
    energy: Callable[[], float],
) -> tuple[list[float], dict[str, Any]]:
    """Seconds of every counted call; time, peak memory and energy in the columns of the table."""
    device = backbone.device
    with peak_memory(device) as peak:
        call, targets = _call(backbone, layout, task, users)
        began, warmup = time.perf_counter(), 0
        while not warmup or (warmup < WARMUP and time.perf_counter() - began < longest / 2):
            seconds_of(call, device)
            warmup += 1
        times: list[float] = []
        before = energy()
        while len(times) < CALLS or sum(times) < LEAST:
            times.append(seconds_of(call, device))
            if time.perf_counter() - began > longest:
                break
        joules = (energy() - before) / len(times)
    ms = summarize([1000 * value for value in times])
    found = {"ms": ms.p50, "low": ms.low, "high": ms.high, "p90": ms.p90, "calls": ms.n}
    found |= {"warmup": warmup, "ms_per_user": ms.p50 / users, "ms_per_target": ms.p50 / targets}
    found |= {"users_per_second": 1000 * users / ms.p50}
    # a counter that stands still has measured nothing
    found |= {"joules_per_user": joules / users if joules > 0 else MISSING}
    return times, found | {f"{kind}_bytes": value for kind, value in peak.items()}


def energy_counter(device: torch.device) -> Callable[[], float]:
    """A function that reads the joules that a GPU has used so far; NaN where no counter is."""
    try:
        import pynvml

        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        gpu = pynvml.nvmlDeviceGetHandleByUUID(name)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except Exception as error:  # no NVML, or none that tells: time and memory can be had
        print(f"energy {MISSING}: {type(error).__name__}: {error}", flush=True)
        return lambda: math.nan
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000  # from millijoules


def _write(
    rows: list[dict[str, Any]],
    seconds: dict[str, list[float]],
    rates: dict[str, dict[int, float]],
    conditions: dict[str, Any],
    folder: Path,
) -> None:
    """The table with its ratios, and the raw times."""
    key = ("task", "layout", "blocks", "batch")
    cases = {tuple(row[name] for name in key): row for row in rows}
    whole, table = rows[0]["blocks"], []
    for (task, layout, blocks, kind), row in cases.items():
        ratios = {}
        for name, base in (("times_full", layout), ("times_paper", "padded")):
            full = cases.get((task, base, whole, kind), {}).get("ms_per_user", math.nan)
            ratios[name] = full / row.get("ms_per_user", math.nan)
        ratios["published"] = PUBLISHED.get((task, blocks)) if layout == "padded" else None
        table.append(row | ratios)
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(table).assign(**conditions).to_csv(folder / "grid.csv", index=False)
    content = {"conditions": conditions, "users_per_second": rates, "seconds": seconds}
    write_json(folder / "grid.json", content)


def _line(row: dict[str, Any]) -> str:
    name = f"{row['task']}, {row['layout']}, {row['blocks']} blocks, {row['batch']}"
    if row["state"] != "measured":
        return f"{name}: {row['state']}"
    return f"{name}: {row['users']} users, {row['ms_per_user']:.4g} ms a user, {row['calls']} calls"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--config", default=str(HERE / "llama-2-7b"), help="a folder's config.json")
    parser.add_argument("--dtype", default="auto", help="of the blocks; auto: the configuration's")
    parser.add_argument("--depths", default="1,2,4,8,16,32")
    parser.add_argument("--seconds", type=float, default=200, help="no case begins after them")
    parser.add_argument("--longest", type=float, default=12, help="seconds that a case may take")
    parser.add_argument("--output", default=str(HERE))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
