"""The times that a run measures once, before its trials: what ``timing.json`` holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.cost import timing as rig
from depthprobe.cost.timing import Action
from depthprobe.data.batches import length_buckets
from depthprobe.errors import BadInput
from depthprobe.methods import Trial, base_of, method_of
from depthprobe.models.build import (
    Shape,
    build_recommender,
    cut_copy,
    merge_lora,
    reshape,
    twin_of,
)
from depthprobe.models.precision import compute_in_bfloat16
from depthprobe.models.quantize import make_ready, quantize
from depthprobe.models.recommender import Recommender, is_quantized, one_prompt
from depthprobe.models.taps import Plan, standing_in
from depthprobe.probing.mix import OPTION, plan_without, possible_options
from depthprobe.runs.context import Context
from depthprobe.runs.plan import MIX, TEACHER, plan, trial_of
from depthprobe.runs.records import (
    ALONE,
    TRIALS,
    Rounds,
    folders_of,
    read_sealed,
    replace_times,
    typed,
)
from depthprobe.runs.training import objective_of, spec_of
from depthprobe.study import Recipe, Study, parse_layers, settings_of
from depthprobe.training.features import OnlineTeacher, Teacher, TeacherOutputs
from depthprobe.training.loop import parts_of
from depthprobe.training.objectives import Batch, NextItem, last_only, make_batch

WITHOUT = "without"  # prefix of actions that leave one kind of part out of all blocks

logger = logging.getLogger(__name__)


def measure(
    context: Context, blocks: int, *, seconds: float | None = None, all_depths: bool = True
) -> dict[str, Any]:
    """Measure the seconds of each action, and record the conditions.

    Actions are those of :mod:`depthprobe.cost.timing`, on typical users and windows, for each depth
    and for ``sasrec``; for each depth of a variant whose blocks are narrower or applied again, as
    ``encode:K:NAME``; of copies in fewer bits, as ``encode:int8:K``; a step of each distilled or
    elastic method of the study, as ``distill:K``; and for budgets in milliseconds encoding without
    a part of all blocks, as ``without:mlp``. The model has random weights: the time of a matrix
    product does not depend on what it multiplies.

    Args:
        seconds: to spend, instead of the study's budget.
        all_depths: False times only each method's shallowest depth and the full one.
    """
    study, cost, device = context.study, context.study.cost, context.device
    items = torch.randn(context.sequences.n_items + 1, context.item_width)
    models: dict[str, Recommender] = {}
    if shapes := _shapes(study, blocks, all_depths=all_depths):
        random_init = study.backbone.quantize == "none"
        full = build_recommender(
            context.backbone,
            items,
            seed=0,
            random_init=random_init,
            train_items=study.trains_items,
            tokens=context.item_tokens,
        ).to(device)
        if study.recipe.precision == "bfloat16":
            compute_in_bfloat16(full.backbone)
        for name, (depth, shape) in shapes.items():
            models[name] = cut_copy(full, range(depth))
            reshape(models[name].backbone, shape)
        items = full.item_matrix().detach()
    levers = _levers(study, blocks, models) if all_depths else ()
    rounded, refused = _rounded(study, models, levers)
    timing = rig.measure(
        lambda size: _actions(context, blocks, models, items.to(device), size, rounded),
        batch=study.recipe.batch_size,
        seconds=cost.seconds if seconds is None else seconds,
        warmup=cost.warmup,
        rounds=cost.rounds,
        device=device,
    )
    histories, _ = _typical_users(context, timing.batch)
    step = _typical_step(context, timing.batch, study.recipe)
    conditions = {
        "device": device.type,
        "dtype": study.backbone.dtype,
        "precision": study.recipe.precision,
        "batch": len(histories),
        "length": histories.shape[1],
        "train_batch": sum(len(part.inputs) for part in step),
        "train_length": max(part.inputs.shape[1] for part in step),
        "threads": torch.get_num_threads(),
        "warmup": timing.warmup,
        "rounds": timing.rounds,
    }
    return {
        "conditions": conditions,
        "seconds": timing.seconds,
        "left_out": [*timing.left_out, *refused],
        "peak_bytes": timing.peak.get("reserved", timing.peak.get("rss")),
    }


class Timing(msgspec.Struct):
    """What :func:`measure` returns, as the file holds it."""

    conditions: dict[str, Any]
    seconds: dict[str, list[float]]
    left_out: list[str] = []
    peak_bytes: float | None = None


def read_timing(path: Path) -> dict[str, Any]:
    """The times that a run has measured; ``BadInput`` if the file is not as it was written."""
    content = read_sealed(path, ALONE)
    return msgspec.to_builtins(typed(content, Timing, path, ALONE))  # type: ignore[no-any-return]


def covers(measured: dict[str, Any], context: Context, blocks: int) -> bool:
    """Whether the times cover everything that the study's methods need."""
    study, names = context.study, _shapes(context.study, blocks)
    wanted = {f"encode:{name}" for name in names} | set(_steps(study, blocks, names))
    wanted |= {f"encode:{lever}:{name}" for lever, name in _levers(study, blocks, names)}
    if names and _times_parts(study):
        wanted |= {f"{WITHOUT}:{part}" for part in OPTION}
    if _times_sasrec(study):
        wanted.add("encode:sasrec")
    return wanted <= {*measured["seconds"], *measured.get("left_out", ())}


def timing_of(trial: Trial, measured: dict[str, Any], study: Study) -> dict[str, Any] | None:
    """The measured times of a trial's shape; None if it was not measured."""
    settings, seconds = settings_of(study, trial.method), measured["seconds"]
    # the depth of one counts the item encoder's blocks, which serve no user; of the other a budget
    if settings.method.items_only or trial.budget is not None:
        return None
    sasrec = settings.method.settings == "sasrec"
    key, scores = "sasrec" if sasrec else shape_name(study, trial.method, trial.depth), "score"
    if trial.of:
        lever = base_of(trial.method)
        key, scores = f"{lever}:{key}", next(n for n in (f"score:{lever}", "score") if n in seconds)
    if f"encode:{key}" not in seconds:
        return None
    actions = {"encode": f"encode:{key}", "score": scores, "latency": f"latency:{key}"}
    alike = replace(settings.recipe, epochs=study.recipe.epochs) == study.recipe
    if sasrec or (settings.method.trains and alike):
        actions["train_step"] = _own_step(trial) or f"train:{key}"
    return {
        name: {"seconds": seconds[action]} for name, action in actions.items() if action in seconds
    }


def retime(context: Context, blocks: int, measured: dict[str, Any]) -> None:
    """Give all finished trials times of one session, since ratios between sessions mean nothing.

    A trial that the study no longer asks for loses its times.
    """
    trials = {trial.id: trial for task in plan(context.study, blocks) for trial in task.trials}
    for folder in folders_of(context.folder / TRIALS):
        trial = trials.get(folder.name)
        timing = None if trial is None else timing_of(trial, measured, context.study)
        replace_times(folder, msgspec.convert(timing, dict[str, Rounds] | None))


def _times_sasrec(study: Study) -> bool:
    methods = [method_of(name) for name in study.methods]
    needed = study.item_table == "sasrec" and any(each.reads_users for each in methods)
    return needed or any(each.settings == "sasrec" for each in methods)


def _times_parts(study: Study) -> bool:
    return MIX in study.methods and study.probing.budget == "milliseconds"


def _depths(study: Study, blocks: int, *, all_depths: bool = True) -> list[int]:
    """Depths to time; none where the backbone reads no user."""
    if not any(method_of(name).reads_users for name in study.methods):
        return []
    layers = [study.layers, *(settings_of(study, name).layers for name in study.methods)]
    asked = [parse_layers(each, blocks) for each in layers]
    return sorted({blocks, *(d for each in asked for d in (each if all_depths else each[:1]))})


def shape_name(study: Study, method: str, depth: int) -> str:
    """The name under which a shape is timed: ``4``, or ``4:NAME`` for reshaped blocks."""
    if method_of(method).lever:
        method = method.partition(":")[2]
    variant = method.partition(":")[2]
    return f"{depth}:{variant}" if settings_of(study, method).reshapes else str(depth)


def _shapes(study: Study, blocks: int, *, all_depths: bool = True) -> dict[str, tuple[int, Shape]]:
    """The models to time by name, each a depth and the shape of its blocks."""
    depths = _depths(study, blocks, all_depths=all_depths)
    found = {str(depth): (depth, Shape()) for depth in depths}
    for task in plan(study, blocks) if depths else ():
        settings = settings_of(study, task.method)
        for trial in task.trials if settings.reshapes else ():
            if trial.depth in depths:
                name = shape_name(study, task.method, trial.depth)
                found[name] = trial.depth, Shape(settings.width, settings.loops)
    return found


def _levers(study: Study, blocks: int, names: Collection[str]) -> list[tuple[str, str]]:
    """Each lever with the names of the models to time that it makes variants of."""
    if not any(method_of(name).lever for name in study.methods):
        return []
    trials = [trial for task in plan(study, blocks) for trial in task.trials if trial.of]
    pairs = {(base_of(t.method), shape_name(study, t.method, t.depth)) for t in trials}
    return sorted(pair for pair in pairs if pair[1] in names)


def _rounded(
    study: Study, models: Mapping[str, Recommender], levers: Iterable[tuple[str, str]]
) -> tuple[dict[str, Recommender], list[str]]:
    """Quantised copies of models, by ``int8:4``; and the actions of those that are refused.

    Copies of one lever that differ only in depth share their weights.
    """
    half = study.recipe.precision == "bfloat16"
    made: dict[tuple[str, str], Recommender | None] = {}
    found: dict[str, Recommender] = {}
    refused: list[str] = []
    for lever, name in levers:
        source = max(filter(str.isdigit, models), key=int) if name.isdigit() else name
        if (lever, source) not in made:
            copied = made[lever, source] = twin_of(models[source])
            merge_lora(copied)
            try:
                quantize(copied, lever, bfloat16=half)
                make_ready(copied.backbone)
            except BadInput as error:  # so will its trials be
                logger.warning("timing: %s", error)
                made[lever, source] = None
        if (model := made[lever, source]) is None:
            refused.append(f"encode:{lever}:{name}")
            continue
        own = model if name == source else cut_copy(model, range(int(name)))
        found[f"{lever}:{name}"] = own
    return found, refused


def _own_step(trial: Trial) -> str | None:
    """The name of a step with a loss of its own; None for the plain next-item loss."""
    depths = {"distillation": trial.depth, "elastic": trial.blocks}
    depth = depths.get(method_of(trial.method).settings)
    return None if depth is None else f"{trial.method}:{depth}"


def _steps(study: Study, blocks: int, names: Collection[str]) -> dict[str, Trial]:
    """The training steps to time, each with a trial that takes it."""
    plain = [int(name) for name in names if name.isdigit()]
    steps = {f"train:{depth}": trial_of(TEACHER, range(depth), 0, blocks) for depth in plain}
    for task in plan(study, blocks) if names else ():
        trains = task.seed == 0 and not method_of(task.method).lever
        for trial in task.trials[-1:] if trains else ():
            shape = shape_name(study, trial.method, trial.depth)
            own = _own_step(trial) or (None if shape.isdigit() else f"train:{shape}")
            if shape in names and own:
                steps[own] = trial
    return steps


def _actions(
    context: Context,
    blocks: int,
    models: dict[str, Recommender],
    items: Tensor,
    size: int,
    rounded: Mapping[str, Recommender],
) -> dict[str, Action]:
    """All actions to time, with training steps of ``windows`` windows."""
    study, recipe = context.study, context.study.recipe
    histories, lengths = _typical_users(context, size)
    batch = _typical_step(context, size, recipe)
    timed: dict[str, Any] = {**models, **rounded}
    plain = {}
    for name, model in rounded.items():
        if is_quantized(matrix := model.item_matrix()):
            plain[f"score:{base_of(name)}"] = rig.score_action(matrix, len(histories))
    if _times_sasrec(study):
        timed["sasrec"], own = context.new_sasrec(0), study.sasrec.recipe
        windows = _typical_step(context, own.batch_size, own)
        plain["train:sasrec"] = Action(_step(NextItem(timed["sasrec"], own), windows))
    actions = rig.encode_actions(timed, histories, lengths, items=items) | plain
    if _times_parts(study):
        actions |= _without_parts(models[str(blocks)], histories, lengths, items)
    trials = _steps(study, blocks, models)
    steps = {name: _objective(context, trial, models, batch) for name, trial in trials.items()}
    optimizer = rig.optimizer_of(*steps.values()) if steps else None
    for name, objective in steps.items():
        passes = 3 if name.startswith("train") else 4
        chosen = [context.windows[index] for part in batch for index in part.chosen]
        longest = max(context.text_lengths(chosen))
        loops = settings_of(study, trials[name].method).loops
        work = passes * loops * trials[name].depth * len(chosen) * longest
        actions[name] = Action(_step(objective, batch, optimizer), work)
    return actions


def _without_parts(
    model: Recommender, histories: Tensor, lengths: Tensor, items: Tensor
) -> dict[str, Action]:
    """Encoding without the attention or the MLP of every block, and without any block."""
    possible, actions = possible_options(model), {}
    for part in OPTION:
        plan = plan_without(model, part, possible)
        with standing_in(plan):  # the prompt is computed without it, too
            encode = rig.encode_actions({part: model}, histories, lengths, items=items)
        actions[f"{WITHOUT}:{part}"] = Action(
            partial(_stand_in, plan, encode[f"encode:{part}"].call)
        )
    return actions


def _stand_in(plan: Plan, call: Callable[[], object]) -> object:
    with standing_in(plan):
        return call()


def _step(
    objective: Any, parts: Sequence[Batch], optimizer: torch.optim.Optimizer | None = None
) -> Any:
    half = objective.recipe.precision == "bfloat16"
    optimizer = optimizer or rig.optimizer_of(objective)

    def loss(part: Batch) -> Tensor:
        value: Tensor = objective.train()(part)
        return value

    around = partial(one_prompt, objective) if len(parts) > 1 else nullcontext
    losses = [partial(loss, part) for part in parts]
    return rig.step(losses, optimizer, bfloat16=half, around=around)


def _objective(
    context: Context, trial: Trial, models: Mapping[str, Recommender], step: Sequence[Batch]
) -> nn.Module:
    """The trial's own objective, with an untrained teacher."""
    settings = replace(settings_of(context.study, trial.method), recipe=context.study.recipe)
    full, goal, teacher = models[str(trial.blocks)], None, cast("Teacher | None", None)
    model = models[shape_name(context.study, trial.method, trial.depth)]
    if (spec := spec_of(settings, trial)) is not None:
        teacher = OnlineTeacher(cut_copy(full, range(full.depth)).eval(), spec)
        if settings.distillation.features == "cached":  # what a step reads is there already
            asked = last_only if spec.objective == "last" else lambda part: part
            teacher = _Read({int(part.chosen[0]): teacher.at(asked(part)) for part in step})
        goal = full.item_matrix().detach() if spec.vectors else None
    objective = objective_of(settings, model, settings.recipe, teacher, goal)
    return objective.to(context.device)


@dataclass(frozen=True)
class _Read:
    """Cached teacher outputs for the parts of the timed step, by their first window."""

    outputs: Mapping[int, TeacherOutputs]

    def at(self, batch: Batch) -> TeacherOutputs:
        """The outputs of one part."""
        return self.outputs[int(batch.chosen[0])]


def _typical_users(context: Context, size: int) -> tuple[Tensor, Tensor]:
    """A batch of real test users of about the mean length, (B, T) and (B,)."""
    size = min(size, context.study.cost.batch_size)
    lengths = context.text_lengths(context.test.histories)
    batch = context.test.batch(_middle(lengths, size), context.device)
    return batch.histories, batch.lengths


def _typical_step(context: Context, size: int, recipe: Recipe) -> list[Batch]:
    """Training windows of about the mean length, in the parts that a training computes."""
    lengths = np.array(context.text_lengths(context.windows))
    chosen = _middle(lengths, size)
    most = recipe.positions_on(context.device.type)
    parts = parts_of(np.sort(lengths[chosen]), 1, most)
    return [
        make_batch(context.windows, part, context.device, recipe.objective)
        for part in np.array_split(chosen, parts)
    ]


def _middle(lengths: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """The batch whose padded length is nearest to the mean of all batches."""
    batches = length_buckets(lengths, size)
    longest = np.array([max(lengths[i] for i in batch) for batch in batches])
    mean = np.average(longest, weights=[len(batch) for batch in batches])
    full = [place for place, batch in enumerate(batches) if len(batch) == len(batches[0])]
    return batches[min(full, key=lambda place: abs(longest[place] - mean))]
