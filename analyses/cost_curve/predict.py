"""What a roofline predicts for the same comparison on a GPU that isn't here. Nothing is run.

    python analyses/cost_curve/predict.py [--gpu H100-SXM] [--lengths full]

FLOPs and bytes of the very batches that `measure.py` times, each phase at the datasheet's peak or
bandwidth, whichever takes longer. Writes `predicted-<gpu>-<lengths>.csv` beside this script.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from layouts import CATALOGUE, D_ITEM, ITEMS, PROMPT, SIDES, SUFFIX, batches_of, draw_users
from layouts import recommender as make_recommender

from depthprobe.cost.actions import plain_recommender, random_backbone
from depthprobe.cost.depths import Shape, depth_shapes
from depthprobe.cost.gpus import Roof, find_gpu
from depthprobe.cost.prediction import encode_seconds, score_seconds, train_seconds
from depthprobe.cost.shapes import product_counter
from depthprobe.cost.workload import Workload
from depthprobe.models.backbones import backbone_config

HERE = Path(__file__).parent
WORKLOAD = Workload(length=ITEMS, prompt=PROMPT, items=CATALOGUE, width=D_ITEM, tuning="lora")
META = torch.device("meta")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    roof, config = find_gpu(options.gpu), backbone_config(options.config)
    depths = sorted({*map(int, options.depths.split(",")), int(config.num_hidden_layers)})
    shapes = depth_shapes(config, depths, WORKLOAD)[::-1]  # the whole one first, as measured
    backbone = random_backbone(config, WORKLOAD, META)
    counts = {
        # a user alone: 99 slots of their own, or what stands behind the shared prompt
        "padded": product_counter(plain_recommender(backbone, replace(WORKLOAD, prompt=0))),
        "shared": product_counter(make_recommender(backbone, depths[-1])),
    }
    users = draw_users(options.users, options.lengths)
    rows = []
    for task in ("train", "answer", "one"):
        own = [user[:-1] for user in users] if task == "train" else users
        size = 1 if task == "one" else options.batch
        for name in SIDES:
            widths = [part.inputs.shape for (part,) in batches_of(own, name, size, META)]
            for shape in shapes:
                seconds = 0.0
                for (batch, width), times in Counter(map(tuple, widths)).items():
                    laid_out = _laid_out(shape, name, width, counts)
                    seconds += times * _seconds(laid_out, task, batch, roof)
                ms = 1000 * seconds / len(users)
                row = {"predicted_on": roof.name, "dtype": shape.dtype, "lengths": options.lengths}
                row |= {"task": task, "layout": name, "depth": shape.depth}
                rows.append(row | {"predicted_ms_per_user": ms})
    table = pd.DataFrame(rows)
    ms = table["predicted_ms_per_user"]
    group = table.groupby(["task", "layout"])["predicted_ms_per_user"]
    table["predicted_times_full"] = group.transform("first") / ms
    table["predicted_times_paper"] = (
        table.groupby("task")["predicted_ms_per_user"].transform("first") / ms
    )
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"predicted-{roof.name.lower()}-{options.lengths}.csv", index=False)
    _show(table)


def _laid_out(shape: Shape, name: str, width: int, counts: dict) -> Shape:
    """A depth's shape for a batch of this layout that is so many items wide."""
    if name == "padded":
        slots = PROMPT + ITEMS + SUFFIX
        flops = counts[name](slots).total(shape.depth)
        return replace(
            shape, positions=slots, flops_encode=flops, prompt_positions=0, flops_prompt=0
        )
    flops = counts[name](width).total(shape.depth)
    return replace(shape, positions=width + SUFFIX, flops_encode=flops)


def _seconds(shape: Shape, task: str, batch: int, roof: Roof) -> float:
    if task == "train":
        return train_seconds(shape, batch, roof, asked=1)
    return encode_seconds(shape, batch, roof) + score_seconds(shape, batch, roof)


def _show(table: pd.DataFrame) -> None:
    """The README's table."""
    print("| task | layout | blocks | predicted ms a user | times faster | than the paper's |")
    print("|---|---|---|---|---|---|")
    for row in table.to_dict(orient="records"):
        ratios = [f"{row[f'predicted_times_{base}']:.2f}" for base in ("full", "paper")]
        cells = [row["task"], row["layout"], row["depth"], f"{row['predicted_ms_per_user']:.4f}"]
        print("| " + " | ".join(map(str, [*cells, *ratios])) + " |")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="H100-SXM")
    parser.add_argument("--config", default=str(HERE / "llama-2-7b"), help="a folder's config.json")
    parser.add_argument("--depths", default="8,4")
    parser.add_argument("--lengths", choices=("beauty", "full"), default="beauty")
    parser.add_argument("--users", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--output", default=str(HERE))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
