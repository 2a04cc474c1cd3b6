"""The cost of every depth of a backbone, from its configuration alone: no weights are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedConfig

from depthprobe.cost.actions import check_positions, dtype_of
from depthprobe.cost.depths import Shape, depth_shapes
from depthprobe.cost.energy import why_unmeasured
from depthprobe.cost.gpus import Roof, check_gpus
from depthprobe.cost.machine import machine
from depthprobe.cost.measuring import COMMON, PHASES, Measured, measure, measured_rate
from depthprobe.cost.memory import free_memory, kinds_of
from depthprobe.cost.prediction import (
    FIRST,
    predict,
    prediction_table,
    saturating_batch,
    training_bytes,
    trains,
)
from depthprobe.cost.roofline import roof_of
from depthprobe.cost.serving import check_price, serving_cost
from depthprobe.cost.timing import LEAST, Summary, summarize, times_faster
from depthprobe.cost.workload import Workload
from depthprobe.errors import BadInput
from depthprobe.models.backbones import backbone_config, resolve_device
from depthprobe.study import parse_layers

USUAL = Workload()
PATIENCE = 2  # times as long as was asked for, a measurement may at least take by prediction
ROUNDS = LEAST + 4  # with warm-up, memory and energy
NAN = float("nan")


def cost_table(
    backbone: str,
    layers: str = "auto",
    *,
    device: str = "auto",
    revision: str | None = None,
    workload: Workload = USUAL,
    price: float | None = None,
) -> pd.DataFrame:
    """Parameters, FLOPs, time and memory by depth; the whole backbone is the last row.

    Measured in turn on models with random weights of the backbone's shape. Columns, for each phase
    (``train_step``, ``encode``, ``score``, ``answer``: encode and score; those of inference with
    ``_one`` for a batch of one user):

    - ``{phase}_ms``, a median over rounds; ``_p90``, ``_low`` and ``_high`` (95 % interval of the
      median), ``_n`` behind it.
    - ``{phase}_times_faster`` than the whole backbone, paired by round; ``_low``, ``_high``.
    - ``users_per_second``, ``hours_per_billion`` requests, ``money_per_billion``: of ``answer``.
    - ``{serving,training}_{allocated,reserved}_bytes`` on a GPU, ``_rss_bytes`` elsewhere: peaks.
    - ``{serving,training}_joules_per_user``; NaN and not 0 where ``energy`` says "not measured".
    - ``predicted_{phase}_ms``: the roofline of this device, to judge predictions by; ``roof``.

    All are NaN where nothing could be measured, and ``not_measured`` says why. The raw values are
    in ``table.attrs["seconds"]``.

    Args:
        price: of an hour of the device, in any currency.

    Raises:
        BadInput: for a backbone that is not there, depths that it doesn't have, or a price or
            workload that can't be used.
    """
    check_price(price)
    place = resolve_device(device)
    config, found = read_shapes(backbone, layers, revision, workload)
    here = machine(place)  # before it is busy with this
    roof = roof_of(place, found[-1].dtype)
    obstacle = _obstacle(found, workload, roof, place)
    batch, measured = workload.batch or FIRST, None
    if obstacle is None:
        try:
            batch = workload.batch or _find_batch(config, found, workload, roof, place)
            measured = measure(config, [shape.depth for shape in found], workload, batch, place)
        except torch.OutOfMemoryError:
            obstacle = f"the GPU ran out of memory with {batch} users in a batch"
    rows = [
        _size(shape)
        | _times(shape, found[-1], measured)
        | _serving(shape, measured, price)
        | _memory(shape, measured, place)
        | predict(shape, batch, roof, workload)
        for shape in found
    ]
    conditions = {
        "dtype": found[-1].dtype,
        "batch": batch,
        "length": workload.length,
        "prompt": workload.prompt,
        "items": workload.items,
        "tuning": workload.tuning,
        **here,
        "energy": _of_energy(place, measured),
        "not_measured": obstacle,
        "roof": f"{_tera(roof.peak[found[-1].dtype])}, {roof.bandwidth / 1e9:.3g} GB/s,"
        f" {roof.source}",
    }
    table = pd.DataFrame(rows).assign(**conditions)
    table.attrs["seconds"] = measured.seconds if measured else {}
    return table


def predicted_tables(
    backbone: str,
    layers: str = "auto",
    *,
    gpus: str,
    revision: str | None = None,
    workload: Workload = USUAL,
    price: float | None = None,
) -> list[pd.DataFrame]:
    """What the rooflines of named GPUs predict, one table a GPU; nothing is run.

    Args:
        gpus: names of the table of GPUs, comma-separated.

    Raises:
        BadInput: as :func:`cost_table`, and for a GPU that is not in the table.
    """
    check_price(price)
    config, found = read_shapes(backbone, layers, revision, workload)
    roofs = check_gpus(gpus, dtype_of(config, workload))
    return [prediction_table(found, roof, workload, price=price) for roof in roofs]


def read_shapes(
    backbone: str, layers: str, revision: str | None, workload: Workload
) -> tuple[PreTrainedConfig, list[Shape]]:
    """The backbone's configuration, and the shapes of the depths, the whole one last."""
    config = backbone_config(backbone, revision=revision)
    check_positions(config, workload)
    blocks = int(config.get_text_config(decoder=True).num_hidden_layers)
    depths = sorted({*parse_layers(layers, blocks), blocks})
    try:
        return config, depth_shapes(config, depths, workload)
    except ValueError as error:
        raise BadInput(
            "backbone", backbone, f"a decoder whose cost can be told ({error})"
        ) from error


def _obstacle(
    found: Sequence[Shape], workload: Workload, roof: Roof, place: torch.device
) -> str | None:
    """Why there is nothing to measure: it does not fit, or takes too long."""
    if not workload.seconds:
        return "no time was given to it"
    free, batch = free_memory(place), workload.batch or FIRST
    if not trains(found[-1], batch, free):
        needs = training_bytes(found[-1], batch) / 1e9
        have = f"{free / 1e9:,.1f} may be had"
        return f"a step of {batch} users is predicted to take {needs:,.1f} GB, of which {have}"
    least = ROUNDS * _round(found, batch, roof, workload)
    if least > PATIENCE * workload.seconds:
        return f"it is predicted to take {least:.2g} s or more, {workload.seconds:g} were given"
    return None


def _find_batch(
    config: PreTrainedConfig,
    found: Sequence[Shape],
    workload: Workload,
    roof: Roof,
    place: torch.device,
) -> int:
    """The batch from which on the device serves hardly more users a second, measured."""
    free = free_memory(place)

    def allowed(batch: int) -> bool:
        in_time = ROUNDS * _round(found, batch, roof, workload) < workload.seconds
        return in_time and trains(found[-1], batch, free)

    return saturating_batch(measured_rate(config, workload, place), allowed)


def _round(found: Sequence[Shape], batch: int, roof: Roof, workload: Workload) -> float:
    """Predicted seconds of every action once."""
    times = [predict(shape, batch, roof, workload) for shape in found]
    phases = ("train_step", "encode", "answer", "answer_one", "answer_one")
    return sum(each[f"predicted_{phase}_ms"] for each in times for phase in phases) / 1000


def _size(shape: Shape) -> dict[str, Any]:
    return {
        "depth": shape.depth,
        "parameters": shape.parameters,
        "parameters_blocks": shape.blocks,
        "bytes": shape.weights,
        "flops_user": shape.flops_encode + shape.flops_score,
    }


def _times(shape: Shape, whole: Shape, measured: Measured | None) -> dict[str, float]:
    row: dict[str, float] = {}
    for phase in (*PHASES, *COMMON):
        common = phase in COMMON
        values = _values(measured, phase if common else f"{phase}:{shape.depth}")
        row |= _named(f"{phase}_ms", summarize([1000 * v for v in values]) if values else None)
        if not common:
            slow = _values(measured, f"{phase}:{whole.depth}")
            ratio = times_faster(slow, values) if values else None
            row |= _named(f"{phase}_times_faster", ratio, spread=False)
    return row


def _values(measured: Measured | None, name: str) -> list[float]:
    return measured.seconds[name] if measured else []


def _named(name: str, found: Summary | None, *, spread: bool = True) -> dict[str, float]:
    found = found or Summary(NAN, NAN, NAN, NAN, 0)
    row = {name: found.p50, f"{name}_low": found.low, f"{name}_high": found.high}
    return row | ({f"{name}_p90": found.p90, f"{name}_n": found.n} if spread else {})


def _serving(shape: Shape, measured: Measured | None, price: float | None) -> dict[str, Any]:
    answers = _values(measured, f"answer:{shape.depth}")
    if measured is None:
        return dict.fromkeys(serving_cost(1, 1), NAN)
    return serving_cost(float(np.median(answers)), measured.batch, price=price)


def _memory(shape: Shape, measured: Measured | None, place: torch.device) -> dict[str, float]:
    if measured is None:
        kinds = [f"{kind}_bytes" for kind in kinds_of(place)] + ["joules_per_user"]
        return {f"{task}_{kind}": NAN for task in ("serving", "training") for kind in kinds}
    return measured.memory[shape.depth] | measured.energy[shape.depth]


def _of_energy(place: torch.device, measured: Measured | None) -> str:
    why = "nothing was" if measured is None else why_unmeasured(place)
    return "measured" if why is None else f"not measured ({why})"


def _tera(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
