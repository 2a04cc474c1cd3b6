"""How long things take: the times that a run measures once, and the estimate of what is left.

A method's record says its work in units; the timing rig measures their seconds. Both multiplied are
the jobs of a sweep, which are then dealt out to workers as the scheduler does.
"""

from __future__ import annotations

import heapq
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.cost.flops import UncountableError, product_counter, score_flops
from depthprobe.cost.timing import (
    Action,
    cut_copy,
    encode_actions,
    optimizer_of,
    step,
)
from depthprobe.cost.timing import measure as run_rig
from depthprobe.data.batches import length_buckets, pad
from depthprobe.data.splits import Split
from depthprobe.methods import RANKED, Sizes, Task, Trial, method_of
from depthprobe.models.build import build_recommender
from depthprobe.models.recommender import Recommender
from depthprobe.runs.context import Context
from depthprobe.study import Recipe, Study, parse_layers, settings_of
from depthprobe.training.distillation import Distiller, feature_spec
from depthprobe.training.features import CachedTeacher, OnlineTeacher, Teacher, write_features
from depthprobe.training.objectives import ElasticObjective, NextItem, make_batch

# --- measuring -------------------------------------------------------------------------------


def measure(
    context: Context,
    blocks: int,
    *,
    seconds: float | None = None,
    width: int | None = None,
    all_depths: bool = True,
) -> dict[str, Any]:
    """Seconds of each action, and the conditions they hold under: what ``timing.json`` holds.

    Actions are those of :mod:`depthprobe.cost.timing`, on typical users and windows: ``encode:K``,
    ``latency:K``, ``train:K`` for K blocks; ``encode:sasrec`` and ``train:sasrec``; ``score``; a
    step of each distilled or elastic method of the study, as ``distill:K``. The model has random
    weights: the time of a matrix product does not depend on what it multiplies.

    Args:
        seconds: in place of the study's budget.
        width: of the item table, where the run does not have it yet.
        all_depths: else the shallowest depth of each method and the full one alone.
    """
    study, settings, device, recipe = (
        context.study,
        context.study.cost,
        context.device,
        context.study.recipe,
    )
    depths = _depths(study, blocks, all_depths=all_depths)
    histories, lengths = _typical_users(context, settings.batch_size)
    table = torch.randn(context.sequences.n_items + 1, width or context.item_width)
    models: dict[int, Recommender] = {}
    if depths:
        full = build_recommender(
            study.backbone,
            table,
            seed=0,
            random_init=study.backbone.quantize == "none",
            train_items=study.trains_items,
        ).to(device)
        models = {depth: cut_copy(full, depth) for depth in depths}
    baseline = context.new_sasrec(0) if _times_sasrec(study) else None
    shapes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:

        def make(size: int) -> dict[str, Action]:
            windows = _typical_windows(context, size)
            batch = make_batch(windows, np.arange(len(windows)), device, recipe.objective)
            users = slice(max(1, min(settings.batch_size, size)))
            shapes.update(batch=len(histories[users]), length=histories.shape[1])
            shapes.update(train_batch=len(windows), train_length=batch.inputs.shape[1])
            timed: dict[str, Any] = {str(depth): model for depth, model in models.items()}
            if baseline is not None:
                timed["sasrec"] = baseline
            items = models[blocks].item_matrix() if models else table.to(device)
            actions = encode_actions(timed, histories[users], lengths[users], items=items.detach())
            objectives: dict[str, nn.Module] = {
                f"train:{depth}": NextItem(model, recipe) for depth, model in models.items()
            }
            for method, depth in _own_steps(study, models, blocks):
                place = Path(folder, f"{method}-{depth}-{size}")
                objective = _own_objective(
                    study, method, models[depth], models[blocks], windows, place
                )
                objectives[f"{method}:{depth}"] = objective.to(device)
            if models:
                optimizer = optimizer_of(*objectives.values())
                for name, objective in objectives.items():
                    loss = _loss(objective, batch)
                    passes = 3 if name.startswith("train:") else 4
                    work = passes * int(name.rpartition(":")[2]) * batch.inputs.numel()
                    call = step(loss, optimizer, bfloat16=recipe.precision == "bfloat16")
                    actions[name] = Action(call, work)
            if baseline is not None:
                own = study.sasrec.recipe
                windows = _typical_windows(context, own.batch_size)
                batch = make_batch(windows, np.arange(len(windows)), device, own.objective)
                loss = _loss(NextItem(baseline, own), batch)
                call = step(loss, optimizer_of(baseline), bfloat16=own.precision == "bfloat16")
                actions["train:sasrec"] = Action(call)
            return actions

        timing = run_rig(
            make,
            batch=recipe.batch_size,
            seconds=settings.seconds if seconds is None else seconds,
            warmup=settings.warmup,
            rounds=settings.rounds,
            device=device,
        )
    conditions = {
        "device": device.type,
        "dtype": study.backbone.dtype,
        "precision": recipe.precision,
        **shapes,
        "threads": torch.get_num_threads(),
        "warmup": timing.warmup,
        "rounds": timing.rounds,
    }
    return {
        "conditions": conditions,
        "seconds": timing.seconds,
        "left_out": list(timing.left_out),
        "peak_bytes": timing.peak.get("reserved", timing.peak.get("rss")),
    }


def covers(measured: dict[str, Any], context: Context, blocks: int) -> bool:
    """Whether the times hold all that the study's methods need."""
    study, depths = context.study, _depths(context.study, blocks)
    wanted = {f"encode:{depth}" for depth in depths}
    wanted |= {f"{method}:{depth}" for method, depth in _own_steps(study, depths, blocks)}
    if _times_sasrec(study):
        wanted.add("encode:sasrec")
    return wanted <= {*measured["seconds"], *measured.get("left_out", ())}


def timing_of(trial: Trial, measured: dict[str, Any], study: Study) -> dict[str, Any] | None:
    """The measured times that hold for a trial; None where its shape was not measured."""
    settings, seconds = settings_of(study, trial.method), measured["seconds"]
    sasrec = settings.method.settings == "sasrec"
    key = "sasrec" if sasrec else str(trial.depth)
    if f"encode:{key}" not in seconds:
        return None
    actions = {"encode": f"encode:{key}", "score": "score", "latency": f"latency:{key}"}
    alike = replace(settings.recipe, epochs=study.recipe.epochs) == study.recipe
    if sasrec or (settings.method.trains and alike):
        own = {"distillation": f"{trial.method}:{key}", "elastic": f"{trial.method}:{trial.blocks}"}
        actions["train_step"] = own.get(settings.method.settings, f"train:{key}")
    return {
        name: {"seconds": seconds[action]} for name, action in actions.items() if action in seconds
    }


def _times_sasrec(study: Study) -> bool:
    methods = [method_of(name) for name in study.methods]
    return any(
        method.settings == "sasrec" or (method.role != "baseline" and study.item_table == "sasrec")
        for method in methods
    )


def _depths(study: Study, blocks: int, *, all_depths: bool = True) -> list[int]:
    """Depths to time; none where the study has baselines alone."""
    if all(method_of(name).role == "baseline" for name in study.methods):
        return []
    layers = [study.layers, *(settings_of(study, name).layers for name in study.methods)]
    asked = [parse_layers(each, blocks) for each in layers]
    every = {depth for each in asked for depth in (each if all_depths else each[:1])}
    return sorted(every | {blocks})


def _own_steps(study: Study, depths: Collection[int], blocks: int) -> list[tuple[str, int]]:
    """Methods and depths with a step of their own, those of the study alone."""
    found = []
    for name in study.methods:
        settings = settings_of(study, name)
        if settings.method.settings == "distillation":
            own = set(parse_layers(settings.layers, blocks)) - {blocks}
            found += [(name, depth) for depth in sorted(own.intersection(depths))]
        elif settings.method.settings == "elastic" and blocks in depths:
            found.append((name, blocks))
    return found


def _own_objective(
    study: Study,
    method: str,
    model: Recommender,
    full: Recommender,
    windows: list[np.ndarray],
    folder: Path,
) -> nn.Module:
    """An elastic model; or a student of an untrained teacher, with features of its own."""
    settings, recipe = settings_of(study, method), study.recipe
    if settings.method.settings == "elastic":
        return ElasticObjective(model, settings.elastic, recipe)
    losses = settings.distillation
    spec = feature_spec(losses, recipe, depth=model.depth, teacher_depth=full.depth)
    teacher: Teacher = OnlineTeacher(cut_copy(full, full.depth).eval(), spec)
    if losses.features == "cached":
        folder.mkdir()
        device = full.item_matrix().device
        write_features(full.eval(), windows, spec, folder=folder, device=device)
        teacher = CachedTeacher(folder, windows, spec)
    follows = bool(spec.ends or spec.vectors or spec.top)
    goal = full.item_matrix().detach() if spec.vectors else None
    return Distiller(model, losses, recipe, teacher if follows else None, goal_items=goal)


def _loss(objective: nn.Module, batch: Any) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        value: Tensor = objective.train()(batch)
        return value

    return loss


def _typical_users(context: Context, size: int) -> tuple[Tensor, Tensor]:
    """A batch of real test users of about the median length, (B, T) and (B,)."""
    histories = context.test.histories
    chosen = [histories[i] for i in _middle([len(history) for history in histories], size)]
    lengths = torch.tensor([len(history) for history in chosen])
    return torch.from_numpy(pad(chosen)).to(context.device), lengths.to(context.device)


def _typical_windows(context: Context, size: int) -> list[np.ndarray]:
    """A batch of training windows of about the median length."""
    windows = context.windows
    return [windows[i] for i in _middle([len(window) for window in windows], size)]


def _middle(lengths: list[int], size: int) -> np.ndarray:
    batches = length_buckets(lengths, size)
    full = [batch for batch in batches if len(batch) == len(batches[0])]
    return full[len(full) // 2]


# --- units of work ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Units:
    """Seconds of each unit of work.

    Attributes:
        seconds: of a step of ``batch`` windows and of encoding a user, by action.
        score: of the best items of the catalogue for one user.
        flops: of training on a window, by depth; for a budget of compute.
    """

    batch: int
    seconds: Mapping[str, float]
    score: float
    flops: Mapping[int, float]

    def of(self, kind: str, depth: int | str) -> float:
        """Of ``encode``, ``train`` or a method's own step; each block adds the same."""
        found = self.seconds.get(f"{kind}:{depth}")
        if found is not None:
            return found
        known = sorted(
            (int(name.rpartition(":")[2]), value)
            for name, value in self.seconds.items()
            if name.rpartition(":")[0] == kind and name.rpartition(":")[2].isdigit()
        )
        if kind not in ("encode", "train"):
            # as many times a plain step as at the depths that were timed
            ratios = [value / self.of("train", own) for own, value in known]
            return self.of("train", depth) * (float(np.mean(ratios)) if ratios else 1.0)
        if not known or isinstance(depth, str):
            return math.nan
        (low, at_low), (high, at_high) = known[0], known[-1]
        if low <= depth <= high:
            depths, values = zip(*known, strict=True)
            return float(np.interp(depth, depths, values))
        slope = (at_high - at_low) / (high - low) if high > low else at_high / high
        return at_high + slope * (depth - high)


def units_of(
    measured: dict[str, Any], flops: Mapping[int, float], *, train_length: float, test_length: float
) -> Units:
    """What was measured, by unit.

    Args:
        train_length: the mean length of a batch of windows, padding included: longer batches than
            the typical ones take longer in proportion, shorter ones are not taken to be faster.
        test_length: of test users.
    """
    conditions, seconds = measured["conditions"], {}
    longer = max(1.0, train_length / conditions["train_length"])
    wider = max(1.0, test_length / conditions["length"]) / conditions["batch"]
    for name, values in measured["seconds"].items():
        kind = name.rpartition(":")[0]
        seconds[name] = float(np.median(values)) * (wider if kind == "encode" else longer)
    return Units(
        batch=conditions["train_batch"],
        seconds=seconds,
        score=float(np.median(measured["seconds"]["score"])) / conditions["batch"],
        flops=flops,
    )


def sizes_of(split: Split, study: Study) -> tuple[Sizes, float, float]:
    """How many windows and users a split has; the mean lengths of windows and test users."""
    longest, offsets = study.data.max_history, split.sequences.offsets
    windows = np.minimum(split.train_stop - offsets[:-1], longest + 1)
    inputs = windows[windows > 1] - 1
    histories = np.minimum(split.test.targets - offsets[split.test.users], longest)
    validation = min(len(split.validation.users), study.protocol.validation_users)
    sizes = Sizes(windows=len(inputs), validation=validation, test=len(histories))
    train_length = padded_length(inputs, study.recipe.batch_size, seed=0)
    return sizes, train_length, padded_length(histories, study.cost.batch_size)


def padded_length(lengths: np.ndarray, batch: int, *, seed: int | None = None) -> float:
    """The mean number of places in a row when each batch is as wide as its longest; NaN of none."""
    if not len(lengths):
        return math.nan
    widths = [lengths[each].max() * len(each) for each in length_buckets(lengths, batch, seed=seed)]
    return float(sum(widths) / len(lengths))


def window_flops(model: Recommender, length: int, objective: str) -> dict[int, float]:
    """FLOPs of a window and its scores by depth; none where the model can't be counted."""
    scored = 1 if objective == "last" else length
    try:
        products = product_counter(model)(length)
    except UncountableError:
        return {}
    depths = range(1, model.depth + 1)
    return {depth: products.total(depth) + score_flops(model, scored) for depth in depths}


# --- jobs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Something that one worker does in one go.

    Attributes:
        needs: ids of jobs that must have ended before; ids of none are of what is there already.
        method: whose time it is.
    """

    id: str
    seconds: float
    needs: tuple[str, ...] = ()
    method: str = ""


def jobs_of(
    study: Study,
    tasks: Sequence[Task],
    sizes: Sizes,
    units: Units,
    *,
    there: Collection[str] = (),
    processes: int = 1,
) -> list[Job]:
    """The jobs of the tasks, and of what the first that asks for it makes for all of a seed.

    Trainings are counted to their last epoch: early stopping may end them sooner.

    Args:
        there: of :func:`shared_by_tasks`, what has been made before.
        processes: that train together.
    """
    jobs: list[Job] = []
    made = set(there)
    for task in tasks:
        needs = list(task.needs)
        for name in shared_of(study, task):
            needs.append(name)
            if name not in made:
                made.add(name)
                jobs.append(
                    Job(name, _shared_seconds(name, task, sizes, units), task.needs, task.method)
                )
        seconds = _task_seconds(study, task, sizes, units, processes)
        jobs.append(Job(task.id, seconds, tuple(needs), task.method))
    return jobs


def features_id(seed: int, objective: str) -> str:
    """What the teacher's features of a seed are called among the jobs."""
    return f"features-s{seed}-{objective}"


def removal_id(seed: int) -> str:
    """What the greedy removal of a seed is called among the jobs."""
    return f"removal-s{seed}"


def shared_of(study: Study, task: Task) -> list[str]:
    """What a task needs beside trials: the teacher's features on disk, its greedy removal."""
    settings = settings_of(study, task.method)
    found = [removal_id(task.seed)] if settings.select == "greedy" else []
    losses = settings.distillation
    if settings.method.settings == "distillation" and losses.features == "cached":
        depth = task.trials[0].depth
        spec = feature_spec(losses, settings.recipe, depth=depth, teacher_depth=task.blocks)
        if spec.ends or spec.vectors or spec.top:
            found.append(features_id(task.seed, spec.objective))
    return found


def _shared_seconds(name: str, task: Task, sizes: Sizes, units: Units) -> float:
    full, blocks = units.of("encode", task.blocks), task.blocks
    if name == removal_id(task.seed):
        # all single skips at each removal: more than the lazy search ever takes
        each = (blocks**2 / 6 + 1) * full + blocks * (blocks + 1) / 2 * RANKED * units.score
        return each * sizes.validation
    return 2 * full * sizes.windows  # every position is read out: about one more pass


def _task_seconds(study: Study, task: Task, sizes: Sizes, units: Units, processes: int) -> float:
    settings = settings_of(study, task.method)
    method, recipe = settings.method, settings.recipe
    steps = math.ceil(sizes.windows / (recipe.batch_size * processes))
    sizes = replace(sizes, epochs=_epochs(study, task, units, recipe), steps=steps)
    work = method.work(task, sizes, study)
    seconds = work.score * units.score
    seconds += sum(users * units.of("encode", depth) for depth, users in work.encode.items())
    own = task.method if method.settings in ("distillation", "elastic") else "train"
    for depth, count in work.steps.items():
        # a smaller batch is not taken to be faster
        larger = 1.0 if depth == "sasrec" else max(1.0, recipe.batch_size / units.batch)
        seconds += count * larger * units.of(own, depth)
    if settings.select == "angular":
        seconds += sizes.validation * units.of("encode", task.blocks)
    return seconds


def _epochs(study: Study, task: Task, units: Units, recipe: Recipe) -> int:
    """At most so many epochs; under ``budget = "compute"`` more for a shallower model."""
    method = method_of(task.method)
    if study.budget == "steps" or method.role not in ("trained", "control"):
        return recipe.epochs
    depth, models = task.trials[-1].depth, 1
    if method.settings == "elastic":
        models += sum(d < task.blocks for d in parse_layers(study.layers, task.blocks))
    full, own = (units.flops.get(d, units.of("train", d)) for d in (task.blocks, depth))
    return max(1, round(recipe.epochs * models * full / own))


def schedule(jobs: Sequence[Job], workers: int, *, start: float = 0.0) -> float:
    """Seconds until the last job ends, if free workers take the first job that is ready.

    That is how a sweep deals its tasks out (list scheduling).

    Args:
        jobs: in the order in which they are looked at.
        workers: at least 1.
        start: seconds until a worker can begin.

    >>> sasrec, full = Job("sasrec", 2), Job("full", 5, ("sasrec",))
    >>> schedule([sasrec, full, Job("student", 1, ("full",)), Job("variant", 3, ("sasrec",))], 2)
    8.0
    """
    known = {job.id for job in jobs}
    waiting, ended = list(jobs), set[str]()
    running: list[tuple[float, int, str]] = []  # a heap: when it ends, its place, its id
    now, place = float(start) if jobs else 0.0, 0
    while waiting or running:
        while len(running) < workers:
            ready = next((job for job in waiting if not (known & {*job.needs}) - ended), None)
            if ready is None:
                break
            waiting.remove(ready)
            heapq.heappush(running, (now + ready.seconds, place, ready.id))
            place += 1
        if not running:
            raise ValueError(f"no job can begin: {', '.join(job.id for job in waiting[:3])}")
        now, _, name = heapq.heappop(running)
        ended.add(name)
    return now


def longest_chain(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """The jobs, each needing one before it, that take longest: no number of workers helps."""
    best: dict[str, tuple[float, tuple[Job, ...]]] = {"": (0.0, ())}
    for job in jobs:  # each comes after what it needs
        seconds, chain = max((best[need] for need in ("", *job.needs) if need in best), key=_first)
        best[job.id] = (seconds + job.seconds, (*chain, job))
    return max(best.values(), key=_first)[1]


def _first(pair: tuple[float, tuple[Job, ...]]) -> float:
    return pair[0]


def without_lost(tasks: Sequence[Task], lost: Collection[str]) -> list[Task]:
    """The tasks that can be done where some have failed: neither those nor what needs them."""
    gone, kept = set(lost), list[Task]()
    for task in tasks:  # each comes after what it needs
        if task.id in gone or gone & {*task.needs}:
            gone.add(task.id)
        else:
            kept.append(task)
    return kept
