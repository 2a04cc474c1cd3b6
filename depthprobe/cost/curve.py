"""The cost of every depth of a backbone, from its configuration alone: no weights are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from transformers import AutoModelForCausalLM

from depthprobe.cost.flops import flops_per_user
from depthprobe.cost.parameters import count_parameters
from depthprobe.cost.timing import interleaved
from depthprobe.models.backbones import backbone_config, load_backbone
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.devices import resolve_device
from depthprobe.models.recommender import Recommender
from depthprobe.study import parse_layers

ITEMS, D_ITEM, LENGTH, BATCH = 10_000, 64, 30, 32  # a catalogue and histories of the usual size
WARMUP, ROUNDS = 2, 7


def cost_table(
    backbone: str, layers: str = "auto", *, device: str = "auto", revision: str | None = None
) -> pd.DataFrame:
    """Parameters, FLOPs, time and memory by depth; the whole backbone is the last row.

    Times are medians of interleaved rounds with random weights of the backbone's shape, for 32
    users with 30 items each and a catalogue of 10,000; NaN where the weights would not fit the
    memory.

    Raises:
        BadInput: for a backbone that is not there, or depths that it doesn't have.
    """
    place = resolve_device(device)
    config = backbone_config(backbone, revision=revision)
    blocks = int(config.get_text_config(decoder=True).num_hidden_layers)
    depths = sorted({*parse_layers(layers, blocks), blocks})
    rows = [_size(config, depth) for depth in depths]
    fits = 4 * 3 * rows[-1]["bytes"] < _free_memory(place)  # weights, gradients, room to work
    seconds = _measure(backbone, revision, depths, place) if fits else {}
    for row in rows:
        for name in ("encode", "train_step"):
            values = seconds.get(f"{name}:{row['depth']}")
            row[f"{name}_ms"] = 1000 * float(np.median(values)) if values else float("nan")
    return pd.DataFrame(rows)


def _size(config: Any, depth: int) -> dict[str, Any]:
    """Parameters and FLOPs on the meta device, where weights take no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        keep_blocks(model, range(depth))
        whole = Recommender(model, torch.empty(ITEMS + 1, D_ITEM), ())
    counts = count_parameters(whole)
    per_weight = torch.finfo(model.dtype).bits // 8
    return {
        "depth": depth,
        "parameters": counts["blocks"] + counts["token_embeddings"] + counts["adapters"],
        "parameters_blocks": counts["blocks"],
        "bytes": counts["total"] * per_weight,
        "flops_user": flops_per_user(whole, LENGTH),
    }


def _measure(
    backbone: str, revision: str | None, depths: list[int], device: torch.device
) -> dict[str, list[float]]:
    actions: dict[str, Callable[[], object]] = {}
    histories = torch.randint(1, ITEMS + 1, (BATCH, LENGTH), device=device)
    lengths = torch.full((BATCH,), LENGTH, device=device)
    for depth in depths:
        whole = load_backbone(backbone, revision=revision, random_init=0)
        keep_blocks(whole, range(depth))
        model = Recommender(whole, torch.randn(ITEMS + 1, D_ITEM), ()).to(device).eval()
        actions[f"encode:{depth}"] = _encoding(model, histories, lengths)
        actions[f"train_step:{depth}"] = _step(model, histories)
    return interleaved(actions, warmup=WARMUP, rounds=ROUNDS, device=device)


def _encoding(
    model: Recommender, histories: torch.Tensor, lengths: torch.Tensor
) -> Callable[[], object]:
    @torch.inference_mode()
    def action() -> object:
        return model.encode(histories, lengths) @ model.item_matrix().T

    return action


def _step(model: Recommender, histories: torch.Tensor) -> Callable[[], object]:
    """Forward and backward through the blocks; a loss of no meaning costs what a real one does."""

    def action() -> None:
        model(histories).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return action


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
