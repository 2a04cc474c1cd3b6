"""One training loop for everything that is trained, on accelerate.

AdamW, cosine schedule with warm-up, gradient clipping, early stopping on validation NDCG@10, best
weights kept. A loss that is not a number stops the training and names the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from depthprobe.data.batches import length_buckets, pad
from depthprobe.study import Recipe
from depthprobe.training.losses import catalogue_cross_entropy


class DivergedError(RuntimeError):
    """The loss is not a finite number."""


@dataclass(frozen=True)
class Batch:
    """Training windows: the next item is asked at every position."""

    chosen: np.ndarray  # (B,) indices of the windows
    inputs: Tensor  # (B, T) item ids, right-padded with 0
    targets: Tensor  # (B, T) the item after each position, 0 on padding
    mask: Tensor  # (B, T) where there is a target


@dataclass
class Fit:
    """What a training left: where it stopped, how it went, how long it took."""

    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = float("nan")
    losses: list[float] = field(default_factory=list)  # mean a epoch
    scores: list[float] = field(default_factory=list)  # validation NDCG@10 a epoch


LossFunction = Callable[[nn.Module, Batch], Tensor]


def make_batch(windows: list[np.ndarray], chosen: np.ndarray, device: torch.device) -> Batch:
    """Inputs and targets of the chosen windows: all items but the last, all but the first."""
    whole = torch.from_numpy(pad([windows[i] for i in chosen])).to(device)
    targets = whole[:, 1:]
    return Batch(chosen, whole[:, :-1], targets, targets > 0)


def next_item_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Full-catalogue cross-entropy of the next item, mean over all positions of the batch."""
    vectors = model(batch.inputs)[batch.mask]  # (N, d)
    items: Tensor = model.item_matrix()  # type: ignore[operator]
    return catalogue_cross_entropy(vectors, items, batch.targets[batch.mask])


def fit(
    model: nn.Module,
    windows: list[np.ndarray],
    *,
    recipe: Recipe,
    loss: LossFunction,
    validate: Callable[[], float],
    seed: int,
    device: torch.device,
    log: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Train in place and leave the best weights in the model, in eval mode.

    Args:
        windows: one array of item ids a user, at least two items each.
        validate: the score to maximise, called after each epoch with the model in eval mode.
        seed: decides batch order and dropout.

    Raises:
        DivergedError: if the loss is not finite; the message names the step.
    """
    lengths = np.array([len(window) for window in windows])
    if not len(windows) or lengths.min() < 2:
        raise ValueError("every training window needs at least two items")
    # the state is a process-wide singleton that would leak from the training before
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device.type == "cpu")
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    total = recipe.epochs * -(-len(windows) // recipe.batch_size)
    schedule = LambdaLR(optimizer, lambda step: _cosine(step, total, recipe.warmup))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(seed)
    result, best = Fit(), [p.detach().clone() for p in weights]
    began = time.perf_counter()
    for epoch in range(recipe.epochs):
        model.train()
        losses: list[float] = []
        for chosen in length_buckets(lengths, recipe.batch_size, seed=seed, epoch=epoch):
            value = loss(prepared, make_batch(windows, chosen, device))
            accelerator.backward(value)
            accelerator.clip_grad_norm_(weights, recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(value.item())
            result.steps += 1
            if not np.isfinite(losses[-1]):
                raise DivergedError(f"the loss is {losses[-1]} at step {result.steps}")
        model.eval()
        score = validate()
        result.epochs = epoch + 1
        result.losses.append(float(np.mean(losses)))
        result.scores.append(score)
        log(f"epoch {epoch + 1}/{recipe.epochs}  loss {result.losses[-1]:.4f}  ndcg@10 {score:.4f}")
        if not score <= result.best_score:  # also true for the first score
            result.best_score, result.best_epoch = score, epoch + 1
            best = [p.detach().clone() for p in weights]
        elif epoch + 1 - result.best_epoch >= recipe.patience:
            break
    with torch.no_grad():
        for weight, value in zip(weights, best, strict=True):
            weight.copy_(value)
    model.eval()
    result.seconds = time.perf_counter() - began
    return result


def _cosine(step: int, total: int, warmup: float) -> float:
    """Share of the learning rate: linear up over the warm-up, then half a cosine down to 0."""
    rising = max(1.0, warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    return float(0.5 * (1 + np.cos(np.pi * min(1.0, (step - rising) / max(1.0, total - rising)))))
