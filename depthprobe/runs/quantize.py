"""Round trained models to fewer bits: nothing is trained, everything is measured again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from depthprobe.cost.size import count_parameters, served_bytes
from depthprobe.evaluation.ranks import evaluate
from depthprobe.methods import Task, Trial, base_of
from depthprobe.models.build import merge_lora, twin_of
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.quantize import make_ready, quantize
from depthprobe.models.recommender import Recommender
from depthprobe.runs.context import Context, Result
from depthprobe.runs.plan import holder_of
from depthprobe.runs.records import Record, read_record
from depthprobe.study import settings_of


def quantized(context: Context, task: Task) -> Iterator[Result]:
    """Round a trained trial's model to fewer bits, and rank with it."""
    (trial,) = task.trials
    record, source = source_of(context, trial)
    model = trained_model(context, source)
    half = settings_of(context.study, trial.method).recipe.precision == "bfloat16"
    quantize(model, base_of(trial.method), bfloat16=half)
    make_ready(model.backbone)
    yield Result(
        replace(trial, kept=source.kept),
        evaluate(model, context.test, device=context.device),
        count_parameters(model) | {"trainable": 0},
        bytes=served_bytes(model, bfloat16=half),
        flops=record.costs.flops_user if record.costs else None,
    )


def source_of(context: Context, trial: Trial) -> tuple[Record, Trial]:
    """The trial that a variant is made of: its record, and the trial with the blocks it kept."""
    name = str(trial.of)
    record = read_record(context.trial_folder(replace(trial, id=name)))
    if record is None:
        raise ValueError(f"{name} has no record for {trial.id}")
    return record, Trial(name, record.method, record.kept, record.seed, trial.blocks)


def trained_model(context: Context, trial: Trial) -> Recommender:
    """The model of a trial that was trained, LoRA merged, cut to its blocks, in eval mode."""
    holder = holder_of(context.study, trial)
    model = context.trained(holder)
    merge_lora(model)
    if context.study.backbone.own:  # all callers may share this object
        model = twin_of(model)
    if trial.kept != holder.kept:
        keep_blocks(model.backbone, [holder.kept.index(block) for block in trial.kept])
    return model.eval()
