"""The loop learns, keeps the best weights, repeats itself, and stops at a loss of NaN."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Recipe
from depthprobe.training import loop as steps
from depthprobe.training.loop import DivergedError, Fit, _cosine, fit
from depthprobe.training.objectives import Batch, NextItem, make_batch

CPU = torch.device("cpu")


def small_sasrec(drop: float = 0.1) -> SASRec:
    torch.manual_seed(0)
    return SASRec(12, width=8, blocks=1, heads=2, drop=drop, longest=10)


def run(model: nn.Module, windows: list[np.ndarray], scores: list[float], **recipe: Any) -> Fit:
    left = iter(scores)
    settings = Recipe(**{"epochs": len(scores), "batch_size": 8, **recipe})
    return fit(
        NextItem(model, settings),
        windows,
        recipe=settings,
        validate=lambda: next(left),
        seed=0,
        device=CPU,
    )


class Spoiled(nn.Module):
    """An objective something is done to the loss of at one of its calls, from 1."""

    def __init__(self, objective: nn.Module, call: int, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.objective, self.call, self.spoil = objective, call, spoil
        self.calls = itertools.count(1)

    def forward(self, batch: Batch) -> Tensor:
        value: Tensor = self.objective(batch)
        return self.spoil(value) if next(self.calls) == self.call else value


class KilledError(Exception):
    """Someone killed the training."""


def kill(value: Tensor) -> Tensor:
    raise KilledError


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


def test_what_validation_draws_changes_nothing(windows: list[np.ndarray]) -> None:
    models, recipe = [small_sasrec(), small_sasrec()], Recipe(epochs=2, batch_size=8)
    for model, drawn in zip(models, (0, 3), strict=True):
        fit(
            NextItem(model, recipe),
            windows,
            recipe=recipe,
            validate=lambda drawn=drawn: len(torch.rand(drawn)),
            seed=0,
            device=CPU,
        )
    assert torch.equal(models[0].items.weight, models[1].items.weight)


def test_best_weights_are_kept_and_patience_ends_it(windows: list[np.ndarray]) -> None:
    model, seen = small_sasrec(), []

    def validate() -> float:
        assert not model.training
        seen.append(model.items.weight.detach().clone())
        return [0.1, 0.5, 0.2, 0.3, 0.4][len(seen) - 1]

    recipe = Recipe(epochs=5, batch_size=8, patience=2)
    found = fit(
        NextItem(model, recipe), windows, recipe=recipe, validate=validate, seed=0, device=CPU
    )
    assert (found.epochs, found.best_epoch, found.best_score) == (4, 2, 0.5)
    assert torch.equal(model.items.weight, seen[1])
    assert not torch.equal(model.items.weight, seen[3])
    assert not model.training


@pytest.mark.parametrize("together", [1, 16])  # looked at one by one, or some at a time as on a GPU
@pytest.mark.parametrize(("factor", "told"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_no_number_names_the_step(
    factor: float,
    told: str,
    together: int,
    windows: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Looked(steps.Watch):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.together = together

    monkeypatch.setattr("depthprobe.training.loop.Watch", Looked)
    recipe = Recipe(epochs=3, batch_size=8)  # 4 steps an epoch
    models = [small_sasrec(), small_sasrec()]
    with pytest.raises(DivergedError, match=f"the loss is {told} at step 6$"):
        _fit(Spoiled(NextItem(models[0], recipe), 6, lambda loss: loss * factor), windows, recipe)
    with pytest.raises(KilledError):
        _fit(Spoiled(NextItem(models[1], recipe), 6, kill), windows, recipe)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)  # no update by a gradient that is none


def _fit(objective: nn.Module, windows: list[np.ndarray], recipe: Recipe) -> Fit:
    return fit(objective, windows, recipe=recipe, validate=lambda: 0.0, seed=0, device=CPU)


def test_a_gradient_that_is_no_number_names_the_step(windows: list[np.ndarray]) -> None:
    model, recipe = small_sasrec(), Recipe(epochs=2, batch_size=8)
    calls = itertools.count(1)
    model.norm.weight.register_hook(lambda g: g * (float("inf") if next(calls) == 3 else 1.0))
    with pytest.raises(DivergedError, match="gradient (inf|nan), at step 3"):
        _fit(NextItem(model, recipe), windows, recipe)


def test_schedule_rises_then_falls_to_zero() -> None:
    shares = [_cosine(step, 100, 0.1) for step in range(101)]
    assert np.argmax(shares) == 10
    assert shares[0] == pytest.approx(1 / 11)
    assert shares[100] == pytest.approx(0)
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))


@pytest.mark.parametrize("objective", ["every", "last"])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_a_batch_equal_the_batch(
    parts: int, objective: str, windows: list[np.ndarray]
) -> None:
    models = [small_sasrec(drop=0.0).double(), small_sasrec(drop=0.0).double()]
    found = [
        run(model, windows, [0.0, 0.1], objective=objective, accumulation=number)
        for model, number in zip(models, (1, parts), strict=True)
    ]
    assert found[0].losses == pytest.approx(found[1].losses, abs=1e-10)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_step_without_room_is_taken_again_in_smaller_parts(
    windows: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(value: Tensor) -> Tensor:
        value.backward(retain_graph=True)  # some gradients are there already when it fails
        raise torch.OutOfMemoryError("no room")

    settings = Recipe(epochs=2, batch_size=8)
    models = [small_sasrec(drop=0.0).double(), small_sasrec(drop=0.0).double()]
    plain, tight = NextItem(models[0], settings), NextItem(models[1], settings)
    found = [
        fit(
            objective,
            windows,
            recipe=settings,
            validate=lambda: 0.0,
            seed=0,
            device=CPU,
        )
        for objective in (plain, Spoiled(tight, 2, no_room))
    ]
    assert [each.parts for each in found] == [1, 2]
    assert "out of memory at step 2: batches are computed in 2 parts now" in caplog.messages
    assert found[0].losses == pytest.approx(found[1].losses, abs=1e-10)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_progress_is_logged_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "depthprobe")
    clock = iter([0.0, 3.0, 12.0, 15.0, 22.5])
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(clock))
    pace = steps.Pace(10)
    for step in (11, 14, 15, 25):
        pace.tell(step, 40, 1.5)
    assert caplog.messages == [
        "step 14/40  loss 1.5000  at most 78 s left",  # 12 s for 4 steps, 26 more
        "step 25/40  loss 1.5000  at most 22 s left",
    ]


def test_a_user_who_does_not_fit_alone_ends_the_training(windows: list[np.ndarray]) -> None:
    class Full(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.calls = small_sasrec(), 0

        def forward(self, batch: Batch) -> Tensor:
            self.calls += 1
            raise torch.OutOfMemoryError("no room")

    full = Full()
    with pytest.raises(torch.OutOfMemoryError):
        fit(
            full,
            windows,
            recipe=Recipe(epochs=1, batch_size=8),
            validate=lambda: 0.0,
            seed=0,
            device=CPU,
        )
    assert full.calls == 4  # in 1, 2, 4 and 8 parts


def test_padding_changes_neither_loss_nor_gradient(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray]
) -> None:
    """One batch of ragged users equals the same users one at a time, weighted by positions."""
    objective = NextItem(make_recommender().double(), Recipe())
    batch = make_batch(windows, np.arange(6), CPU, "every")
    objective(batch).backward()
    together = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    objective.zero_grad()
    for user in range(6):
        alone = make_batch(windows, np.array([user]), CPU, "every")
        (objective(alone) * alone.count / batch.count).backward()
    apart = [p.grad for p in objective.parameters() if p.grad is not None]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # norms run in float32
