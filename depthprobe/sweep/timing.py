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
from depthprobe.study import parse_layers
from depthprobe.sweep.context import Context
from depthprobe.sweep.plan import Trial
from depthprobe.training.distillation import Distiller
from depthprobe.training.loop import Batch, make_batch, next_item_loss

TRAINED_LIKE_FULL = ("full", "finetune", "heal", "random-init")


def measure(context: Context, blocks: int) -> dict[str, Any]:
    """Interleaved seconds of each action, and the conditions they hold under.

    Actions: ``encode:K``, ``train:K``, ``distill:K`` for K blocks and for ``sasrec``; ``latency:K``
    is one user from history to top 10; ``score`` is the catalogue for a batch of user vectors.
    """
    settings, device = context.study.cost, context.device
    histories, lengths = _typical_users(context, settings.batch_size)
    batch = _typical_batch(context, context.study.recipe.batch_size)
    table = torch.randn(context.sequences.n_items + 1, context.item_width)
    actions: dict[str, Callable[[], object]] = {}
    # students too, whether or not this sweep asks for them: a later one may, at another load
    for depth in sorted({*parse_layers(context.study.layers, blocks), blocks}):
        settings_backbone, kept = context.study.backbone, tuple(range(depth))
        model = build_recommender(settings_backbone, table, kept=kept, seed=0).to(device)
        vectors = torch.randn(len(histories), table.shape[1], device=device)
        actions[f"encode:{depth}"] = _encoding(model, histories, lengths)
        actions[f"latency:{depth}"] = _answer(model, histories[:1], lengths[:1])
        actions[f"train:{depth}"] = _step(model, partial(next_item_loss, model, batch))
        if depth < blocks:
            whole = Distiller(model, context.study.distillation).to(device)
            count = int(batch.mask.sum())
            states = torch.randn(len(whole.ends), count, model.input_adapter.out_features)
            states = states.half().to(device)
            actions[f"distill:{depth}"] = _step(whole, partial(_distilled, whole, batch, states))
        actions["score"] = partial(_best, vectors, model.item_matrix())
    baseline = context.new_sasrec(0)
    actions["encode:sasrec"] = _encoding(baseline, histories, lengths)
    actions["train:sasrec"] = _step(baseline, lambda: next_item_loss(baseline, batch))
    times = interleaved(actions, warmup=settings.warmup, rounds=settings.rounds, device=device)
    return {
        "conditions": {
            "device": device.type,
            "dtype": context.study.backbone.dtype,
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


def _distilled(module: nn.Module, batch: Batch, states: Tensor) -> Tensor:
    loss: Tensor = module(batch, states.float())
    return loss


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


def _typical_batch(context: Context, size: int) -> Batch:
    windows = context.windows
    return make_batch(windows, _middle([len(w) for w in windows], size), context.device)


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


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6)

    def action() -> None:
        model.train()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return action
