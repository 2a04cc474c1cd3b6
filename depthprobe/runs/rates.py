"""How long each piece of work takes here: as the run has timed it, or measured for a moment."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import psutil
import torch
from transformers import PreTrainedConfig

from depthprobe.cost.actions import stepping
from depthprobe.cost.curve import cost_table, read_shapes
from depthprobe.cost.depths import Shape
from depthprobe.cost.memory import kinds_of
from depthprobe.cost.prediction import training_bytes
from depthprobe.cost.timing import interleaved_for
from depthprobe.cost.workload import TOP, Workload
from depthprobe.errors import BadInput
from depthprobe.models.build import build_sasrec, prompt_tokens, suffix_tokens
from depthprobe.models.recommender import Recommender
from depthprobe.runs.context import LEARNED, TIMING, Context
from depthprobe.runs.pieces import Rates, Sizes
from depthprobe.runs.timing import covers
from depthprobe.study import Study

SECONDS = 4.0  # to time the backbone for; with what cannot be shortened three or four times as long
BASELINE_SECONDS = 1.0
CHECKPOINTED = 4 / 3  # of a step's time, with a second forward pass


@dataclass(frozen=True, kw_only=True)
class Found:
    """Rates, and where they come from.

    Attributes:
        rates: None where nothing could be told; ``why`` says so.
        source: ``timed`` by the run, ``measured`` now, or ``predicted``: a bound from below.
        threads: that the times hold for, on a CPU.
        memory: bytes of a process that trains the whole depth, at its peak; None if unknown.
        memory_measured: else it is predicted.
        busy: processes that wanted a core while it was measured, by core; NaN if unknown.
    """

    rates: Rates | None
    source: str = "measured"
    threads: int = 1
    memory: float | None = None
    memory_measured: bool = False
    why: str = ""
    busy: float = math.nan


def timed_rates(
    context: Context, blocks: int, sizes: Sizes, workload: Workload, *, whole: bool
) -> Found | None:
    """What ``shared/timing.json`` says; None if it is not there, or holds for something else.

    Batches are longer or shorter than the typical ones that were timed: longer ones take longer
    in proportion, shorter ones are not taken to be faster.

    Args:
        whole: whether anything but baselines is left to do.
    """
    path = context.shared / TIMING
    if not path.exists():
        return None
    measured = json.loads(path.read_text(encoding="utf-8"))
    conditions = measured["conditions"]
    if conditions["device"] != context.device.type or not covers(measured, context, blocks):
        return None
    longer = max(1.0, sizes.train_length / conditions["train_length"])
    wider = max(1.0, sizes.test_length / conditions["length"]) / conditions["batch"]
    step, encode = {}, {}
    for action, seconds in measured["seconds"].items():
        kind, _, key = action.rpartition(":")
        if kind == "encode":
            encode[key] = wider * float(np.median(seconds))
        elif kind not in ("", "latency"):
            step[action] = longer * float(np.median(seconds))
    score = float(np.median(measured["seconds"]["score"])) / conditions["batch"]
    found = _shapes(context.study, workload) if whole else []
    rates = Rates(
        batch=conditions["train_batch"],
        step=step,
        encode=encode,
        score=score,
        flops=_flops(found, context.study, blocks, workload),
    )
    memory = _predicted_memory(found, context)
    return Found(rates=rates, source="timed", threads=conditions["threads"], memory=memory)


def measured_rates(
    context: Context, blocks: int, workload: Workload, *, threads: int, whole: bool
) -> Found:
    """Time one block and all of them with random weights, and SASRec, for some seconds.

    Where the whole backbone does not fit or would take too long, what a roofline predicts.

    Args:
        threads: that a worker will have, on a CPU.
        whole: whether anything but baselines is left to do.
    """
    study, device = context.study, context.device
    with _threads(threads if device.type == "cpu" else None):
        step, encode, score = _baseline(context, workload)
        if not whole:
            rates = Rates(batch=study.recipe.batch_size, step=step, encode=encode, score=score)
            return Found(rates=rates, threads=threads)
        try:
            table = cost_table(
                study.backbone.source,
                "1",
                device=device.type,
                revision=study.backbone.revision,
                workload=workload,
            )
        except (ValueError, RuntimeError) as error:  # the plan can be told all the same
            told = error.allowed if isinstance(error, BadInput) else str(error).partition("\n")[0]
            return Found(rates=None, why=told)
    why = str(table["not_measured"].iloc[0] or "")
    known = "predicted_" if why else ""
    again = CHECKPOINTED if study.backbone.checkpointing else 1.0
    rows: list[dict[str, Any]] = table.to_dict(orient="records")  # type: ignore[assignment]
    for row in rows:
        step[f"train:{row['depth']}"] = again * row[f"{known}train_step_ms"] / 1000
        encode[f"{row['depth']}"] = row[f"{known}encode_ms"] / 1000 / row["batch"]
    if not np.isfinite([*step.values(), *encode.values()]).all():
        return Found(rates=None, why=why)
    found = _shapes(study, workload)
    kind = kinds_of(device)[-1]
    peak = None if why else float(rows[-1][f"training_{kind}_bytes"])
    return Found(
        rates=Rates(
            batch=rows[-1]["batch"],
            step=step,
            encode=encode,
            score=score,
            flops=_flops(found, study, blocks, workload),
        ),
        source="predicted" if why else "measured",
        threads=threads,
        memory=_predicted_memory(found, context) if peak is None else peak,
        memory_measured=peak is not None,
        why=why,
        busy=float(rows[-1]["busy"]),
    )


def workload_of(
    study: Study, config: PreTrainedConfig, sizes: Sizes, *, items: int, width: int | None
) -> Workload:
    """A batch of the study's training, as `cost` takes it: mean history, prompt, items, tuning.

    Args:
        items: in the catalogue.
        width: of an item table that all trials share.

    Raises:
        BadInput: if the backbone has no tokenizer for the prompt.
    """
    own = study.item_width if study.item_table == LEARNED else study.sasrec.width
    # what follows the items is read once a user, like one more item
    length = round(sizes.train_length) + len(suffix_tokens(study.backbone))
    prompt = len(prompt_tokens(study.backbone))
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return Workload(
        batch=study.recipe.batch_size,
        length=max(1, length if most is None else min(length, most - prompt)),
        items=max(TOP, items),
        width=own if width is None else width,
        prompt=prompt,
        dtype=study.backbone.dtype,
        tuning=study.backbone.tuning,
        seconds=SECONDS,
    )


def _shapes(study: Study, workload: Workload) -> list[Shape]:
    """Shapes of all depths that are trained, the whole last; none where they can't be told."""
    layers = "all" if study.budget == "compute" else "1"
    backbone = study.backbone
    try:
        return read_shapes(backbone.source, layers, backbone.revision, workload)[1]
    except BadInput:
        return []


def _flops(found: list[Shape], study: Study, blocks: int, workload: Workload) -> dict[int, float]:
    if study.budget == "steps":
        return {}
    asked = 1 if study.recipe.objective == "last" else workload.length
    return {each.depth: each.flops_encode + asked * each.flops_score for each in found}


def _predicted_memory(found: list[Shape], context: Context) -> float | None:
    """Of a step of the whole depth; on a CPU with what this process has, as a worker has it."""
    if not found:
        return None
    step = training_bytes(found[-1], context.study.recipe.batch_size)
    own = psutil.Process().memory_info().rss if context.device.type == "cpu" else 0
    return float(step + own)


def _baseline(
    context: Context, workload: Workload
) -> tuple[dict[str, float], dict[str, float], float]:
    """SASRec's seconds a step, a user; and those of scoring the catalogue for a user."""
    settings, device = context.study.sasrec, context.device
    size = settings.recipe.batch_size
    longest = context.study.data.max_history
    workload = replace(workload, length=min(workload.length, longest))
    model = build_sasrec(settings, items=workload.items, longest=longest).to(device)
    histories = torch.randint(1, workload.items + 1, (size, workload.length), device=device)
    lengths = torch.full((size,), workload.length, device=device)
    a_step = stepping(cast("Recommender", model), workload, size)

    def train() -> None:
        model.train()
        a_step()

    @torch.inference_mode()
    def encode() -> None:
        model.eval().encode(histories, lengths)

    @torch.inference_mode()
    def score() -> None:
        (vectors @ items.T).topk(TOP)

    items = torch.randn(workload.items + 1, workload.width, device=device)
    vectors = torch.randn(size, workload.width, device=device)
    actions = {"train": train, "encode": encode, "score": score}
    times = interleaved_for(actions, BASELINE_SECONDS, device=device)
    middle = {name: float(np.median(seconds)) for name, seconds in times.items()}
    step, a_user = {"train:sasrec": middle["train"]}, {"sasrec": middle["encode"] / size}
    return step, a_user, middle["score"] / size


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads inside the context."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
