"""The cost of every depth of a backbone, from only its configuration: no weights are needed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from msgspec import Meta
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from depthprobe.cost.flops import UncountableError, product_counter, score_flops
from depthprobe.cost.size import count_bytes, count_parameters, free_memory, peak_memory
from depthprobe.cost.timing import (
    TOP,
    Action,
    Timing,
    encode_actions,
    machine,
    measure,
    optimizer_of,
    step,
    summarize,
    times_faster,
)
from depthprobe.errors import BadInput
from depthprobe.models.backbones import backbone_config
from depthprobe.models.blocks import find_blocks
from depthprobe.models.build import cut_copy, make_trainable
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.precision import resolve_device
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import ends_at_positions, positions_of
from depthprobe.study import Backbone, Checked, Count, CountOrNone, parse_layers

MEASURED = ("train", "encode", "score", "latency")
CHUNK = 2**28  # bytes of scores at a time
WARMUP, ROUNDS = 3, 100
BILLION = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Workload(Checked):
    """A batch of users with full histories, a catalogue, and which weights are trained.

    ``prompt``: slots before the items, computed once for all users. ``width``: of the item table.
    ``dtype``: of the backbone; auto follows the configuration. ``seconds``: how long to measure;
    0 measures nothing.
    """

    batch: Count = 128
    length: Count = 30
    items: Annotated[int, Meta(ge=TOP, le=10**9)] = 10_000
    width: Count = 64
    prompt: CountOrNone = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tuning: Literal["full", "lora", "frozen"] = "full"
    seconds: Annotated[float, Meta(ge=0, le=86_400)] = 20.0


def cost_table(
    backbone: str,
    layers: str = "auto",
    *,
    device: str = "auto",
    revision: str | None = None,
    workload: Workload | None = None,
    price: float | None = None,
) -> pd.DataFrame:
    """Parameters, FLOPs, time and memory by depth; the full backbone is the last row.

    Times are measured in turn on one model with random weights of the backbone's shape. Columns:

    - ``parameters``, ``parameters_blocks``, ``bytes`` of all weights, ``optimizer_bytes``,
      ``flops_user`` (NaN where the model's code can't be counted).
    - ``{train_step,encode,score,latency}_ms``, a median over rounds; ``_low`` and ``_high`` (95 %
      interval of the median), ``_n`` behind it. ``latency``: one user, from history to best items.
    - ``{train_step,latency,serving}_times_faster`` than the full backbone, paired by round;
      ``_low``, ``_high``. ``serving``: encode and score.
    - ``users_per_second``, ``hours_per_billion`` requests, ``money_per_billion``: of ``serving``.
    - ``{serving,training}_{allocated,reserved}_bytes`` on a GPU, ``_rss_bytes`` elsewhere: peaks.

    Values that were not measured are NaN, and ``not_measured`` says why. The raw values are in
    ``table.attrs["seconds"]``.

    Args:
        price: of an hour of the device, in any currency.

    Raises:
        BadInput: for a missing backbone, depths that it doesn't have, or an unusable price or
            workload.
    """
    if price is not None and not 0 < price <= 1e9:
        raise BadInput("price", price, "what an hour of the device costs, a number above 0")
    workload, place = workload or Workload(), resolve_device(device)
    config = backbone_config(backbone, revision=revision)
    text = config.get_text_config(decoder=True)
    most = positions_of(config)
    long = most is not None and most < workload.prompt + workload.length
    if long and ends_at_positions(config):
        allowed = f"at most {most} positions with the {workload.prompt} slots of the prompt"
        raise BadInput("length", workload.length, allowed)
    blocks = int(text.num_hidden_layers)
    depths = sorted({*parse_layers(layers, blocks), blocks})
    try:
        rows = _sizes(config, depths, workload)
    except Exception as error:  # some configurations make no model
        found = f"{type(error).__name__}: {error}".partition("\n")[0]
        reason = error.allowed if isinstance(error, BadInput) else found
        raise BadInput("backbone", backbone, f"a decoder that can be cut ({reason})") from error
    here = machine(place)  # before this measurement keeps it busy
    timing, peaks, obstacle = None, {}, "no time was given to it" if not workload.seconds else None
    needs, free = rows[-1]["bytes"] + rows[-1]["optimizer_bytes"], free_memory(place)
    if obstacle is None and needs > free:
        obstacle = f"training takes more than {needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if obstacle is None:
        model = _recommender(random_backbone(config, workload.dtype, place), workload)
        timing = _measure(model, depths, workload, place)
        peaks = _peaks(model, depths, timing, workload, place)
    for row in rows:
        row |= _times(row["depth"], blocks, timing, price)
        row |= peaks.get(row["depth"], {})
    table = pd.DataFrame(rows).assign(
        batch=timing.batch if timing else workload.batch,
        length=workload.length,
        prompt=workload.prompt,
        items=workload.items,
        tuning=workload.tuning,
        dtype=_dtype(config, workload.dtype),
        **here,
        not_measured=obstacle,
    )
    table.attrs["seconds"] = timing.seconds if timing else {}
    return table


def random_backbone(config: PreTrainedConfig, dtype: str, device: torch.device) -> PreTrainedModel:
    """A backbone of this shape with random weights, made on the device; on ``meta`` with none."""
    auto: Any = AutoModelForCausalLM  # untyped in transformers
    touched = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=touched), torch.device(device):
        torch.default_generator.manual_seed(0)
        made: PreTrainedModel = auto.from_config(
            copy.deepcopy(config), dtype=getattr(torch, _dtype(config, dtype))
        )
    made.eval()
    return made


def _dtype(config: PreTrainedConfig, dtype: str) -> str:
    """The name of the dtype that the backbone computes in."""
    written = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    return dtype if dtype != "auto" else str(written).removeprefix("torch.")


def _recommender(backbone: PreTrainedModel, workload: Workload) -> Recommender:
    with torch.device(backbone.device):
        table = torch.randn(workload.items + 1, workload.width)
        model = Recommender(backbone, table, [0] * workload.prompt)
        make_trainable(model, Backbone(tuning=workload.tuning))
    return model


def _sizes(
    config: PreTrainedConfig, depths: Sequence[int], workload: Workload
) -> list[dict[str, Any]]:
    """Parameters, bytes and FLOPs of every depth, from a model without weights."""
    backbone = random_backbone(config, workload.dtype, torch.device("meta"))
    find_blocks(backbone)  # refuses a model whose blocks can't be found
    try:
        model = _recommender(backbone, workload)
    except RuntimeError:  # the test whether the prompt can be shared needs weights
        model = _recommender(backbone, replace(workload, prompt=0))
        model.prompt = torch.zeros(workload.prompt, dtype=torch.long, device="meta")
    try:
        products = product_counter(model)(workload.length)
    except UncountableError:
        products = None
    rows = []
    for depth in sorted(depths, reverse=True):  # deepest first, cutting the same model
        keep_blocks(model.backbone, range(depth))
        counts, held = count_parameters(model), count_bytes(model)
        flops = products.total(depth) + score_flops(model, 1) if products else float("nan")
        rows.append(
            {
                "depth": depth,
                "parameters": counts["total"] - counts["item_table"],
                "parameters_blocks": counts["blocks"],
                "bytes": held["total"],
                "optimizer_bytes": held["optimizer"],
                "flops_user": flops,
            }
        )
    return rows[::-1]


def _measure(
    model: Recommender, depths: Sequence[int], workload: Workload, place: torch.device
) -> Timing:
    models = {str(depth): cut_copy(model, range(depth)) for depth in depths}

    def make(batch: int) -> dict[str, Action]:
        histories, lengths = _users(workload, batch, place)
        items = model.item_matrix().detach()
        actions = encode_actions(models, histories, lengths, items=items)
        optimizer = optimizer_of(*models.values())
        for name, each in models.items():
            work = 3 * each.depth * batch * workload.length
            call = step([_next_item_loss(each, workload, batch, place)], optimizer)
            actions[f"train:{name}"] = Action(call, work)
        return actions

    return measure(
        make,
        batch=workload.batch,
        seconds=workload.seconds,
        warmup=WARMUP,
        rounds=ROUNDS,
        device=place,
    )


def _peaks(
    model: Recommender,
    depths: Sequence[int],
    timing: Timing,
    workload: Workload,
    place: torch.device,
) -> dict[int, dict[str, float]]:
    """Peak memory of serving and training at each depth; the model is cut to it."""
    peaks = {}
    for depth in sorted(depths, reverse=True):
        keep_blocks(model.backbone, range(depth))
        if not {f"train:{depth}", f"encode:{depth}"} <= timing.seconds.keys():
            continue
        histories, lengths = _users(workload, timing.batch, place)
        serve = encode_actions({"": model}, histories, lengths, items=model.item_matrix())
        with peak_memory(place) as serving:
            serve["encode:"].call()
        optimizer = optimizer_of(model)
        # the first step makes AdamW's moments, which later steps need
        step([_next_item_loss(model, workload, 1, place)], optimizer)()
        train = step([_next_item_loss(model, workload, timing.batch, place)], optimizer)
        with peak_memory(place) as training:
            train()
        tasks = {"serving": serving, "training": training}
        peaks[depth] = {
            f"{task}_{kind}_bytes": value
            for task, peak in tasks.items()
            for kind, value in peak.items()
        }
        del train, optimizer
    return peaks


def _users(workload: Workload, batch: int, place: torch.device) -> tuple[Tensor, Tensor]:
    histories = torch.randint(1, workload.items + 1, (batch, workload.length), device=place)
    return histories, torch.full((batch,), workload.length, device=place)


def _next_item_loss(model: Recommender, workload: Workload, batch: int, place: torch.device) -> Any:
    """The cross-entropy of the next item at every position, some rows of scores at a time."""
    histories, _ = _users(workload, batch, place)
    targets, _ = _users(workload, batch, place)
    rows = max(1, CHUNK // (4 * (workload.items + 1)))

    def part(vectors: Tensor, items: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(vectors @ items.T, wanted, reduction="sum")

    def loss() -> Tensor:
        vectors, items = model.train()(histories).flatten(0, 1), model.item_matrix()  # (B T, d)
        pairs = zip(vectors.split(rows), targets.flatten().split(rows), strict=True)
        kept = partial(checkpoint, part, use_reentrant=False)
        parts = [kept(own, items, wanted) for own, wanted in pairs]
        return torch.stack(parts).sum() / targets.numel()

    return loss


def _times(depth: int, blocks: int, timing: Timing | None, price: float | None) -> dict[str, Any]:
    """Times of a depth, its speed-up over the full depth, the cost of a billion requests."""

    def rounds(kind: str, at: int) -> list[float]:
        seconds = timing.seconds if timing else {}
        if kind == "serving":
            parts = (rounds("encode", at), rounds("score", at))
            return [sum(each) for each in zip(*parts, strict=False)]
        return seconds.get("score" if kind == "score" else f"{kind}:{at}", [])

    row: dict[str, Any] = {}
    for kind in MEASURED:
        name = "train_step" if kind == "train" else kind
        found = [1000 * value for value in rounds(kind, depth)]
        row |= _columns(f"{name}_ms", found and summarize(found))
    for kind in ("train", "latency", "serving"):
        name = "train_step" if kind == "train" else kind
        own, full = rounds(kind, depth), rounds(kind, blocks)
        row |= _columns(f"{name}_times_faster", own and full and times_faster(full, own))
    serving = rounds("serving", depth)
    rate = timing.batch / float(np.median(serving)) if timing and serving else float("nan")
    hours = BILLION / rate / 3600
    money = None if price is None else price * hours
    return row | {
        "users_per_second": rate,
        "hours_per_billion": hours,
        "money_per_billion": money,
    }


def _columns(name: str, found: Any) -> dict[str, float]:
    """A summary in columns; NaN if nothing was measured."""
    parts = {"": "p50", "_low": "low", "_high": "high", "_n": "n"}
    return {
        f"{name}{end}": getattr(found, part) if found else float("nan")
        for end, part in parts.items()
    }
