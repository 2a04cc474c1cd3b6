"""SLMRec's headline: 32 blocks of a 7B Llama against 8 and 4, in its padded layout and in ours.

    python analyses/cost_curve/measure.py --device cuda [--lengths full]

Random weights of Llama 2 7B's shape in bfloat16, low-rank updates (r = 16) of the MLP projections,
frozen items of 128 numbers, one target a user. Training: a step for each 128 users, in as large
parts as fit. Inference: 128 users at a time and one at a time, from histories to the best ten of
12,101 items. Both layouts and all depths in one process, in turn. Writes
`<device>-<backbone>-<lengths>.csv`, and `.json` with the raw times, beside this script.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from layouts import ITEMS, PROMPT, SIDES, SUFFIX, answers, batches_of, draw_users, side, steps
from layouts import recommender as make_recommender
from transformers import PreTrainedModel

from depthprobe.cost.size import peak_memory
from depthprobe.cost.table import random_backbone
from depthprobe.cost.timing import Action, machine, measure, summarize, times_faster
from depthprobe.files import write_json
from depthprobe.models.backbones import backbone_config
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.precision import resolve_device

HERE = Path(__file__).parent
TASKS = ("train", "answer", "one")
ONES = 16  # users that are answered one at a time
PUBLISHED = {("train", 4): 6.6, ("answer", 4): 8.0}  # SLMRec, table of efficiency, one A100


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device = resolve_device(options.device)
    config = backbone_config(options.config)
    backbone = random_backbone(config, options.dtype, device)
    blocks = int(config.num_hidden_layers)
    depths = sorted({*map(int, options.depths.split(",")), blocks}, reverse=True)
    users = draw_users(options.users, options.lengths)
    parts = {name: _largest_part(backbone, name, users, options, device) for name in SIDES}
    here = machine(device)
    print(f"{here['device_name']}: parts of {parts} users in a training step", flush=True)
    timing = measure(
        lambda _: _actions(backbone, depths, users, options, parts, device),
        batch=1,
        seconds=math.inf,
        warmup=options.warmup,
        rounds=options.rounds,
        device=device,
    )
    seconds = timing.seconds
    difference = _difference(backbone, min(depths), users, device)
    extras = _memory(backbone, depths, users, options, parts, device)
    conditions = {
        **here,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "backbone": Path(options.config).name,
        "slots": f"{PROMPT} + {ITEMS} + {SUFFIX}",
        "lengths": options.lengths,
        "users": options.users,
        "batch": options.batch,
        "difference": difference,
    }
    table = _table(seconds, extras, depths, parts, options).assign(**conditions)
    _write(table, seconds, conditions, Path(options.output))
    _show(table)


def _actions(
    backbone: PreTrainedModel,
    depths: Sequence[int],
    users: list[np.ndarray],
    options: argparse.Namespace,
    parts: dict[str, int],
    device: torch.device,
) -> dict:
    """Every task of every layout at every depth; models of their own, as their modes differ."""
    actions = {}
    for depth in depths:
        for name in SIDES:
            trained = [user[:-1] for user in users]  # the last item is the test's
            batches = list(batches_of(trained, name, options.batch, device, part=parts[name]))
            actions[f"train:{name}:{depth}"] = Action(steps(_side(backbone, name, depth), batches))
            serving = _side(backbone, name, depth)
            many = [part for (part,) in batches_of(users, name, options.batch, device)]
            actions[f"answer:{name}:{depth}"] = Action(answers(serving, many))
            ones = [part for (part,) in batches_of(users[:ONES], name, 1, device)]
            actions[f"one:{name}:{depth}"] = Action(answers(serving, ones))
    return actions


def _side(backbone: PreTrainedModel, name: str, depth: int):
    return side(name, make_recommender(backbone, depth))


def _largest_part(
    backbone: PreTrainedModel,
    name: str,
    users: list[np.ndarray],
    options: argparse.Namespace,
    device: torch.device,
) -> int:
    """How many users of a batch can be trained at once at the whole depth: half and half again."""
    blocks, part = int(backbone.config.num_hidden_layers), options.batch
    longest = sorted(users, key=len)[-options.batch :]  # the batch that takes most
    while part > 1 and not _fits(backbone, name, blocks, longest, part, device):
        part //= 2
    return part


def _fits(
    backbone: PreTrainedModel,
    name: str,
    depth: int,
    users: list[np.ndarray],
    part: int,
    device: torch.device,
) -> bool:
    """Whether a step leaves a seventh of the GPU for what else is there; elsewhere, always."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    batches = list(batches_of(users, name, len(users), device, part=part))
    step = steps(_side(backbone, name, depth), batches)
    try:
        with peak_memory(device) as peak:
            step()
    except torch.OutOfMemoryError:
        return False
    return peak["reserved"] < 6 / 7 * torch.cuda.get_device_properties(device).total_memory


@torch.inference_mode()
def _difference(
    backbone: PreTrainedModel, depth: int, users: list[np.ndarray], device: torch.device
) -> float:
    """The largest difference of both layouts' user vectors, of the largest number in them."""
    model = make_recommender(backbone, depth).eval()
    ((batch,),) = batches_of(users[:32], "padded", 32, device)
    old, new = (side(name, model).encode(batch) for name in SIDES)
    return float((old - new).abs().max() / old.abs().max())


def _memory(
    backbone: PreTrainedModel,
    depths: Sequence[int],
    users: list[np.ndarray],
    options: argparse.Namespace,
    parts: dict[str, int],
    device: torch.device,
) -> dict:
    """Peaks of both layouts, at each depth alone; the backbone is cut to them."""
    found = {}
    first = [user[:-1] for user in users][: options.batch]
    for depth in depths:  # from the deepest on
        keep_blocks(backbone, range(depth))
        for name in SIDES:
            batches = list(batches_of(first, name, options.batch, device, part=parts[name]))
            train = steps(_side(backbone, name, depth), batches)
            train()  # AdamW's moments
            ((batch,),) = batches_of(users[: options.batch], name, options.batch, device)
            answer = answers(_side(backbone, name, depth), [batch])
            for task, action in (("train", train), ("answer", answer)):
                with peak_memory(device) as peaks:
                    action()
                row = {f"{kind}_bytes": value for kind, value in peaks.items()}
                found[task, name, depth] = row
            del train, answer
    return found


def _table(
    seconds: dict[str, list[float]],
    extras: dict,
    depths: Sequence[int],
    parts: dict[str, int],
    options: argparse.Namespace,
) -> pd.DataFrame:
    """A row for each task, layout and depth; ratios are paired by round."""
    whole, rows = depths[0], []
    for task in TASKS:
        count = ONES if task == "one" else options.users
        for name in SIDES:
            for depth in depths:
                own = seconds[f"{task}:{name}:{depth}"]
                ms = summarize([1000 * value / count for value in own])
                row = {"task": task, "layout": name, "depth": depth, "ms_per_user": ms.p50}
                row |= {"p90": ms.p90, "low": ms.low, "high": ms.high, "n": ms.n}
                bases = {"times_full": f"{task}:{name}:{whole}", "times_paper": _paper(task, whole)}
                for ratio, base in bases.items():
                    found = times_faster(seconds[base], own)
                    row |= {ratio: found.p50}
                    row |= {f"{ratio}_low": found.low, f"{ratio}_high": found.high}
                row["published"] = PUBLISHED.get((task, depth)) if name == "padded" else None
                row["part"] = parts[name] if task == "train" else None
                rows.append(row | extras.get((task, name, depth), {}))
    return pd.DataFrame(rows)


def _paper(task: str, whole: int) -> str:
    """What everything is compared with: the whole depth in the papers' layout."""
    return f"{task}:padded:{whole}"


def _write(
    table: pd.DataFrame, seconds: dict[str, list[float]], conditions: dict, folder: Path
) -> None:
    words = " ".join(conditions[name] for name in ("device_name", "backbone", "lengths")).lower()
    name = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False)
    write_json(folder / f"{name}.json", {"conditions": conditions, "seconds": seconds})


def _show(table: pd.DataFrame) -> None:
    """The README's table."""
    print("| task | layout | blocks | ms a user | times faster | than the paper's | published |")
    print("|---|---|---|---|---|---|---|")
    for row in table.to_dict(orient="records"):
        published = "" if pd.isna(row["published"]) else f"{row['published']}x"
        ratios = [
            f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
            for name in ("times_full", "times_paper")
        ]
        cells = [row["task"], row["layout"], row["depth"], f"{row['ms_per_user']:.4g}", *ratios]
        print("| " + " | ".join(map(str, [*cells, published])) + " |")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--config", default=str(HERE / "llama-2-7b"), help="a folder's config.json")
    parser.add_argument("--dtype", default="auto", help="of the blocks; auto: the configuration's")
    parser.add_argument("--depths", default="8,4")
    parser.add_argument("--lengths", choices=("beauty", "full"), default="beauty")
    parser.add_argument("--users", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default=str(HERE))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
