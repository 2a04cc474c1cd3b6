"""How long a model is trained: for as many steps as its teacher, or with as much compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from depthprobe.cost.flops import epoch_flops
from depthprobe.models.recommender import Recommender
from depthprobe.study import Recipe, parse_layers, settings_of
from depthprobe.sweep.context import Context
from depthprobe.sweep.plan import Trial, whole_trial
from depthprobe.training.objectives import asked


def budgeted(context: Context, trial: Trial, model: Recommender) -> Recipe:
    """The trial's recipe; under ``budget = "compute"`` with the epochs that its teacher's buy.

    Rounded to whole epochs, one at least. ``elastic`` stands for a variant at each asked depth and
    for the teacher, and gets the compute of them all.
    """
    settings = settings_of(context.study, trial.method)
    recipe = settings.recipe
    if context.study.budget == "steps" or trial.method == "full":
        return recipe
    whole = _whole_epoch(context, trial)
    models = 1
    if settings.base == "elastic":
        below = [d for d in parse_layers(context.study.layers, trial.blocks) if d < trial.blocks]
        models = 1 + len(below)
    own = trained_epoch(context, trial, model)
    return replace(recipe, epochs=max(1, round(recipe.epochs * models * whole / own)))


def trained_epoch(context: Context, trial: Trial, model: Recommender) -> int:
    """FLOPs of an epoch of a trial's training; of distillation without its teacher's."""
    settings = settings_of(context.study, trial.method)
    lengths = np.array([len(window) - 1 for window in context.windows])
    positions = int(asked(context.windows, settings.recipe.objective).sum())
    scored: float = positions
    if settings.base == "elastic":
        scored *= 1 + min(settings.elastic.exits, model.depth - 1)
    if settings.base == "distill":
        losses = settings.distillation
        compared = len(lengths) if losses.positions == "last" else positions
        followed = compared if losses.logits and not losses.top else 0
        inner = min(losses.groups, model.depth) - 1 if losses.supervision else 0
        scored = positions * bool(losses.ce) + followed + inner * len(lengths)
    return epoch_flops(model, lengths, scored=scored, known=context.products[trial.kept])


def _whole_epoch(context: Context, trial: Trial) -> int:
    """FLOPs of an epoch of the teacher's."""
    whole = whole_trial("full", trial.seed, trial.blocks)
    return trained_epoch(context, whole, context.new_recommender(whole))
