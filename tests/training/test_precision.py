"""bfloat16 and torch.compile: near the plain training, and the model is as it was after."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Distillation, Recipe
from depthprobe.training.distillation import Distiller, feature_spec
from depthprobe.training.features import CachedTeacher, write_features
from depthprobe.training.loop import Fit, fit
from depthprobe.training.objectives import Batch, NextItem

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")),
    reason="torch.compile needs a C++ compiler on a CPU",
)


def sasrec() -> SASRec:
    torch.manual_seed(0)
    return SASRec(12, width=16, blocks=1, heads=2, drop=0.0, longest=10)


def train(objective: nn.Module, windows: list[np.ndarray], recipe: Recipe) -> Fit:
    return fit(objective, windows, recipe=recipe, validate=lambda: 0.0, seed=0, device=CPU)


class Seen(nn.Module):
    """An objective that notes in which dtypes its model answers and its loss comes."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.inner = NextItem(model, recipe)
        self.vectors: set[torch.dtype] = set()
        model.register_forward_hook(lambda _, __, out: self.vectors.add(out.dtype))

    def forward(self, batch: Batch) -> Tensor:
        value: Tensor = self.inner(batch)
        return value


@pytest.mark.parametrize("loss", ["full", "sampled-softmax", "gbce"])
def test_bfloat16_ends_near_float32(loss: str, windows: list[np.ndarray]) -> None:
    plain = Recipe(
        epochs=12,
        batch_size=8,
        learning_rate=0.02,
        patience=12,
        loss=loss,  # type: ignore[arg-type]
        negatives=6,
    )
    half = Recipe(**{**vars(plain), "precision": "bfloat16"})
    expected = train(NextItem(sasrec(), plain), windows, plain)
    model = sasrec()
    found = train(Seen(model, half), windows, half)
    assert found.losses[-1] < 0.6 * found.losses[0]
    assert found.losses == pytest.approx(expected.losses, rel=0.05, abs=0.02)
    assert found.losses != expected.losses
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_model_computes_in_bfloat16(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray]
) -> None:
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        recipe = Recipe(epochs=1, batch_size=8, precision=precision)  # type: ignore[arg-type]
        seen = Seen(make_recommender(blocks=2), recipe)
        train(seen, windows, recipe)
        assert seen.vectors == {dtype}


def test_an_objective_is_as_it_was(windows: list[np.ndarray]) -> None:
    """Neither autocast nor accelerate's marks stay behind."""
    half = Recipe(epochs=1, batch_size=8, precision="bfloat16")
    plain = Recipe(epochs=1, batch_size=8)
    model = sasrec()
    objective = Seen(model, plain)
    before = set(vars(objective))
    train(objective, windows, half)
    assert set(vars(objective)) == before
    objective.vectors.clear()
    train(objective, windows, plain)
    assert objective.vectors == {torch.float32}


@pytest.mark.slow
@needs_compiler
def test_compiled_equals_plain(windows: list[np.ndarray]) -> None:
    plain, quick = (Recipe(epochs=2, batch_size=8, compile=on) for on in (False, True))
    one, other = sasrec(), sasrec()
    names = list(other.state_dict())
    expected, found = (train(NextItem(m, r), windows, r) for m, r in ((one, plain), (other, quick)))
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert list(other.state_dict()) == names
    assert other._compiled_call_impl is None


def test_compiled_models_are_called_compiled(
    windows: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for the compiler: in training, not in validation, and not after."""
    model, calls = sasrec(), []

    def stand_in(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        assert options == {"dynamic": True}

        def compiled(*args: object) -> Tensor:
            calls.append(model.training)
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", stand_in)
    recipe = Recipe(epochs=2, batch_size=8, compile=True)
    train(NextItem(model, recipe), windows, recipe)
    assert calls == [True] * 8
    model(torch.ones(1, 3, dtype=torch.long))
    assert len(calls) == 8


def test_a_tapped_student_runs_uncompiled(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray], tmp_path: Path
) -> None:
    weights = Distillation(groups=2)
    wanted = feature_spec(weights, Recipe(), depth=2, teacher_depth=4)
    write_features(make_recommender().eval(), windows, wanted, folder=tmp_path, device=CPU)
    teacher = CachedTeacher(tmp_path, windows, wanted)
    losses = []
    for on in (False, True):
        recipe = Recipe(epochs=1, batch_size=8, compile=on)
        student = make_recommender(blocks=2, seed=1)
        torch.manual_seed(0)
        distiller = Distiller(student, weights, recipe, teacher)
        losses.append(train(distiller, windows, recipe).losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
