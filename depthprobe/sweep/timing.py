"""Time of every depth on this machine: encoding users, scoring the catalogue, a training step.

Measured once a run and alone, before anything else runs, on freshly initialised models: the time
of a matrix product does not depend on what it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.cost.timing import interleaved
from depthprobe.data.batches import length_buckets, pad
from depthprobe.models.build import build_recommender
from depthprobe.models.recommender import Recommender
from depthprobe.study import Recipe, Study, parse_layers
from depthprobe.sweep.context import Context
from depthprobe.sweep.plan import BASELINES, Trial
from depthprobe.training.distillation import Distiller, TeacherStates, group_ends
from depthprobe.training.distributed import FUSED
from depthprobe.training.objectives import Batch, NextItem, make_batch

TRAINED_LIKE_FULL = ("full", "finetune", "heal", "random-init")


def measure(context: Context, blocks: int) -> dict[str, Any]:
    """Interleaved seconds of each action, and the conditions they hold under.

    Actions: ``encode:K``, ``train:K``, ``distill:K`` for K blocks and for ``sasrec``; ``latency:K``
    is one user from history to top 10; ``score`` is the catalogue for a batch of user vectors.
    A sweep of the baselines alone measures no depth: on a large backbone that takes longer.
    """
    settings, device = context.study.cost, context.device
    histories, lengths = _typical_users(context, settings.batch_size)
    recipe = context.study.recipe
    batch = _typical_batch(context, recipe)
    table = torch.randn(context.sequences.n_items + 1, context.item_width)
    actions: dict[str, Callable[[], object]] = {}
    # students too, whether or not this sweep asks for them: a later one may, at another load
    for depth in _depths(context, blocks):
        settings_backbone, kept = context.study.backbone, tuple(range(depth))
        model = build_recommender(settings_backbone, table, kept=kept, seed=0).to(device)
        actions[f"encode:{depth}"] = _encoding(model, histories, lengths)
        actions[f"latency:{depth}"] = _answer(model, histories[:1], lengths[:1])
        actions[f"train:{depth}"] = _step(NextItem(model, recipe), batch, recipe)
        if depth < blocks:
            teacher = _some_states(batch, context.study, depth, blocks, model.width)
            distiller = Distiller(model, context.study.distillation, recipe, teacher).to(device)
            actions[f"distill:{depth}"] = _step(distiller, batch, recipe)
        actions["score"] = _scoring(model.item_matrix(), len(histories))
    baseline = context.new_sasrec(0)
    actions.setdefault("score", _scoring(baseline.item_matrix(), len(histories)))
    actions["encode:sasrec"] = _encoding(baseline, histories, lengths)
    own = context.study.sasrec.recipe
    actions["train:sasrec"] = _step(NextItem(baseline, own), _typical_batch(context, own), own)
    times = interleaved(actions, warmup=settings.warmup, rounds=settings.rounds, device=device)
    return {
        "conditions": {
            "device": device.type,
            "dtype": context.study.backbone.dtype,
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


def timing_of(trial: Trial, measured: dict[str, Any]) -> dict[str, Any] | None:
    """The measured times that hold for a trial; None where its shape was not measured."""
    key = "sasrec" if trial.method == "sasrec" else str(trial.depth)
    seconds = measured["seconds"]
    if trial.method == "popularity" or f"encode:{key}" not in seconds:
        return None
    names = {"encode": f"encode:{key}", "score": "score", "latency": f"latency:{key}"}
    if trial.method in (*TRAINED_LIKE_FULL, "sasrec"):
        names["train_step"] = f"train:{key}"
    elif trial.method == "distill":
        names["train_step"] = f"distill:{key}"
    return {
        name: {"seconds": seconds[action]} for name, action in names.items() if action in seconds
    }


def _some_states(batch: Batch, study: Study, depth: int, blocks: int, width: int) -> TeacherStates:
    """Random states in place of a teacher's, for the windows of the batch."""
    ends = group_ends(blocks, min(study.distillation.groups, depth))
    states = torch.randn(batch.count, len(ends), width).half().numpy()
    return TeacherStates(states, batch.mask.sum(dim=1).cpu().numpy(), ends)


def covers(measured: dict[str, Any], context: Context, blocks: int) -> bool:
    """Whether the times hold all depths that the study's methods need."""
    return all(f"encode:{depth}" in measured["seconds"] for depth in _depths(context, blocks))


def _depths(context: Context, blocks: int) -> list[int]:
    if set(context.study.methods) <= set(BASELINES):
        return []
    return sorted({*parse_layers(context.study.layers, blocks), blocks})


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


def _typical_batch(context: Context, recipe: Recipe) -> Batch:
    """A batch of windows of about the median length, numbered from 0."""
    chosen = _middle([len(window) for window in context.windows], recipe.batch_size)
    windows = [context.windows[i] for i in chosen]
    return make_batch(windows, np.arange(len(windows)), context.device, recipe.objective)


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
