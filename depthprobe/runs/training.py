"""The methods that are trained: baselines, the teacher, shallower models."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from depthprobe.cost.flops import UncountableError, epoch_flops, flops_per_user
from depthprobe.cost.size import count_parameters
from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import evaluate, mean_ndcg
from depthprobe.files import complete_folder
from depthprobe.methods import Task, Trial, method_of
from depthprobe.models.build import Shape, reshape
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.narrowing import UnitScores, plan_narrowing
from depthprobe.models.recommender import Popularity, Recommender
from depthprobe.probing.passes import early_exit
from depthprobe.probing.similarity import similarities
from depthprobe.probing.units import unit_scores
from depthprobe.probing.walk import greedy
from depthprobe.runs.cache import digest, features_folder, result_file, share_folder
from depthprobe.runs.context import Context, Result
from depthprobe.runs.plan import TEACHER, at_first_seed, full_trial, plan
from depthprobe.runs.probing import kept_by_states, part_of, removal, similar_states
from depthprobe.runs.records import (
    AGAIN,
    FULL,
    digests_in,
    intact,
    read_record,
    read_sealed,
    write_sealed,
)
from depthprobe.study import (
    STATE_SELECTIONS,
    TEACHER_SELECTIONS,
    Recipe,
    Settings,
    Study,
    parse_layers,
    settings_of,
)
from depthprobe.training.checkpoint import Fit, Weights, put_aside
from depthprobe.training.distillation import Distiller, feature_spec
from depthprobe.training.features import (
    CachedTeacher,
    FeatureSpec,
    OnlineTeacher,
    Teacher,
    write_features,
)
from depthprobe.training.loop import DivergedError, fit, trained
from depthprobe.training.objectives import ElasticObjective, NextItem, count_targets

logger = logging.getLogger(__name__)

# --- the methods ---------------------------------------------------------------------------------


def popularity(context: Context, task: Task) -> Iterator[Result]:
    """Rank items by how often they occur in the training data."""
    split, sequences = context.split, context.sequences
    users = range(sequences.n_users)
    training = np.concatenate([split.train_history(user) for user in users])
    model = Popularity(training, sequences.n_items).to(context.device)
    ranks = evaluate(model, context.test, device=context.device)
    yield Result(task.trials[0], ranks, count_parameters(model))


def sasrec(context: Context, task: Task, table: Tensor | None = None) -> Iterator[Result]:
    """Train SASRec; by default its item embeddings become the recommenders' item table.

    With a frozen ``table`` no other trial needs its weights, so they are not kept.
    """
    (trial,) = task.trials
    model, recipe = context.new_sasrec(trial.seed, table), context.study.sasrec.recipe
    objective = objective_of(settings_of(context.study, trial.method), model, recipe)
    done = train(context, trial, objective, recipe, lambda: context.validate(model))
    ranks = evaluate(model, context.test, device=context.device)
    kept = model if table is None else None
    yield Result(trial, ranks, count_parameters(model), fit=done, model=kept)


def fine_tune(context: Context, task: Task) -> Iterator[Result]:
    """Train the teacher, or a shallower model: cut from the backbone or the teacher, or random."""
    trial = _with_blocks(context, task.trials[0])
    if trial.method == TEACHER and context.study.backbone.own:
        return iter([_as_it_came(context, trial)])
    settings = settings_of(context.study, trial.method)
    seconds = _seconds_of_teacher(context, trial) if settings.needs_teacher else 0.0
    if settings.at_once < 1:
        return heal_in_stages(context, trial, teacher_seconds=seconds)
    model = _begin(context, trial, from_teacher=settings.method.settings == "heal")
    return train_recommender(context, trial, model, teacher_seconds=seconds)


def heal_in_stages(context: Context, trial: Trial, *, teacher_seconds: float) -> Iterator[Result]:
    """Cut and heal in stages: each stage removes a share of the blocks and trains equally long.

    Where a score chooses the blocks, it is computed again after each stage, on the model that is
    left (SLEB, arXiv 2402.09025; iterative pruning, arXiv 1506.02626). A killed training goes on in
    its stage, but a stage of less than a minute is repeated.
    """
    settings = settings_of(context.study, trial.method)
    depths = stage_depths(trial.blocks, trial.depth, settings.at_once)
    stages: list[Fit] = []
    if len(depths) > settings.recipe.epochs:
        message = "%d stages of one epoch each: more than the %d epochs of healing at once"
        logger.warning(message, len(depths), settings.recipe.epochs)
    flops: int | None = 0
    now = replace(trial, kept=tuple(range(trial.blocks)))
    model = _begin(context, now, from_teacher=True)
    for stage, depth in enumerate(depths, start=1):
        began = time.perf_counter()
        if stage == 1 and settings.select in TEACHER_SELECTIONS:  # by what all trials share
            kept = _with_blocks(context, replace(now, kept=now.kept[:depth])).kept
        else:
            kept = fewer_blocks(context, model, now, trial.kept, depth)
        logger.info("stage %d of %d: %d blocks", stage, len(depths), depth)
        keep_blocks(model.backbone, [now.kept.index(block) for block in kept])
        choosing = time.perf_counter() - began
        now = replace(now, kept=kept)
        recipe = budgeted(context, now, model)
        before, after = (recipe.epochs * n // len(depths) for n in (stage - 1, stage))
        recipe = replace(recipe, epochs=max(1, after - before))
        objective = objective_of(settings, model, recipe)
        done = train(context, now, objective, recipe, lambda: context.validate(model), stage=stage)
        done.seconds += choosing if stage > 1 else 0.0  # at first as any selection by the teacher
        counted = _counted(lambda: trained_epoch(context, now, model))  # noqa: B023 - called here
        flops = None if flops is None or counted is None else flops + done.epochs * counted
        stages.append(done)
    yield Result(
        now,
        evaluate(model, context.test, device=context.device),
        count_parameters(model),
        flops=_flops(context, now, model),
        fit=in_turn(stages),
        training_flops=flops,
        teacher_seconds=teacher_seconds,
        model=model,
    )


def stage_depths(blocks: int, depth: int, at_once: float) -> list[int]:
    """The depths of a gradual cut: a stage removes at most this share of the blocks.

    >>> stage_depths(12, 4, 0.34)
    [8, 6, 4]
    """
    depths = [blocks]
    while depths[-1] > depth:
        depths.append(max(depth, depths[-1] - max(1, int(at_once * depths[-1]))))
    return depths[1:]


def fewer_blocks(
    context: Context, model: Recommender, now: Trial, last: tuple[int, ...], depth: int
) -> tuple[int, ...]:
    """Choose which of a model's blocks to keep at a depth.

    The least important blocks go. Without a score it removes those that the ``last`` stage does not
    keep, starting from the deepest.
    """
    select, users = settings_of(context.study, now.method).select, context.validation
    if select == "greedy":
        places = greedy(model.eval(), users, device=context.device).kept(depth)
    elif select in STATE_SELECTIONS:
        states = similarities(model.eval(), users, device=context.device)
        places = kept_by_states(select, states, depth)
    else:
        spare = [block for block in now.kept if block not in last][: depth - len(last)]
        return tuple(sorted({*last, *spare}))
    return tuple(now.kept[place] for place in places)


def in_turn(stages: list[Fit]) -> Fit:
    """Merge successive trainings into one; the best epoch is that of the last."""
    last = stages[-1]
    return replace(
        last,
        epochs=sum(each.epochs for each in stages),
        steps=sum(each.steps for each in stages),
        seconds=sum(each.seconds for each in stages),
        tuning_seconds=sum(each.tuning_seconds for each in stages),
        best_epoch=sum(each.epochs for each in stages[:-1]) + last.best_epoch,
        losses=[loss for each in stages for loss in each.losses],
        scores=[score for each in stages for score in each.scores],
        reused=all(each.reused for each in stages),
        resumed_at=[step for each in stages for step in each.resumed_at],
        threads=[count for each in stages for count in each.threads],
    )


def _as_it_came(context: Context, trial: Trial) -> Result:
    """The user's own recommender: a teacher that is not trained further."""
    model = context.teacher(trial.seed, trial.blocks)
    ranks = evaluate(model, context.test, device=context.device)
    flops = _flops(context, trial, model)
    validation = context.validate(model)
    return Result(trial, ranks, count_parameters(model), flops=flops, validation=validation)


def distill(context: Context, task: Task) -> Iterator[Result]:
    """Train a student to follow the teacher."""
    trial = _with_blocks(context, task.trials[0])
    settings = settings_of(context.study, trial.method)
    weights = settings.distillation
    teacher, seconds = teacher_for(context, trial)
    from_teacher = weights.init == "teacher"
    student = _begin(context, trial, from_teacher=from_teacher)
    student.train()
    torch.manual_seed(trial.seed)
    spec, goal = spec_of(settings, trial), None
    if spec is not None and spec.vectors:
        goal = context.teacher(trial.seed, trial.blocks).item_matrix().detach()
    distiller = objective_of(settings, student, settings.recipe, teacher, goal).to(context.device)
    chosen_by = settings.select in TEACHER_SELECTIONS or settings.width < 1
    if teacher is not None or from_teacher or chosen_by:
        seconds += _seconds_of_teacher(context, trial)
    return train_recommender(context, trial, student, distiller, teacher_seconds=seconds)


def elastic(context: Context, task: Task) -> Iterator[Result]:
    """Train one model for all depths: each prefix is a trial, and the deepest holds the weights."""
    deepest = task.trials[-1]
    settings = settings_of(context.study, deepest.method)
    model = context.new_recommender(deepest)
    recipe = budgeted(context, deepest, model)

    def validate() -> float:
        every = early_exit(model.eval(), context.validation, device=context.device)
        return float(np.mean([mean_ndcg(ranks[FULL]) for ranks in every[1:]]))

    objective = objective_of(settings, model, recipe)
    done = train(context, deepest, objective, recipe, validate)
    ranks = early_exit(model, context.test, device=context.device)
    flops = _counted(lambda: done.epochs * trained_epoch(context, deepest, model))
    trainable = count_parameters(model)["trainable"]
    for trial in task.trials:
        yield Result(
            trial,
            ranks[trial.depth],
            part_of(model, trial) | {"trainable": trainable},
            flops=_flops(context, deepest, model, depth=trial.depth),
            fit=done,
            model=model if trial == deepest else None,
            training_flops=flops,
        )


def train_recommender(
    context: Context,
    trial: Trial,
    model: Recommender,
    objective: nn.Module | None = None,
    *,
    teacher_seconds: float = 0.0,
) -> Iterator[Result]:
    """Train a recommender on the next item, or on an objective that wraps it; then rank."""
    recipe = budgeted(context, trial, model)
    if objective is None:
        objective = objective_of(settings_of(context.study, trial.method), model, recipe)
    done = train(context, trial, objective, recipe, lambda: context.validate(model))
    yield Result(
        trial,
        evaluate(model, context.test, device=context.device),
        count_parameters(model),
        flops=_flops(context, trial, model),
        fit=done,
        training_flops=_counted(lambda: done.epochs * trained_epoch(context, trial, model)),
        teacher_seconds=teacher_seconds,
        model=model,
    )


def objective_of(
    settings: Settings,
    model: nn.Module,
    recipe: Recipe,
    teacher: Teacher | None = None,
    goal_items: Tensor | None = None,
) -> nn.Module:
    """Wrap a model in the loss that its method minimises.

    A student follows a ``teacher``: its outputs, and its scores of all items.
    """
    kind = settings.method.settings
    if kind == "elastic":
        return ElasticObjective(cast("Recommender", model), settings.elastic, recipe)
    if kind == "distillation":
        student, losses = cast("Recommender", model), settings.distillation
        # at most as many groups as the student has blocks with weights of their own
        losses = replace(losses, groups=min(losses.groups, student.depth // settings.loops))
        return Distiller(student, losses, recipe, teacher, goal_items=goal_items)
    return NextItem(model, recipe)


def train(
    context: Context,
    trial: Trial,
    objective: nn.Module,
    recipe: Recipe,
    validate: Callable[[], float],
    *,
    stage: int | None = None,
) -> Fit:
    """Train on the run's windows, and leave the model with its best validation weights.

    With several learning rates, seed 0 tries each from the same initial weights, and the other
    seeds take the best one. A trial of several trainings numbers its stages. Raises
    ``DivergedError`` if the loss is not finite at every learning rate.
    """
    rates = recipe.rates
    if len(rates) > 1 and trial.seed:
        first = at_first_seed(trial)
        record = read_record(context.trial_folder(first))
        if record is None or record.training is None or not record.training.learning_rate:
            raise ValueError(f"{first.id} has no learning rate for {trial.id}")
        rates = (record.training.learning_rate,)
    # of histories in words the model says how long they are
    readers = [m for m in objective.modules() if isinstance(m, Recommender) and m.words is not None]
    positions = readers[0].positions(context.windows) if readers else None
    several, best = len(rates) > 1, Fit()
    aside = context.checkpoint(trial).parent
    begun = best_weights = put_aside(trained(objective), aside) if several else Weights()
    tried: dict[str, float | None] = {}
    seconds = 0.0
    for rate in rates:
        _restore(objective, begun)
        own = replace(recipe, learning_rate=rate)
        result = result_file(context, trial, objective, own)
        try:
            with context.tracked(trial) as track:
                done = fit(
                    objective,
                    context.windows,
                    recipe=own,
                    validate=validate,
                    seed=trial.seed,
                    device=context.device,
                    positions=positions,
                    track=track,
                    checkpoint=context.checkpoint(trial, rate if several else None, stage),
                    result=result,
                )
        except DivergedError as error:
            if rate == rates[-1] and not best.steps:
                raise
            logger.warning("learning rate %g: %s", rate, error)
            tried[f"{rate:g}"] = None
            continue
        done.learning_rate, tried[f"{rate:g}"] = rate, done.best_score
        seconds += done.seconds
        if not best.steps or done.best_score > best.best_score:
            best = done
            best_weights = put_aside(trained(objective), aside) if several else Weights()
    _restore(objective, best_weights)
    if several:
        best.tried, best.tuning_seconds = tried, seconds - best.seconds
    return best


@torch.no_grad()
def _restore(objective: nn.Module, weights: Weights) -> None:
    for name, weight in objective.named_parameters():
        if name in weights:
            weight.copy_(weights[name])
    weights.leave_memory()


def _with_blocks(context: Context, trial: Trial) -> Trial:
    """The trial with its blocks filled in, if the teacher must choose them."""
    select = settings_of(context.study, trial.method).select
    if select == "greedy":
        return replace(trial, kept=removal(context, trial.seed, trial.blocks).kept(trial.depth))
    if select in STATE_SELECTIONS:
        states = similar_states(context, trial.seed, trial.blocks)
        return replace(trial, kept=kept_by_states(select, states, trial.depth))
    return trial


def _begin(context: Context, trial: Trial, *, from_teacher: bool) -> Recommender:
    """The trial's model before training: cut out of the teacher or of the backbone."""
    settings = settings_of(context.study, trial.method)
    scores = None if settings.width == 1 or settings.fresh else _unit_scores(context, trial)
    if not from_teacher:
        return context.new_recommender(trial, scores)
    model = context.trained(full_trial(TEACHER, trial.seed, trial.blocks))
    keep_blocks(model.backbone, trial.kept)
    reshape(model.backbone, Shape(settings.width, settings.loops, scores))
    return model


def _unit_scores(context: Context, trial: Trial) -> UnitScores:
    """How much each channel and head of the trial's blocks matters to the trained teacher."""
    settings = settings_of(context.study, trial.method)
    teacher = context.teacher(trial.seed, trial.blocks)
    scores = unit_scores(
        teacher,
        plan_narrowing(teacher.backbone, settings.width),
        context.training,
        by=settings.importance,
        device=context.device,
    )
    return {kind: each[list(trial.kept)] for kind, each in scores.items()}


def _seconds_of_teacher(context: Context, trial: Trial) -> float:
    """How long the teacher was trained."""
    record = read_record(context.trial_folder(full_trial(TEACHER, trial.seed, trial.blocks)))
    return record.training.seconds if record and record.training else 0.0


# --- how long: for as many steps as the teacher, or with as much compute -------------------------


def budgeted(context: Context, trial: Trial, model: Recommender) -> Recipe:
    """The trial's recipe; ``budget = "compute"`` gives it the compute of its teacher's training.

    The epochs are rounded, at least one. An elastic model takes the place of the teacher and of one
    model at each depth, so it gets the compute of all of them.
    """
    settings = settings_of(context.study, trial.method)
    recipe = settings.recipe
    if context.study.budget == "steps" or trial.method == TEACHER:
        return recipe
    teacher = full_trial(TEACHER, trial.seed, trial.blocks)
    full = trained_epoch(context, teacher, context.new_recommender(teacher))
    models = models_in(context.study, trial.method, trial.blocks)
    own = trained_epoch(context, trial, model)
    return replace(recipe, epochs=max(1, round(recipe.epochs * models * full / own)))


def models_in(study: Study, method: str, blocks: int) -> int:
    """How many models a training replaces: an elastic one, the teacher and one per depth."""
    if method_of(method).settings != "elastic":
        return 1
    return 1 + sum(depth < blocks for depth in parse_layers(study.layers, blocks))


def trained_epoch(context: Context, trial: Trial, model: Recommender) -> int:
    """FLOPs of one epoch of a trial's training; for distillation, without the teacher's."""
    settings = settings_of(context.study, trial.method)
    lengths = model.positions(context.training.histories)
    positions = int(count_targets(context.windows, settings.recipe.objective).sum())
    scored: float = positions
    if settings.method.settings == "elastic":
        scored *= 1 + min(settings.elastic.exits, model.depth - 1)
    if settings.method.settings == "distillation":
        losses = settings.distillation
        compared = len(lengths) if losses.positions == "last" else positions
        followed = compared if losses.logits and not losses.top else 0
        inner = min(losses.groups, trial.depth) - 1 if losses.supervision else 0
        scored = positions * bool(losses.ce) + followed + inner * len(lengths)
    return epoch_flops(model, lengths, scored=scored, known=context.known_products(trial))


def _flops(
    context: Context, trial: Trial, model: Recommender, *, depth: int | None = None
) -> int | None:
    """FLOPs of a user with the median history of the test."""
    length = int(np.median(model.positions(context.test.histories)))
    known = context.known_products(trial)
    return _counted(lambda: flops_per_user(model, length, depth=depth, known=known))


def _counted(count: Callable[[], int]) -> int | None:
    """A count of FLOPs; None if the model's own kernels can't be counted, which is no failure."""
    try:
        return count()
    except UncountableError as error:
        logger.warning("FLOPs are not counted: %s", error)
        return None


# --- the teacher's features: computed once for all students of a seed ----------------------------

FEATURES, SECONDS = "features", "seconds.json"


def teacher_for(context: Context, trial: Trial) -> tuple[Teacher | None, float]:
    """The teacher outputs that a student follows, and the seconds they took; else None."""
    settings = settings_of(context.study, trial.method)
    spec = spec_of(settings, trial)
    if spec is None:
        return None, 0.0
    if settings.distillation.features == "online":
        return OnlineTeacher(context.teacher(trial.seed, trial.blocks), spec), 0.0
    folder = _features(context, trial, spec)
    seconds = read_sealed(folder / SECONDS, AGAIN)["seconds"]
    return CachedTeacher(folder, context.windows, spec), float(seconds)


def _features(context: Context, trial: Trial, spec: FeatureSpec) -> Path:
    """The folder of features that all students of a seed share; the first student makes it.

    A hash of the teacher's weights is part of its name, so features of another teacher are never
    read. Only those of other teachers are deleted: another sweep may be using those of this one.
    """
    together = _of_all_students(context, trial, spec)
    teacher = context.teacher_digest(trial.seed, trial.blocks)
    stem = f"{FEATURES}-s{trial.seed}-{together.objective}-"
    folder = context.shared / f"{stem}{teacher}-{digest(asdict(together))[:12]}"
    with FileLock(context.shared / f".{stem}lock"):
        if is_whole(folder):
            return folder
        for other in context.shared.glob(f"{stem}*"):
            if not other.name.startswith(f"{stem}{teacher}-"):
                shutil.rmtree(other)
        kept = features_folder(context, teacher, together)
        if kept is not None and is_whole(kept):
            logger.info("teacher features of seed %d: from the cache", trial.seed)
            share_folder(kept, folder)
            return folder
        logger.info("teacher features of seed %d: computed for all students", trial.seed)
        model, windows = context.teacher(trial.seed, trial.blocks), context.windows
        began = time.perf_counter()
        with complete_folder(folder, parents=False) as temporary:
            write_features(model, windows, together, folder=temporary, device=context.device)
            seconds = time.perf_counter() - began
            own = {"seconds": seconds, "files": digests_in(temporary)}
            write_sealed(temporary / SECONDS, own)
        if kept is not None:
            with suppress(OSError):  # a cache that fails must not end this trial
                share_folder(folder, kept)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder of features is complete."""
    try:
        for name, digest in read_sealed(folder / SECONDS, AGAIN).get("files", {}).items():
            intact(folder / name, digest, AGAIN)
    except FileNotFoundError:
        return False
    except BadInput as error:
        logger.warning("%s", error)
        return False
    return True


def _of_all_students(context: Context, trial: Trial, spec: FeatureSpec) -> FeatureSpec:
    """The specification of features that serves every student of the study.

    It does not depend on the trial, so all of them share one folder.
    """
    study, specs = context.study, list[FeatureSpec]()
    for task in plan(study, trial.blocks):
        settings = settings_of(study, task.method)
        if settings.method.settings == "distillation" and task.seed == trial.seed:
            specs += [each for trial in task.trials if (each := spec_of(settings, trial))]
    specs = [each for each in specs if each.objective == spec.objective]
    return FeatureSpec(
        objective=spec.objective,
        ends=tuple(sorted({end for each in specs for end in each.ends})),
        vectors=any(each.vectors for each in specs),
        top=max(each.top for each in specs),
    )


def spec_of(settings: Settings, trial: Trial) -> FeatureSpec | None:
    """Which of the teacher's outputs a trial follows; None if it has no teacher."""
    if settings.method.settings != "distillation":
        return None
    losses, recipe, depth = settings.distillation, settings.recipe, trial.depth
    spec = feature_spec(losses, recipe, depth=depth, teacher_depth=trial.blocks)
    return spec if spec.ends or spec.vectors or spec.top else None
