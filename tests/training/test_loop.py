"""The loop learns, keeps the best weights, repeats itself, and stops at a loss of NaN."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from depthprobe.models import recommender
from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Distillation, Elastic, Recipe
from depthprobe.training import loop
from depthprobe.training.distillation import Distiller
from depthprobe.training.distributed import Engine
from depthprobe.training.loop import DivergedError, Fit, _cosine, parts_of
from depthprobe.training.objectives import (
    Batch,
    ElasticObjective,
    NextItem,
    count_targets,
    make_batch,
)

CPU = torch.device("cpu")
MANY = 1_000_000  # positions: more than any batch here has
SHORT = Recipe(epochs=2, batch_size=8)
Train = Callable[..., Fit]
MakeSasrec = Callable[..., SASRec]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")),
    reason="torch.compile needs a C++ compiler on a CPU",
)


def test_training_learns(train: Train, make_sasrec: MakeSasrec) -> None:
    recipe = Recipe(epochs=30, batch_size=8, learning_rate=0.03, patience=40)
    done = train(NextItem(make_sasrec(0.1), recipe), recipe)
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert done.steps == 30 * 4


def test_a_pool_of_one_mixes_lengths_in_a_step(train: Train, make_sasrec: MakeSasrec) -> None:
    spread = {}
    for pool in (1, 50):
        recipe = Recipe(epochs=1, batch_size=8, pool=pool)
        objective, seen = NextItem(make_sasrec(), recipe), []
        objective.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].lengths))
        train(objective, recipe)
        spread[pool] = np.mean([float(lengths.max() - lengths.min()) for lengths in seen])
    assert spread[1] > 2 * spread[50]


@given(
    lengths=st.lists(st.integers(2, 600), min_size=1, max_size=40).map(sorted),
    least=st.integers(1, 3),
    most=st.one_of(st.just(MANY), st.integers(600, 5000)),
)
def test_a_batch_is_computed_in_few_parts_with_little_padding(
    lengths: list[int], least: int, most: int
) -> None:
    def computed(parts: int) -> list[int]:
        return [len(part) * part[-1] for part in np.array_split(lengths, parts) if len(part)]

    parts = parts_of(np.array(lengths), least, most)
    assert 1 <= parts <= len(lengths)
    if most < MANY:  # one window may be longer than a part should be
        assert max(computed(parts)) <= most + lengths[-1]
        assert parts == len(lengths) or parts * most >= len(lengths) * lengths[-1]
        return
    assert parts in {min(n * least, len(lengths)) for n in (1, 2, 4)}
    if min(least, len(lengths)) < parts < min(4 * least, len(lengths)):
        few = max(256, 0.1 * sum(lengths))
        assert sum(computed(parts)) - sum(lengths) <= few < sum(computed(least)) - sum(lengths)


def test_the_same_seed_gives_the_same_weights_whatever_validation_draws(
    train: Train, make_sasrec: MakeSasrec, assert_same: Callable[..., None]
) -> None:
    models = [make_sasrec(0.1), make_sasrec(0.1)]
    for model, drawn in zip(models, (0, 3), strict=True):
        torch.rand(drawn)  # the state before must not matter
        train(NextItem(model, SHORT), SHORT, validate=lambda drawn=drawn: len(torch.rand(drawn)))
    assert_same(*models)


def test_best_weights_are_kept_and_patience_ends_it(train: Train, make_sasrec: MakeSasrec) -> None:
    model, seen, scores = make_sasrec(0.1), [], [0.1, 0.5, 0.2, 0.3, 0.4]

    def validate() -> float:
        assert not model.training
        seen.append(model.items.weight.detach().clone())
        return scores[len(seen) - 1]

    recipe = Recipe(epochs=5, batch_size=8, patience=2)
    done = train(NextItem(model, recipe), recipe, validate=validate)
    assert (done.epochs, done.best_epoch, done.best_score) == (4, 2, 0.5)
    assert torch.equal(model.items.weight, seen[1])
    assert not torch.equal(model.items.weight, seen[3])
    assert not model.training


def test_a_score_that_is_no_number_is_never_the_best(train: Train, make_sasrec: MakeSasrec) -> None:
    recipe, nan = Recipe(epochs=4, batch_size=8, patience=4), float("nan")
    done = train(NextItem(make_sasrec(), recipe), recipe, [nan, 0.5, nan, 0.4])
    assert (done.best_epoch, done.best_score) == (2, 0.5)


@pytest.mark.parametrize("together", [1, 16])  # read one by one, or some at a time as on a GPU
@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_a_loss_that_is_no_number_names_the_step(
    factor: str,
    together: int,
    train: Train,
    make_sasrec: MakeSasrec,
    spoiled: Callable[..., nn.Module],
    assert_same: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Monitor(loop.LossMonitor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.together = together

    monkeypatch.setattr(loop, "LossMonitor", Monitor)
    models = [make_sasrec(0.1), make_sasrec(0.1)]
    bad, cut = (NextItem(model, SHORT) for model in models)
    with pytest.raises(DivergedError, match="the loss is no finite number at step 6$"):
        train(spoiled(bad, 6, lambda loss: loss * float(factor)), SHORT)
    with pytest.raises(SystemExit):
        train(spoiled(cut, 6), SHORT)
    assert_same(*models)  # no update by a gradient that is none


def test_a_gradient_that_is_no_number_names_the_step(train: Train, make_sasrec: MakeSasrec) -> None:
    model, calls = make_sasrec(), itertools.count(1)
    model.norm.weight.register_hook(lambda g: g * (float("inf") if next(calls) == 3 else 1.0))
    with pytest.raises(DivergedError, match="gradient is no finite number at step 3"):
        train(NextItem(model, SHORT), SHORT)


def test_schedule_rises_then_falls_to_zero() -> None:
    shares = [_cosine(step, 100, 0.1) for step in range(101)]
    assert np.argmax(shares) == 10
    assert shares[0] == pytest.approx(1 / 11)
    assert shares[100] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(shares[10:]))


@pytest.mark.parametrize("objective", ["every", "last"])
@pytest.mark.parametrize("parts", [20, 1])
def test_parts_of_a_batch_equal_the_batch(
    parts: int,
    objective: Any,
    train: Train,
    make_sasrec: MakeSasrec,
    assert_same: Callable[..., None],
) -> None:
    models, losses, seen = [make_sasrec().double(), make_sasrec().double()], [], ([], [])
    for model, own, sizes in zip(models, (0, parts), seen, strict=True):
        recipe = Recipe(epochs=2, batch_size=8, objective=objective, tokens=own)
        goal = NextItem(model, recipe)
        goal.register_forward_pre_hook(
            lambda _, args, own=sizes: own.append(args[0].inputs.numel())
        )
        losses.append(train(goal, recipe).losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    assert_same(*models, near=1e-10)
    assert max(seen[1]) < max(seen[0])


def test_a_step_without_room_is_taken_again_in_smaller_parts(
    train: Train,
    make_sasrec: MakeSasrec,
    spoiled: Callable[..., nn.Module],
    assert_same: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_room(loss: Tensor) -> Tensor:
        loss.backward(retain_graph=True)  # some gradients are there already when it fails
        raise torch.OutOfMemoryError("no room")

    models = [make_sasrec().double(), make_sasrec().double()]
    plain, tight = (NextItem(model, SHORT) for model in models)
    done = [train(objective, SHORT) for objective in (plain, spoiled(tight, 2, no_room))]
    assert [each.parts for each in done] == [1, 2]
    assert "out of memory at step 2: batches are computed in 2 parts now" in caplog.messages
    assert done[0].losses == pytest.approx(done[1].losses, abs=1e-10)
    assert_same(*models, near=1e-10)


def test_less_room_than_the_recipe_asks_for_halves_its_parts(
    train: Train, make_sasrec: MakeSasrec, spoiled: Callable[..., nn.Module]
) -> None:
    def no_room(loss: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    recipe = Recipe(epochs=2, batch_size=8, tokens=20)  # of each part of a batch
    sizes: list[int] = []
    objective = spoiled(NextItem(make_sasrec(), recipe), 1, no_room)
    objective.register_forward_pre_hook(lambda _, args: sizes.append(args[0].inputs.shape[0]))
    train(objective, recipe)
    assert 1 < sizes[0] < 8  # users at once, as the recipe says
    assert sizes[1] <= (sizes[0] + 1) // 2


def test_a_user_who_does_not_fit_alone_ends_the_training(
    train: Train, make_sasrec: MakeSasrec
) -> None:
    class Full(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.calls = make_sasrec(), 0

        def forward(self, batch: Batch) -> Tensor:
            self.calls += 1
            raise torch.OutOfMemoryError("no room")

    full = Full()
    with pytest.raises(torch.OutOfMemoryError):
        train(full, SHORT)
    assert full.calls == 4  # in 1, 2, 4 and 8 parts


def test_steps_are_logged_now_and_then(
    train: Train,
    make_sasrec: MakeSasrec,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = itertools.count(0.0, 4.0)  # seconds
    monkeypatch.setattr(loop, "time", type("Clock", (), {"perf_counter": lambda: next(clock)}))
    caplog.set_level(logging.INFO, "depthprobe")
    train(NextItem(make_sasrec(), SHORT), SHORT)
    lines = [line for line in caplog.messages if line.startswith("step")]
    assert [line.split("  ")[0] for line in lines] == ["step 3/8", "step 6/8"]
    assert lines[0].endswith("at most 20 s left")  # 12 s for 3 steps, 5 more


def test_padding_changes_neither_loss_nor_gradient(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray]
) -> None:
    """One batch of ragged users equals the same users one at a time, weighted by targets."""
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


# Precision and compilation


def test_bfloat16_ends_near_float32(train: Train, make_sasrec: MakeSasrec) -> None:
    for loss in ("full", "sampled-softmax", "gbce"):
        plain = {"epochs": 12, "batch_size": 8, "learning_rate": 0.02, "patience": 12}
        plain |= {"loss": loss, "negatives": 6}
        half = Recipe(**plain, precision="bfloat16")
        model = make_sasrec()
        expected = train(NextItem(make_sasrec(), Recipe(**plain)), Recipe(**plain)).losses
        losses = train(NextItem(model, half), half).losses
        assert losses[-1] < 0.7 * losses[0]
        assert losses == pytest.approx(expected, rel=0.05, abs=0.02)
        assert losses != expected
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_model_computes_in_bfloat16_and_is_as_it_was_after(
    train: Train, make_recommender: Callable[..., Recommender]
) -> None:
    model, dtypes = make_recommender(blocks=2), []
    model.register_forward_hook(lambda _, __, vectors: dtypes.append(vectors.dtype))
    objective = NextItem(model, Recipe())
    before = set(vars(objective))
    for precision in ("bfloat16", "float32"):
        train(objective, Recipe(epochs=1, batch_size=8, precision=precision))
        assert set(vars(objective)) == before  # no mark stays behind
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32] * 4


def test_weights_are_cast_once_for_all_parts_of_a_step(
    make_recommender: Callable[..., Recommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = [np.arange(1, length) for length in (4, 6, 6, 9, 11)]
    model = make_recommender(blocks=2, prompt=()).train()
    model.backbone.layers.requires_grad_(True)
    objective = NextItem(model, recipe := Recipe(precision="bfloat16"))
    engine, chosen = Engine(objective, recipe, CPU), np.arange(5)
    casts: list[int] = []
    monkeypatch.setattr(
        torch,
        "clear_autocast_cache",
        lambda before=torch.clear_autocast_cache: casts.append(1) or before(),
    )
    loss = loop._gradients(engine, windows, chosen, 3)
    assert len(casts) == 1
    together = {name: p.grad.clone() for name, p in engine.weights.items() if p.grad is not None}
    engine.zero_grad()
    total, apart = sum(map(len, windows)) - 5, 0.0
    for part in np.array_split(chosen, 3):
        batch = make_batch(windows, part, CPU, "every")
        with engine.autocast():
            share = objective(batch) * (batch.count / total)
        share.backward()
        apart += share.item()
    assert float(loss) == pytest.approx(apart, rel=1e-6)
    for name, gradient in together.items():
        assert torch.equal(engine.weights[name].grad, gradient)


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "suffix", "tapped", "elastic"])
def test_the_prompt_runs_once_for_all_parts_of_a_step(
    kind: str, make_recommender: Callable[..., Recommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = [np.arange(1, length) for length in (4, 6, 6, 9, 11)]
    ends: Any = "last" if kind == "suffix" else "every"
    recipe = Recipe(objective=ends)
    model = make_recommender(blocks=3, suffix=(4, 2) if kind == "suffix" else ()).train()
    model.backbone.requires_grad_(True)
    model.checkpoint_blocks(kind == "checkpointed")
    objective: nn.Module = NextItem(model, recipe)
    if kind == "tapped":
        losses = Distillation(cosine=0, norm=0, supervision=1)
        objective = Distiller(model, losses, recipe, None)
    if kind == "elastic":
        objective = ElasticObjective(model, Elastic(dropout=0.9), recipe)
    engine, chosen, runs = Engine(objective, recipe, CPU), np.arange(5), []
    run = recommender.shared_prompt
    monkeypatch.setattr(
        recommender, "shared_prompt", lambda *given, **named: runs.append(1) or run(*given, **named)
    )
    loss = loop._gradients(engine, windows, chosen, 3)
    assert len(runs) == 1
    together = {name: p.grad.clone() for name, p in engine.weights.items() if p.grad is not None}
    engine.zero_grad()
    total, apart = int(count_targets(windows, ends).sum()), 0.0
    for part in np.array_split(chosen, 3):
        batch = make_batch(windows, part, CPU, ends, draw=loop._random_number(chosen.tolist()))
        share = objective(batch) * (batch.count / total)
        share.backward()
        apart += share.item()
    assert len(runs) == 4  # outside a step it runs anew, with the weights of then
    assert float(loss) == pytest.approx(apart, rel=1e-6)
    (tokens,) = (gradient for name, gradient in together.items() if "embed_tokens" in name)
    assert tokens[model.prompt].abs().sum() > 0  # the prompt itself has gradients
    for name, p in engine.weights.items():
        assert (p.grad is None) == (name not in together)
        if p.grad is not None:
            torch.testing.assert_close(together[name], p.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_validation_computes_as_the_training_does(precision: str, make_sasrec: MakeSasrec) -> None:
    found = []

    def validate() -> float:
        found.append(torch.is_autocast_enabled("cpu"))
        return 0.0

    recipe = Recipe(epochs=2, batch_size=8, precision=precision)
    windows = [np.array([1, 2, 3]) for _ in range(8)]
    loop.fit(
        NextItem(make_sasrec(), recipe),
        windows,
        recipe=recipe,
        validate=validate,
        seed=0,
        device=CPU,
    )
    assert found == [precision == "bfloat16"] * 2


class Slope(nn.Module):
    """A weight of 1 that each step of AdamW lowers by the learning rate."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, batch: Batch) -> Tensor:
        return self.weight.float().sum()


def test_steps_too_small_for_bfloat16_add_up(train: Train) -> None:
    recipe = Recipe(epochs=8, batch_size=8, learning_rate=1e-3, weight_decay=0, patience=8)
    single, half = Slope(torch.float32), Slope(torch.bfloat16)
    for objective in (single, half):
        train(objective, recipe, range(8))
    assert half.weight.dtype == torch.bfloat16
    assert (1 - torch.tensor(1e-3)).bfloat16() == 1  # one step alone vanishes
    assert single.weight < 0.985
    torch.testing.assert_close(half.weight, single.weight.bfloat16())


@pytest.mark.slow
@needs_compiler
def test_compiled_equals_plain(train: Train, make_sasrec: MakeSasrec) -> None:
    one, other = make_sasrec(), make_sasrec()
    names, quick = list(other.state_dict()), Recipe(epochs=2, batch_size=8, compile=True)
    expected, done = train(NextItem(one, SHORT), SHORT), train(NextItem(other, quick), quick)
    assert done.losses == pytest.approx(expected.losses, rel=1e-5)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert list(other.state_dict()) == names


def test_compiled_models_are_called_compiled(
    train: Train, make_sasrec: MakeSasrec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for the compiler: in training, not in validation, and not after."""
    model, calls = make_sasrec(), []

    def stand_in(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        assert options == {"dynamic": True}

        def compiled(*args: object) -> Tensor:
            calls.append(model.training)
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", stand_in)
    recipe = Recipe(epochs=2, batch_size=8, compile=True)
    train(NextItem(model, recipe), recipe)
    assert calls == [True] * 8
    model(torch.ones(1, 3, dtype=torch.long))
    assert len(calls) == 8
