"""What each task of a sweep takes: training steps, users encoded, scores; times their seconds.

Trainings are counted to their last epoch: early stopping may end them sooner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from depthprobe.methods import Task, Trial, base_of, names
from depthprobe.probing.readout import Fitting
from depthprobe.probing.walk import Route, blocks_run, route, route_without
from depthprobe.runs.forecast import Job
from depthprobe.runs.pieces import Rates, Sizes, between
from depthprobe.runs.probing import TAYLOR_USERS
from depthprobe.study import Recipe, Study, parse_layers, settings_of
from depthprobe.training.distillation import feature_spec

RANKED = 3  # times the best ten items' seconds: ranks by two protocols, and the lists


def steps_an_epoch(recipe: Recipe, sizes: Sizes, processes: int = 1) -> int:
    """Batches of an epoch."""
    return math.ceil(sizes.windows / (recipe.batch_size * processes))


def jobs_of(
    study: Study,
    tasks: Sequence[Task],
    sizes: Sizes,
    rates: Rates,
    *,
    there: frozenset[str] = frozenset(),
    processes: int = 1,
) -> list[Job]:
    """The jobs of the tasks, and of what the first that asks for it makes for all of a seed.

    Args:
        there: of :func:`features_id` and :func:`greedy_id`, those that have been made before.
        processes: that train together.
    """
    jobs: list[Job] = []
    made = set(there)
    for task in tasks:
        needs = list(task.needs)
        for name, seconds in _shared(study, task, sizes, rates):
            needs.append(name)
            if name not in made:
                made.add(name)
                jobs.append(Job(name, seconds, task.needs, task.method))
        seconds = _seconds(study, task, sizes, rates, processes)
        jobs.append(Job(task.id, seconds, tuple(needs), task.method))
    return jobs


def features_id(seed: int, objective: str) -> str:
    """What the teacher's features of a seed are called among the jobs."""
    return f"features-s{seed}-{objective}"


def greedy_id(seed: int) -> str:
    """What the greedy removal of a seed is called among the jobs."""
    return f"removal-s{seed}"


def features_of(study: Study, task: Task) -> str | None:
    """The features on disk that a task follows, by :func:`features_id`; None for most tasks."""
    if base_of(task.method) != "distill":
        return None
    settings = settings_of(study, task.method)
    wanted = feature_spec(
        settings.distillation,
        settings.recipe,
        depth=task.trials[0].depth,
        teacher_depth=task.blocks,
    )
    if settings.distillation.features == "online":
        return None
    asks = wanted.ends or wanted.vectors or wanted.top
    return features_id(task.seed, wanted.objective) if asks else None


def asks_greedy(study: Study, task: Task) -> bool:
    """Whether a task asks which blocks the teacher's greedy removal leaves."""
    return task.method == "greedy" or settings_of(study, task.method).select == "greedy"


def _shared(study: Study, task: Task, sizes: Sizes, rates: Rates) -> list[tuple[str, float]]:
    """What a task needs beside trials, and the seconds it takes to make."""
    whole, found = rates.encode_of(task.blocks) if task.needs and task.blocks else 0.0, []
    if (features := features_of(study, task)) is not None:
        # every position is read out, not the last alone: about one more pass
        found.append((features, 2 * whole * sizes.windows))
    if asks_greedy(study, task):
        # all single skips at each removal: more than the lazy search ever takes
        passes = task.blocks**2 / 6 + 1
        models = task.blocks * (task.blocks + 1) / 2
        each = passes * whole + models * RANKED * rates.score
        found.append((greedy_id(task.seed), each * sizes.validation))
    return found


def _seconds(study: Study, task: Task, sizes: Sizes, rates: Rates, processes: int) -> float:
    base = base_of(task.method)
    if base == "popularity":
        return RANKED * rates.score * sizes.test
    if base not in ("sasrec", "full", *names("trained", "control")):
        return probe_seconds(study, task, sizes, rates)
    settings, depth = settings_of(study, task.method), task.trials[-1].depth
    recipe = study.sasrec.recipe if base == "sasrec" else settings.recipe
    encode = rates.encode["sasrec"] if base == "sasrec" else rates.encode_of(depth)
    read = len(task.trials) + 1 if base == "elastic" else 1  # every depth is read out
    a_user = encode + read * RANKED * rates.score
    step = rates.step_of(study, task.method, depth, task.blocks)
    if base != "sasrec":  # a smaller batch is not taken to be faster
        step *= max(1.0, recipe.batch_size / rates.batch)
    an_epoch = steps_an_epoch(recipe, sizes, processes) * step + sizes.validation * a_user
    seconds = epochs_of(study, task, rates, recipe) * an_epoch + sizes.test * a_user
    if settings.select == "angular":
        seconds += sizes.validation * rates.encode_of(task.blocks)
    return seconds


def epochs_of(study: Study, task: Task, rates: Rates, recipe: Recipe) -> int:
    """At most so many epochs; under ``budget = "compute"`` more for a shallower model."""
    if study.budget == "steps" or task.method in (*names("baseline"), "full"):
        return recipe.epochs
    depth, models = task.trials[-1].depth, 1
    if base_of(task.method) == "elastic":
        models += sum(d < task.blocks for d in parse_layers(study.layers, task.blocks))
    ratio = rates.flops[task.blocks] / rates.flops[depth] if rates.flops else math.nan
    if math.isnan(ratio):  # it can't be counted: what it takes in place of what it computes
        ratio = between(rates.step, "train:", task.blocks) / between(rates.step, "train:", depth)
    return max(1, round(recipe.epochs * models * ratio))


def probe_seconds(study: Study, task: Task, sizes: Sizes, rates: Rates) -> float:
    """Seconds of a method that reads the trained teacher: passes over users, and rankings."""
    base, blocks = base_of(task.method), task.blocks
    whole, rank = rates.encode_of(blocks), RANKED * rates.score
    every = (blocks + 1) * rank
    if base == "similarity":
        return whole * sizes.validation
    if base == "taylor":
        return 3 * whole * min(TAYLOR_USERS, sizes.validation)
    if base in ("early-exit", "early-exit-raw", "settling"):
        return (whole + every) * sizes.test
    if base in ("readout", "tuned-lens"):
        # a step goes through the catalogue at each depth, two times for a teacher's scores
        goes = 2 if base == "readout" else 4
        an_epoch = (blocks + 1) * goes * rates.score * sizes.windows + every * sizes.validation
        passes = whole * (sizes.windows + sizes.validation)
        return passes + Fitting().epochs * an_epoch + (whole + every) * sizes.test
    ranked = len(task.trials) * rank * sizes.test
    seconds = ranked + _walked(study, task) / blocks * whole * sizes.test
    if base == "replace":  # with states of all positions, in float64
        seconds += 4 * whole * sizes.validation
    return seconds + (whole * sizes.validation if base in ("span", "replace") else 0.0)


def _walked(study: Study, task: Task) -> int:
    """How many blocks a task runs for a user; at most so many where blocks are found on the way."""
    base = base_of(task.method)
    if base in ("greedy", "replace") or (base == "span" and study.probing.spans):
        return sum(trial.depth for trial in task.trials)
    return blocks_run([_route(trial) for trial in task.trials])


def _route(trial: Trial) -> Route:
    if trial.dropped is None:
        return route(trial.kept)
    part: Literal["attention", "mlp"] = "mlp" if trial.method == "drop-mlp" else "attention"
    return route_without(part, trial.dropped, trial.blocks)


def timing_seconds(study: Study, blocks: int, rates: Rates, *, whole: bool) -> float:
    """Seconds of the timing of every depth with which a run begins, alone on the machine."""
    methods = [name for name in study.methods if name not in names("baseline")]
    layers = [study.layers, *(settings_of(study, name).layers for name in methods)]
    depths = {blocks, *(d for each in layers for d in parse_layers(each, blocks))} if whole else ()
    a_round = rates.step["train:sasrec"] + study.cost.batch_size * rates.encode["sasrec"]
    for depth in depths:
        step = rates.step_of(study, "full", depth, blocks)
        student = rates.step_of(study, "distill", depth, blocks) if depth < blocks else step
        a_round += step + student + study.cost.batch_size * rates.encode_of(depth)
    return (study.cost.warmup + study.cost.rounds) * a_round
