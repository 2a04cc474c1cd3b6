"""The methods that train a shallower model: from the backbone, out of the teacher, after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from depthprobe.cost.flops import flops_per_user
from depthprobe.cost.parameters import count_parameters
from depthprobe.evaluation.evaluate import Encoder, evaluate, mean_ndcg
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.probing.early_exit import early_exit
from depthprobe.probing.screening import nearest_spans
from depthprobe.study import ASKED, Recipe, settings_of
from depthprobe.sweep.budget import budgeted, trained_epoch
from depthprobe.sweep.cache import result_file
from depthprobe.sweep.context import Context
from depthprobe.sweep.plan import Task, Trial, whole_trial
from depthprobe.sweep.probes import angular_distances, outside, part_of, removal
from depthprobe.sweep.records import read_record
from depthprobe.sweep.results import Result
from depthprobe.sweep.teaching import teacher_for
from depthprobe.training.distillation import Distiller
from depthprobe.training.elastic import ElasticObjective
from depthprobe.training.loop import Fit, fit
from depthprobe.training.objectives import NextItem


def fine_tuned(context: Context, task: Task) -> Iterator[Result]:
    """The teacher, a variant cut from the pretrained backbone, or one without pretraining."""
    trial = _with_blocks(context, task.trials[0])
    chosen = settings_of(context.study, trial.method).asks_teacher
    taught = _seconds_of_teacher(context, trial) if chosen else 0.0
    yield replace(_train(context, trial, context.new_recommender(trial)), taught=taught)


def heal(context: Context, task: Task) -> Iterator[Result]:
    """Cut out of the trained teacher, then fine-tuned for a share of its epochs."""
    trial = _with_blocks(context, task.trials[0])
    taught = _seconds_of_teacher(context, trial)
    yield replace(_train(context, trial, _cut_teacher(context, trial)), taught=taught)


def distill(context: Context, task: Task) -> Iterator[Result]:
    """A variant trained to follow the teacher."""
    trial = _with_blocks(context, task.trials[0])
    settings = settings_of(context.study, trial.method)
    weights = settings.distillation
    teacher, seconds = teacher_for(context, trial)
    from_teacher = weights.init == "teacher"
    student = _cut_teacher(context, trial) if from_teacher else context.new_recommender(trial)
    student.train()
    torch.manual_seed(trial.seed)
    goal = None
    if weights.logits and not weights.top:
        goal = context.teacher(trial.seed, trial.blocks).item_matrix().detach()
    distiller = Distiller(student, weights, settings.recipe, teacher, goal_items=goal)
    taught = seconds
    if teacher is not None or from_teacher or settings.select in ASKED:
        taught += _seconds_of_teacher(context, trial)
    yield replace(_train(context, trial, student, distiller.to(context.device)), taught=taught)


def elastic(context: Context, task: Task) -> Iterator[Result]:
    """One training, whose every prefix is a trial; the deepest one holds the weights."""
    whole = task.trials[-1]
    settings = settings_of(context.study, whole.method)
    model = context.new_recommender(whole)
    recipe = budgeted(context, whole, model)

    def validate() -> float:
        every = early_exit(model.eval(), context.validation, device=context.device)
        return float(np.mean([mean_ndcg(ranks["full"]) for ranks in every[1:]]))

    done = _fit(context, whole, ElasticObjective(model, settings.elastic, recipe), recipe, validate)
    ranks = early_exit(model, context.test, device=context.device)
    epoch = _counted(lambda: trained_epoch(context, whole, model))
    for trial in task.trials:
        yield Result(
            trial,
            ranks[trial.depth],
            part_of(model, trial) | {"trainable": count_parameters(model)["trainable"]},
            flops=_counted(partial(_flops, context, whole, model, depth=trial.depth)),
            fit=done,
            model=model if trial == whole else None,
            training_flops=epoch and epoch * done.epochs,
        )


def _with_blocks(context: Context, trial: Trial) -> Trial:
    """The trial with the blocks that its selection finds, where that asks the teacher."""
    select = settings_of(context.study, trial.method).select
    if select == "angular":
        angular = angular_distances(context, trial.seed, trial.blocks)
        span = nearest_spans(angular, trial.blocks - trial.depth)[0]
        return replace(trial, kept=outside(span, trial.blocks))
    if select == "greedy":
        return replace(trial, kept=removal(context, trial.seed, trial.blocks).kept(trial.depth))
    return trial


def _cut_teacher(context: Context, trial: Trial) -> Recommender:
    model = context.trained(whole_trial("full", trial.seed, trial.blocks))
    keep_blocks(model.backbone, trial.kept)
    return model


def _seconds_of_teacher(context: Context, trial: Trial) -> float:
    """How long the teacher was trained."""
    record = read_record(context.trial_folder(whole_trial("full", trial.seed, trial.blocks)))
    return float(record["costs"]["training"]["seconds"]) if record else 0.0


def _train(
    context: Context, trial: Trial, model: Recommender, objective: nn.Module | None = None
) -> Result:
    """Train a recommender on the next item, or on an objective that holds it."""
    encoder, recipe = _SharedPrompt(model), budgeted(context, trial, model)
    done = _fit(
        context,
        trial,
        objective or NextItem(model, recipe),
        recipe,
        lambda: context.validate(encoder.refresh()),
    )
    ranks = evaluate(encoder.refresh(), context.test, device=context.device)
    epoch = _counted(lambda: trained_epoch(context, trial, model))
    return Result(
        trial,
        ranks,
        count_parameters(model),
        flops=_counted(partial(_flops, context, trial, model)),
        fit=done,
        model=model,
        training_flops=epoch and epoch * done.epochs,
    )


def _fit(
    context: Context,
    trial: Trial,
    objective: nn.Module,
    recipe: Recipe,
    validate: Callable[[], float],
) -> Fit:
    with context.tracked(trial) as track:
        return fit(
            objective,
            context.windows,
            recipe=recipe,
            validate=validate,
            seed=trial.seed,
            device=context.device,
            log=context.log,
            track=track,
            checkpoint=context.checkpoint(trial),
            result=result_file(context, trial, objective, recipe),
        )


def _flops(context: Context, trial: Trial, model: Recommender, *, depth: int | None = None) -> int:
    """FLOPs of a user with the median history of the test."""
    length = int(np.median([len(history) for history in context.test.histories]))
    return flops_per_user(model, length, depth=depth, known=context.products[trial.kept])


def _counted(count: Callable[[], int]) -> int | None:
    """A count, or None for a model with kernels of its own: no reason to lose its training."""
    try:
        return count()
    except ValueError:
        return None


class _SharedPrompt(Encoder):
    """A recommender whose prompt is run once for a whole evaluation."""

    def __init__(self, model: Recommender) -> None:
        self._model = model
        self._prompt: Cache | None = None

    def refresh(self) -> _SharedPrompt:
        """Run the prompt at the present weights."""
        with torch.inference_mode():
            self._prompt = self._model.prepare_prompt()
        return self

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """(B, T), (B,) -> (B, d_item)."""
        return self._model.encode(histories, lengths, self._prompt)

    def item_matrix(self) -> Tensor:
        """(I + 1, d_item)."""
        return self._model.item_matrix()
