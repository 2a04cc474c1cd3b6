"""A training that was killed goes on to the same numbers, to the bit, or says why it can't."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Recipe
from depthprobe.training import checkpoint as checkpoints
from depthprobe.training.loop import Fit, fit
from depthprobe.training.objectives import Batch, NextItem

pytestmark = pytest.mark.usefixtures("_each_step")

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=4, batch_size=8, accumulation=2, learning_rate=0.01, patience=2)
CALLS = 8  # an epoch: 30 windows are 4 batches, in 2 parts each


@pytest.fixture
def _each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write after every step, whatever the time it takes."""
    monkeypatch.setattr(checkpoints, "SHARE", 0)


class KilledError(Exception):
    """Someone killed the training."""


class Killed(nn.Module):
    """An objective that kills its training at one of its calls, from 1; 0: at none."""

    def __init__(self, objective: nn.Module, call: int) -> None:
        super().__init__()
        self.objective, self.call, self.calls = objective, call, itertools.count(1)

    def forward(self, batch: Batch) -> Tensor:
        if next(self.calls) == self.call:
            raise KilledError
        value: Tensor = self.objective(batch)
        return value


def sasrec() -> SASRec:
    torch.manual_seed(0)
    return SASRec(12, width=8, blocks=1, heads=2, drop=0.3, longest=10)


def train(
    model: nn.Module,
    windows: list[np.ndarray],
    path: Path | None,
    *,
    killed: int = 0,
    seed: int = 0,
    every: float = 0.0,
    **changes: Any,
) -> Fit:
    """Train, killed at a call; the score is a real one, the items' norm."""
    recipe = Recipe(**{**vars(RECIPE), **changes})
    return fit(
        Killed(NextItem(model, recipe), killed),
        windows,
        recipe=recipe,
        validate=lambda: float(model.item_matrix().detach().norm()),  # type: ignore[operator]
        seed=seed,
        device=CPU,
        checkpoint=path,
        every=every,
    )


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("call", [1, 2, 9, 12, 13, 24, 32])
def test_resumed_to_the_bit(call: int, windows: list[np.ndarray], tmp_path: Path) -> None:
    """Killed at the very first call, in mid-batch, and at both ends of an epoch."""
    straight = sasrec()
    expected = train(straight, windows, None)
    path = tmp_path / "deep" / "training.safetensors"
    with pytest.raises(KilledError):
        train(sasrec(), windows, path, killed=call)
    assert path.exists() == (call > 2)
    resumed = sasrec()
    torch.rand(5)  # the state before must not matter
    found = train(resumed, windows, path)
    assert found == expected
    assert found.resumed_at == ([(call - 1) // 2] if call > 2 else [])
    assert_same(resumed, straight)


def test_resumed_again_and_again(windows: list[np.ndarray], tmp_path: Path) -> None:
    straight, path = sasrec(), tmp_path / "training.safetensors"
    drawn = {"loss": "sampled-softmax", "negatives": 4}
    expected = train(straight, windows, None, **drawn)
    for _ in range(5):  # 3 steps further each time
        with pytest.raises(KilledError):
            train(sasrec(), windows, path, killed=7, **drawn)
    resumed = sasrec()
    found = train(resumed, windows, path, **drawn)
    assert found == expected
    assert found.resumed_at == [3, 6, 9, 12, 15]
    assert_same(resumed, straight)


def test_resumed_recommender_with_frozen_weights(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray], tmp_path: Path
) -> None:
    def make() -> Recommender:
        model = make_recommender(blocks=2)
        model.token_embeddings.requires_grad_(False)
        model.backbone.layers[0].requires_grad_(False)
        return model

    straight, resumed, path = make(), make(), tmp_path / "training.safetensors"
    expected = train(straight, windows, None)
    with pytest.raises(KilledError):
        train(make(), windows, path, killed=14)
    with safe_open(path, framework="pt") as file:
        names = " ".join(file.keys())
    assert "layers.1." in names
    assert "layers.0." not in names
    assert "embed_tokens" not in names
    assert train(resumed, windows, path) == expected
    assert_same(resumed, straight)


def test_killed_while_it_validates(windows: list[np.ndarray], tmp_path: Path) -> None:
    straight, resumed, path = sasrec(), sasrec(), tmp_path / "training.safetensors"
    expected = train(straight, windows, None)

    def die() -> float:
        raise KilledError

    objective = Killed(NextItem(sasrec(), RECIPE), 0)
    with pytest.raises(KilledError):
        fit(
            objective,
            windows,
            recipe=RECIPE,
            validate=die,
            seed=0,
            device=CPU,
            checkpoint=path,
            every=0,
        )
    found = train(resumed, windows, path)
    assert (found, found.resumed_at) == (expected, [4])
    assert_same(resumed, straight)


def test_an_ended_training_trains_no_more(windows: list[np.ndarray], tmp_path: Path) -> None:
    first, again, path = sasrec(), sasrec(), tmp_path / "training.safetensors"
    expected = train(first, windows, path)
    assert train(again, windows, path, killed=1) == expected  # not called once
    assert_same(again, first)
    assert not again.training


def test_a_short_training_writes_nothing(windows: list[np.ndarray], tmp_path: Path) -> None:
    train(sasrec(), windows, tmp_path / "training.safetensors", every=60)
    assert not list(tmp_path.iterdir())


def test_writing_takes_a_small_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(checkpoints, "SHARE", 20)
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: now)
    store = checkpoints.Checkpoint(tmp_path / "training.safetensors", {}, every=60)
    store._took = 10.0
    now = 199.0
    assert not store.is_due()
    now = 200.0
    assert store.is_due()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"learning_rate": 0.02}, "recipe.learning_rate was 0.01, is 0.02"),
        ({"objective": "last"}, "recipe.objective was every, is last"),
    ],
)
def test_another_trainings_checkpoint_is_refused(
    changes: dict[str, Any], told: str, windows: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "training.safetensors"
    train(sasrec(), windows, path)
    with pytest.raises(ValueError, match=f"another training \\({told}\\)"):
        train(sasrec(), windows, path, **changes)


def test_other_windows_or_weights_are_refused(windows: list[np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    train(sasrec(), windows, path)
    other = [*windows[:-1], windows[-1][::-1]]
    with pytest.raises(ValueError, match="another training \\(windows was"):
        train(sasrec(), other, path)
    with pytest.raises(ValueError, match="another training \\(weights was"):
        train(sasrec().double(), windows, path)


@pytest.mark.parametrize("content", [b"", b"nonsense that is long enough to have a header"])
def test_a_damaged_file_is_refused(
    content: bytes, windows: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "training.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        train(sasrec(), windows, path)


def test_another_file_or_format_is_refused(windows: list[np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        train(sasrec(), windows, path)
    save_file({"a": torch.zeros(1)}, path, {"depthprobe": json.dumps({"format": "new"})})
    with pytest.raises(ValueError, match="format 'new'"):
        train(sasrec(), windows, path)


def test_scores_that_are_no_number_survive(windows: list[np.ndarray], tmp_path: Path) -> None:
    path, recipe = tmp_path / "training.safetensors", Recipe(epochs=2, batch_size=8)

    def run(killed: int) -> Fit:
        return fit(
            Killed(NextItem(sasrec(), recipe), killed),
            windows,
            recipe=recipe,
            validate=lambda: float("nan"),
            seed=0,
            device=CPU,
            checkpoint=path,
            every=0,
        )

    with pytest.raises(KilledError):
        run(6)
    assert np.isnan(run(0).scores).tolist() == [True, True]
