"""Time of every depth on this machine: encoding users, scoring the catalogue, a training step.

Measured once a run and alone, before anything else runs, on freshly initialised models: the time
of a matrix product does not depend on what it multiplies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.cost.timing import interleaved
from depthprobe.data.batches import length_buckets, pad
from depthprobe.methods import Trial, base_of, names
from depthprobe.models.build import build_recommender
from depthprobe.models.recommender import Recommender
from depthprobe.runs.context import Context
from depthprobe.study import Recipe, Study, parse_layers, settings_of
from depthprobe.training.distillation import Distiller, feature_spec
from depthprobe.training.distributed import FUSED
from depthprobe.training.features import CachedTeacher, OnlineTeacher, Teacher, write_features
from depthprobe.training.objectives import Batch, ElasticObjective, NextItem, make_batch


def measure(context: Context, blocks: int) -> dict[str, Any]:
    """Interleaved seconds of each action, and the conditions they hold under.

    Actions: ``encode:K`` and ``train:K`` for K blocks and for ``sasrec``; ``distill:K``, and the
    same for each variant of it; ``elastic:L``; ``latency:K`` is one user from history to top 10;
    ``score`` is the catalogue for a batch of user vectors. A sweep of the baselines alone measures
    no depth: on a large backbone that takes longer.
    """
    study, settings, device = context.study, context.study.cost, context.device
    histories, lengths = _typical_users(context, settings.batch_size)
    recipe = study.recipe
    windows = _typical_windows(context, recipe)
    batch = make_batch(windows, np.arange(len(windows)), device, recipe.objective)
    table = torch.randn(context.sequences.n_items + 1, context.item_width)
    actions: dict[str, Callable[[], object]] = {}
    depths = _depths(context, blocks)
    models = {
        depth: build_recommender(study.backbone, table, kept=tuple(range(depth)), seed=0).to(device)
        for depth in depths
    }
    with tempfile.TemporaryDirectory() as folder:
        for depth, model in models.items():
            actions[f"encode:{depth}"] = _encoding(model, histories, lengths)
            actions[f"latency:{depth}"] = _answer(model, histories[:1], lengths[:1])
            actions[f"train:{depth}"] = _step(NextItem(model, recipe), batch, recipe)
            # students too, asked for or not: a later sweep may, when the machine is busier
            for method in _named("distill", study) if depth < blocks else ():
                if depth not in parse_layers(settings_of(study, method).layers, blocks):
                    continue
                place = Path(folder, f"{method}-{depth}")
                student = _student(study, method, model, models[blocks], windows, place)
                actions[f"{method}:{depth}"] = _step(student.to(device), batch, recipe)
            actions["score"] = _scoring(model.item_matrix(), len(histories))
        for method in _named("elastic", study) if blocks in models else ():
            objective = ElasticObjective(models[blocks], settings_of(study, method).elastic, recipe)
            actions[f"{method}:{blocks}"] = _step(objective, batch, recipe)
        baseline = context.new_sasrec(0)
        actions.setdefault("score", _scoring(baseline.item_matrix(), len(histories)))
        actions["encode:sasrec"] = _encoding(baseline, histories, lengths)
        own = study.sasrec.recipe
        of_own = _typical_windows(context, own)
        batch_of_own = make_batch(of_own, np.arange(len(of_own)), device, own.objective)
        actions["train:sasrec"] = _step(NextItem(baseline, own), batch_of_own, own)
        times = interleaved(actions, warmup=settings.warmup, rounds=settings.rounds, device=device)
    return {
        "conditions": {
            "device": device.type,
            "dtype": study.backbone.dtype,
            "precision": recipe.precision,
            "batch": len(histories),
            "length": histories.shape[1],
            "train_batch": len(batch.inputs),
            "train_length": batch.inputs.shape[1],
            "threads": torch.get_num_threads(),
            "warmup": settings.warmup,
            "rounds": settings.rounds,
        },
        "seconds": times,
    }


def timing_of(trial: Trial, measured: dict[str, Any], study: Study) -> dict[str, Any] | None:
    """The measured times that hold for a trial; None where its shape was not measured."""
    base, depth = base_of(trial.method), trial.depth
    key = "sasrec" if base == "sasrec" else str(depth)
    seconds = measured["seconds"]
    if base == "popularity" or f"encode:{key}" not in seconds:
        return None
    actions = {"encode": f"encode:{key}", "score": "score", "latency": f"latency:{key}"}
    own = settings_of(study, trial.method).recipe
    alike = replace(own, epochs=study.recipe.epochs) == study.recipe
    if base == "distill":
        actions["train_step"] = f"{trial.method}:{key}" if alike else ""
    elif base == "elastic":
        actions["train_step"] = f"{trial.method}:{trial.blocks}" if alike else ""
    elif base == "sasrec" or (base in ("full", *names("trained", "control")) and alike):
        actions["train_step"] = f"train:{key}"
    return {
        name: {"seconds": seconds[action]} for name, action in actions.items() if action in seconds
    }


def _named(base: str, study: Study) -> list[str]:
    """A method that is always measured, and its variants of the study."""
    return [base, *(name for name in study.methods if name.startswith(f"{base}:"))]


def _student(
    study: Study,
    method: str,
    model: Recommender,
    whole: Recommender,
    windows: list[np.ndarray],
    folder: Path,
) -> Distiller:
    """A student of an untrained teacher, with features of its own."""
    settings = settings_of(study, method)
    losses, recipe = settings.distillation, study.recipe
    wanted = feature_spec(losses, recipe, depth=model.depth, teacher_depth=whole.depth)
    teacher: Teacher = OnlineTeacher(whole, wanted)
    if losses.features == "cached":
        folder.mkdir()
        place = whole.item_matrix().device
        write_features(whole, windows, wanted, folder=folder, device=place)
        teacher = CachedTeacher(folder, windows, wanted)
    follows = bool(wanted.ends or wanted.vectors or wanted.top)
    goal = whole.item_matrix().detach() if wanted.vectors else None
    return Distiller(model, losses, recipe, teacher if follows else None, goal_items=goal)


def covers(measured: dict[str, Any], context: Context, blocks: int) -> bool:
    """Whether the times hold all depths that the study's methods need."""
    return all(f"encode:{depth}" in measured["seconds"] for depth in _depths(context, blocks))


def _depths(context: Context, blocks: int) -> list[int]:
    if set(context.study.methods) <= set(names("baseline")):
        return []
    study = context.study
    every = [study.layers, *(settings_of(study, name).layers for name in study.methods)]
    return sorted({blocks, *(d for layers in every for d in parse_layers(layers, blocks))})


def _scoring(items: Tensor, users: int) -> Callable[[], object]:
    vectors = torch.randn(users, items.shape[1], device=items.device)
    return partial(_best, vectors, items)


@torch.inference_mode()
def _best(vectors: Tensor, items: Tensor) -> Tensor:
    return (vectors @ items.T).topk(10).indices


def _typical_users(context: Context, size: int) -> tuple[Tensor, Tensor]:
    """A batch of real test users of about the median length."""
    histories = context.test.histories
    chosen = _middle([len(history) for history in histories], size)
    lengths = torch.tensor([len(histories[i]) for i in chosen])
    padded = torch.from_numpy(pad([histories[i] for i in chosen]))
    return padded.to(context.device), lengths.to(context.device)


def _typical_windows(context: Context, recipe: Recipe) -> list[np.ndarray]:
    """A batch of training windows of about the median length."""
    chosen = _middle([len(window) for window in context.windows], recipe.batch_size)
    return [context.windows[i] for i in chosen]


def _middle(lengths: list[int], size: int) -> np.ndarray:
    batches = length_buckets(lengths, size)
    full = [batch for batch in batches if len(batch) == len(batches[0])]
    return full[len(full) // 2]


def _encoding(model: Any, histories: Tensor, lengths: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def action() -> object:
        model.eval()
        return model.encode(histories, lengths)

    return action


def _answer(model: Recommender, history: Tensor, length: Tensor) -> Callable[[], object]:
    with torch.inference_mode():
        prompt = model.eval().prepare_prompt()

    @torch.inference_mode()
    def action() -> object:
        model.eval()
        return _best(model.encode(history, length, prompt), model.item_matrix())

    return action


def _step(objective: nn.Module, batch: Batch, recipe: Recipe) -> Callable[[], object]:
    weights = [p for p in objective.parameters() if p.requires_grad]
    place = weights[0].device.type
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=place in FUSED or None)

    def action() -> None:
        objective.train()
        with torch.autocast(place, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = objective(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return action
