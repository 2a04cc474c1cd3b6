"""The times that a run measures once before its trials, and what they say of the work to do.

A method's record says its work in units; the timing rig measures their seconds. Both multiplied are
the jobs of a sweep, which are then dealt out to workers as the scheduler does.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor, nn

from depthprobe.cost import timing as rig
from depthprobe.cost.timing import Action
from depthprobe.data.batches import length_buckets, pad
from depthprobe.data.splits import Split
from depthprobe.methods import RANKED, Sizes, Task, Trial, method_of
from depthprobe.models.build import build_recommender
from depthprobe.models.recommender import Recommender
from depthprobe.runs.context import Context
from depthprobe.study import Recipe, Study, parse_layers, settings_of
from depthprobe.training.distillation import Distiller, feature_spec
from depthprobe.training.features import FeatureSpec, OnlineTeacher, Teacher, TeacherOutputs
from depthprobe.training.objectives import (
    Batch,
    ElasticObjective,
    NextItem,
    last_only,
    make_batch,
)

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

    Actions are those of :mod:`depthprobe.cost.timing`, on typical users and windows, for each depth
    and for ``sasrec``; and a step of each distilled or elastic method of the study, as
    ``distill:K``. The model has random weights: the time of a matrix product does not depend on
    what it multiplies.

    Args:
        seconds: in place of the study's budget.
        width: of the item table, where the run does not have it yet.
        all_depths: else the shallowest depth of each method and the full one alone.
    """
    study, cost, device = context.study, context.study.cost, context.device
    items = torch.randn(context.sequences.n_items + 1, width or context.item_width)
    models: dict[int, Recommender] = {}
    if depths := _depths(study, blocks, all_depths=all_depths):
        random_init = study.backbone.quantize == "none"
        full = build_recommender(
            study.backbone, items, seed=0, random_init=random_init, train_items=study.trains_items
        ).to(device)
        models = {depth: rig.cut_copy(full, depth) for depth in depths}
        items = full.item_matrix().detach()
    timing = rig.measure(
        lambda size: _actions(context, models, items.to(device), size),
        batch=study.recipe.batch_size,
        seconds=cost.seconds if seconds is None else seconds,
        warmup=cost.warmup,
        rounds=cost.rounds,
        device=device,
    )
    histories, _ = _typical_users(context, timing.batch)
    inputs = _typical_batch(context, timing.batch, study.recipe).inputs
    conditions = {
        "device": device.type,
        "dtype": study.backbone.dtype,
        "precision": study.recipe.precision,
        "batch": len(histories),
        "length": histories.shape[1],
        "train_batch": len(inputs),
        "train_length": inputs.shape[1],
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


def _actions(
    context: Context, models: dict[int, Recommender], items: Tensor, size: int
) -> dict[str, Action]:
    """All that is timed, with steps of so many windows."""
    study, recipe = context.study, context.study.recipe
    histories, lengths = _typical_users(context, size)
    batch = _typical_batch(context, size, recipe)
    timed: dict[str, Any] = {str(depth): model for depth, model in models.items()}
    steps: dict[str, nn.Module] = {
        f"train:{depth}": NextItem(model, recipe) for depth, model in models.items()
    }
    for method, depth in _own_steps(study, models, max(models, default=0)):
        steps[f"{method}:{depth}"] = _own_objective(context, method, models, depth, batch)
    plain = {}
    if _times_sasrec(study):
        timed["sasrec"], own = context.new_sasrec(0), study.sasrec.recipe
        plain["train:sasrec"] = Action(
            _step(NextItem(timed["sasrec"], own), _typical_batch(context, own.batch_size, own))
        )
    actions = rig.encode_actions(timed, histories, lengths, items=items) | plain
    optimizer = rig.optimizer_of(*steps.values()) if steps else None
    for name, objective in steps.items():
        kind, _, depth_name = name.rpartition(":")
        work = (3 if kind == "train" else 4) * int(depth_name) * batch.inputs.numel()
        actions[name] = Action(_step(objective, batch, optimizer), work)
    return actions


def _step(objective: Any, batch: Batch, optimizer: torch.optim.Optimizer | None = None) -> Any:
    half = objective.recipe.precision == "bfloat16"
    optimizer = optimizer or rig.optimizer_of(objective)
    return rig.step(lambda: objective.train()(batch), optimizer, bfloat16=half)


def _own_objective(
    context: Context,
    method: str,
    models: Mapping[int, Recommender],
    depth: int,
    batch: Batch,
) -> nn.Module:
    """An elastic model; or a student of an untrained teacher."""
    settings, recipe = settings_of(context.study, method), context.study.recipe
    model, full = models[depth], models[max(models)]
    if settings.method.settings == "elastic":
        return ElasticObjective(model, settings.elastic, recipe)
    losses = settings.distillation
    spec = feature_spec(losses, recipe, depth=model.depth, teacher_depth=full.depth)
    teacher: Teacher = OnlineTeacher(rig.cut_copy(full, full.depth).eval(), spec)
    if losses.features == "cached":
        teacher = _MadeUp(spec, full, last_only(batch) if spec.objective == "last" else batch)
    follows = bool(spec.ends or spec.vectors or spec.top)
    goal = full.item_matrix().detach() if spec.vectors else None
    student = Distiller(model, losses, recipe, teacher if follows else None, goal_items=goal)
    return student.to(context.device)


class _MadeUp:
    """A teacher's features of one batch, as random numbers: to compute them takes a full pass."""

    def __init__(self, spec: FeatureSpec, full: Recommender, batch: Batch) -> None:
        count, items = batch.count, full.item_matrix()
        device, width = items.device, items.shape[1]
        states = torch.randn(len(spec.ends), count, full.width, device=device)
        top = torch.randint(1, len(items), (count, spec.top), dtype=torch.int32, device=device)
        self.outputs = TeacherOutputs(
            states=states if spec.ends else None,
            vectors=torch.randn(count, width, device=device) if spec.vectors else None,
            top=top if spec.top else None,
            scores=torch.randn(count, spec.top, device=device) if spec.top else None,
        )

    def at(self, batch: Batch) -> TeacherOutputs:
        """The same for every batch."""
        return self.outputs


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
    needed = study.item_table == "sasrec" and any(each.role != "baseline" for each in methods)
    return needed or any(each.settings == "sasrec" for each in methods)


def _depths(study: Study, blocks: int, *, all_depths: bool = True) -> list[int]:
    """Depths to time; none where the study has baselines alone."""
    if all(method_of(name).role == "baseline" for name in study.methods):
        return []
    layers = [study.layers, *(settings_of(study, name).layers for name in study.methods)]
    asked = [parse_layers(each, blocks) for each in layers]
    return sorted({blocks, *(d for each in asked for d in (each if all_depths else each[:1]))})


def _own_steps(study: Study, depths: Collection[int], blocks: int) -> list[tuple[str, int]]:
    """Methods of the study that have a step of their own, and the depths to time it at."""
    found = []
    for name in study.methods:
        settings = settings_of(study, name)
        if settings.method.settings == "distillation":
            own = set(parse_layers(settings.layers, blocks)) - {blocks}
            found += [(name, depth) for depth in sorted(own.intersection(depths))]
        elif settings.method.settings == "elastic" and blocks in depths:
            found.append((name, blocks))
    return found


def _typical_users(context: Context, size: int) -> tuple[Tensor, Tensor]:
    """A batch of real test users of about the median length, (B, T) and (B,)."""
    histories = context.test.histories
    size = min(size, context.study.cost.batch_size)
    chosen = [histories[i] for i in _middle([len(history) for history in histories], size)]
    lengths = torch.tensor([len(history) for history in chosen])
    return torch.from_numpy(pad(chosen)).to(context.device), lengths.to(context.device)


def _typical_batch(context: Context, size: int, recipe: Recipe) -> Batch:
    """Training windows of about the median length."""
    chosen = _middle([len(window) for window in context.windows], size)
    return make_batch(context.windows, chosen, context.device, recipe.objective)


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
        """Of ``encode``, ``train`` or a method's own step; NaN if none of its kind was timed."""
        if f"{kind}:{depth}" in self.seconds:
            return self.seconds[f"{kind}:{depth}"]
        names = [name.rpartition(":") for name in self.seconds]
        known = sorted(int(d) for of_kind, _, d in names if of_kind == kind and d.isdigit())
        values = [self.seconds[f"{kind}:{each}"] for each in known]
        if kind not in ("encode", "train"):
            # as many times a plain step as at the depths that were timed
            ratios = [v / self.of("train", d) for d, v in zip(known, values, strict=True)]
            return self.of("train", depth) * (float(np.mean(ratios)) if ratios else 1.0)
        if not known:
            return math.nan
        if len(known) == 1:
            known, values = [0, *known], [0.0, *values]
        return float(make_interp_spline(known, values, k=1)(depth))  # each block adds the same


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
        seconds[name] = float(np.median(values)) * (wider if name[:6] == "encode" else longer)
    score = float(np.median(measured["seconds"]["score"])) / conditions["batch"]
    return Units(batch=conditions["train_batch"], seconds=seconds, score=score, flops=flops)


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
    widths = [lengths[each].max() * len(each) for each in length_buckets(lengths, batch, seed=seed)]
    return float(sum(widths) / len(lengths)) if len(lengths) else math.nan


# --- jobs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Something that one worker does in one go, for a method, after what it needs."""

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
        there: what :func:`shared_of` names and was made before.
        processes: that train together.
    """
    jobs: list[Job] = []
    made = set(there)
    for task in tasks:
        shared = shared_of(study, task)
        for name in (name for name in shared if name not in made):
            seconds = _shared_seconds(name, task, sizes, units)
            jobs.append(Job(name, seconds, task.needs, task.method))
        made.update(shared)
        seconds = _task_seconds(study, task, sizes, units, processes)
        jobs.append(Job(task.id, seconds, (*task.needs, *shared), task.method))
    return jobs


def shared_of(study: Study, task: Task) -> list[str]:
    """What a task needs beside trials: the teacher's features on disk, its greedy removal."""
    settings = settings_of(study, task.method)
    found = [f"removal-s{task.seed}"] if settings.select == "greedy" else []
    losses = settings.distillation
    if settings.method.settings == "distillation" and losses.features == "cached":
        depth = task.trials[0].depth
        spec = feature_spec(losses, settings.recipe, depth=depth, teacher_depth=task.blocks)
        if spec.ends or spec.vectors or spec.top:
            found.append(f"features-s{task.seed}-{spec.objective}")
    return found


def _shared_seconds(name: str, task: Task, sizes: Sizes, units: Units) -> float:
    full, blocks = units.of("encode", task.blocks), task.blocks
    if name.startswith("features"):
        return 2 * full * sizes.windows  # every position is read out: about one more pass
    # all single skips at each removal: more than the lazy search ever takes
    each = (blocks**2 / 6 + 1) * full + blocks * (blocks + 1) / 2 * RANKED * units.score
    return each * sizes.validation


def _task_seconds(study: Study, task: Task, sizes: Sizes, units: Units, processes: int) -> float:
    settings = settings_of(study, task.method)
    method, recipe = settings.method, settings.recipe
    steps = math.ceil(sizes.windows / (recipe.batch_size * processes))
    sizes = replace(sizes, epochs=_epochs(study, task, units, recipe), steps=steps)
    work = method.work(task, sizes)
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
        start: seconds until a worker can begin.

    >>> sasrec, full = Job("sasrec", 2), Job("full", 5, ("sasrec",))
    >>> schedule([sasrec, full, Job("student", 1, ("full",)), Job("variant", 3, ("sasrec",))], 2)
    8.0
    """
    waiting = {job.id: job for job in jobs}
    missing = set(waiting)  # what has not ended; what is no job is there already
    running: list[tuple[float, str]] = []  # a heap: when it ends, its id
    now = float(start) if jobs else 0.0
    while missing:
        ready = [job for job in waiting.values() if missing.isdisjoint(job.needs)]
        for job in ready[: workers - len(running)]:
            heapq.heappush(running, (now + job.seconds, waiting.pop(job.id).id))
        if not running:
            raise ValueError(f"no job can begin: {', '.join([*waiting][:3])}")
        now, name = heapq.heappop(running)
        missing.remove(name)
    return now


def longest_chain(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """The jobs, each needing one before it, that take longest: no number of workers helps."""
    best: dict[str, tuple[Job, ...]] = {}

    def seconds(chain: tuple[Job, ...]) -> float:
        return sum(job.seconds for job in chain)

    for job in jobs:  # each comes after what it needs
        before = max((best[need] for need in job.needs if need in best), key=seconds, default=())
        best[job.id] = (*before, job)
    return max(best.values(), key=seconds, default=())


def without_lost(tasks: Sequence[Task], lost: Collection[str]) -> list[Task]:
    """The tasks that can be done where some have failed: neither those nor what needs them."""
    gone, kept = set(lost), list[Task]()
    for task in tasks:  # each comes after what it needs
        if task.id in gone or gone & {*task.needs}:
            gone.add(task.id)
        else:
            kept.append(task)
    return kept
