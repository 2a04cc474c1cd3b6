"""The loop learns, keeps the best weights, repeats itself, and stops at a loss of NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Recipe
from depthprobe.training.loop import (
    DivergedError,
    _cosine,
    fit,
    make_batch,
    next_item_loss,
)

CPU = torch.device("cpu")


def small_sasrec() -> SASRec:
    torch.manual_seed(0)
    return SASRec(12, width=8, blocks=1, heads=2, drop=0.1, longest=10)


def run(model: nn.Module, windows: list[np.ndarray], scores: list[float], **recipe: float):
    left = iter(scores)
    settings = Recipe(**{"epochs": len(scores), "batch_size": 8, **recipe})  # type: ignore[arg-type]
    return fit(
        model,
        windows,
        recipe=settings,
        loss=next_item_loss,
        validate=lambda: next(left),
        seed=0,
        device=CPU,
    )


def test_batch_asks_for_the_next_item_everywhere() -> None:
    batch = make_batch([np.array([5, 6, 7]), np.array([8, 9])], np.array([0, 1]), CPU)
    assert batch.inputs.tolist() == [[5, 6], [8, 9]]
    assert batch.targets.tolist() == [[6, 7], [9, 0]]
    assert batch.mask.tolist() == [[True, True], [True, False]]


def test_training_learns(windows: list[np.ndarray]) -> None:
    found = run(small_sasrec(), windows, [0.0] * 30, learning_rate=0.03, patience=40)
    assert found.losses[-1] < 0.5 * found.losses[0]
    assert found.steps == 30 * 4


def test_same_seed_same_weights(windows: list[np.ndarray]) -> None:
    models = [small_sasrec(), small_sasrec()]
    for model in models:
        torch.rand(3)  # the state before must not matter
        run(model, windows, [0.0, 0.1])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_best_weights_are_kept_and_patience_ends_it(windows: list[np.ndarray]) -> None:
    model, seen = small_sasrec(), []

    def validate() -> float:
        seen.append(model.items.weight.detach().clone())
        return [0.1, 0.5, 0.2, 0.3, 0.4][len(seen) - 1]

    found = fit(
        model,
        windows,
        recipe=Recipe(epochs=5, batch_size=8, patience=2),
        loss=next_item_loss,
        validate=validate,
        seed=0,
        device=CPU,
    )
    assert (found.epochs, found.best_epoch, found.best_score) == (4, 2, 0.5)
    assert torch.equal(model.items.weight, seen[1])
    assert not torch.equal(model.items.weight, seen[3])
    assert not model.training


def test_a_loss_that_is_no_number_names_the_step(windows: list[np.ndarray]) -> None:
    calls = []

    def loss(model: nn.Module, batch: object) -> torch.Tensor:
        calls.append(1)
        value = next_item_loss(model, batch)  # type: ignore[arg-type]
        return value * float("nan") if len(calls) == 3 else value

    with pytest.raises(DivergedError, match="step 3"):
        fit(
            small_sasrec(),
            windows,
            recipe=Recipe(epochs=2, batch_size=8),
            loss=loss,
            validate=lambda: 0.0,
            seed=0,
            device=CPU,
        )


def test_schedule_rises_then_falls_to_zero() -> None:
    shares = [_cosine(step, 100, 0.1) for step in range(101)]
    assert np.argmax(shares) == 10
    assert shares[0] == pytest.approx(1 / 11)
    assert shares[100] == pytest.approx(0)
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))


def test_padding_changes_neither_loss_nor_gradient(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray]
) -> None:
    """One batch of ragged users equals the same users one at a time, weighted by positions."""
    model = make_recommender().double()
    batch = make_batch(windows, np.arange(6), CPU)
    next_item_loss(model, batch).backward()
    together = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total = int(batch.mask.sum())
    for user in range(6):
        alone = make_batch(windows, np.array([user]), CPU)
        (next_item_loss(model, alone) * int(alone.mask.sum()) / total).backward()
    apart = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # norms run in float32
