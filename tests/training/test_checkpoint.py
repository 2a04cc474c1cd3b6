"""A training that was killed goes on to the same numbers, to the bit, or says why it can't."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Recipe
from depthprobe.training import checkpoint as checkpoints
from depthprobe.training.loop import Fit
from depthprobe.training.objectives import NextItem

RECIPE = Recipe(epochs=4, batch_size=8, tokens=28, learning_rate=0.01, patience=4)
# calls an epoch: 30 windows are 4 batches, in 2 parts each

Run = Callable[..., Fit]
AssertSame = Callable[..., None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "training.safetensors"


@pytest.fixture
def sasrec(make_sasrec: Callable[..., SASRec]) -> Callable[[], SASRec]:
    return lambda: make_sasrec(0.3)


@pytest.fixture
def run(
    train: Callable[..., Fit], spoiled: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Train with a checkpoint after each step, killed at a call; the score is the items' norm."""
    monkeypatch.setattr(checkpoints, "SHARE", 0)

    def run(model: nn.Module, path: Path | None, *, killed: int = 0, **changes: Any) -> Fit:
        own = {name: changes.pop(name) for name in [*changes] if not hasattr(RECIPE, name)}
        recipe = replace(RECIPE, **changes)
        objective = spoiled(NextItem(model, recipe), killed)
        score = {"validate": lambda: float(model.item_matrix().detach().norm())}  # type: ignore[operator]
        return train(objective, recipe, **{**score, "checkpoint": path, "every": 0.0, **own})

    return run


def die() -> float:
    raise SystemExit


@pytest.mark.parametrize("call", [1, 2, 9, 12, 32])
def test_resumed_to_the_bit(
    call: int, run: Run, sasrec: Callable[[], SASRec], path: Path, assert_same: AssertSame
) -> None:
    """Killed at the very first call, in mid-batch, and at both ends of an epoch."""
    straight, resumed = sasrec(), sasrec()
    expected = run(straight, None)
    with pytest.raises(SystemExit):
        run(sasrec(), path, killed=call)
    assert path.exists() == (call > 2)
    torch.rand(5)  # the state before must not matter
    done = run(resumed, path)
    assert done == expected
    assert done.resumed_at == ([(call - 1) // 2] if call > 2 else [])
    assert_same(resumed, straight)


def test_resumed_again_and_again(
    run: Run, sasrec: Callable[[], SASRec], path: Path, assert_same: AssertSame
) -> None:
    straight, resumed = sasrec(), sasrec()
    drawn = {"loss": "sampled-softmax", "negatives": 4}
    expected = run(straight, None, **drawn)
    for _ in range(5):  # 3 steps further each time
        with pytest.raises(SystemExit):
            run(sasrec(), path, killed=7, **drawn)
    done = run(resumed, path, **drawn)
    assert done == expected
    assert done.resumed_at == [3, 6, 9, 12, 15]
    assert_same(resumed, straight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_recommender_with_frozen_weights(
    dtype: torch.dtype,
    run: Run,
    make_recommender: Callable[..., Recommender],
    path: Path,
    assert_same: AssertSame,
) -> None:
    """In bfloat16, too, where the float32 copies go on."""

    def make() -> Recommender:
        model = make_recommender(blocks=2)
        model.backbone.to(dtype)
        model.token_embeddings.requires_grad_(False)
        model.backbone.layers[0].requires_grad_(False)
        return model

    straight, resumed = make(), make()
    expected = run(straight, None)
    with pytest.raises(SystemExit):
        run(make(), path, killed=14)
    with safe_open(path, framework="pt") as file:
        names = " ".join(file.keys())
    assert "layers.1." in names
    assert "layers.0." not in names
    assert "embed_tokens" not in names
    assert run(resumed, path) == expected
    assert_same(resumed, straight)


def test_killed_while_it_validates(
    run: Run, sasrec: Callable[[], SASRec], path: Path, assert_same: AssertSame
) -> None:
    straight, resumed = sasrec(), sasrec()
    expected = run(straight, None)
    with pytest.raises(SystemExit):
        run(sasrec(), path, validate=die)
    done = run(resumed, path)
    assert (done, done.resumed_at) == (expected, [4])
    assert_same(resumed, straight)


@pytest.mark.parametrize("option", ["checkpoint", "result"])
def test_an_ended_training_trains_no_more(
    option: str, run: Run, sasrec: Callable[[], SASRec], path: Path, assert_same: AssertSame
) -> None:
    first, again = sasrec(), sasrec()
    expected = run(first, None, **{option: path})
    done = run(again, None, killed=1, validate=die, **{option: path})  # neither is called
    assert done == expected
    assert done.reused == (option == "result")
    assert_same(again, first)
    assert not again.training


def test_a_damaged_result_is_as_good_as_none(
    run: Run, sasrec: Callable[[], SASRec], path: Path
) -> None:
    path.parent.mkdir()
    path.write_bytes(b"nonsense that is long enough to have a header")
    expected = run(sasrec(), None, result=path)
    assert not expected.reused
    assert run(sasrec(), None, result=path, killed=1) == expected


@pytest.mark.parametrize(
    "change",
    [lambda w: w * 0.5, lambda w: w * float("nan"), lambda w: w.flatten()[:1].clone()],
    ids=["halved", "NaN", "one number"],
)
def test_weights_that_were_changed_are_never_used(
    change: Callable[[torch.Tensor], torch.Tensor],
    run: Run,
    sasrec: Callable[[], SASRec],
    path: Path,
    assert_same: AssertSame,
) -> None:
    first, again = sasrec(), sasrec()
    expected = run(first, None, result=path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        weights = {name: change(file.get_tensor(name)) for name in list(file.keys())}
    save_file(weights, path, metadata=header)
    with pytest.raises(ValueError, match="was changed"):
        run(sasrec(), path)
    done = run(again, None, result=path)
    assert not done.reused
    assert done == expected
    assert_same(again, first)


def test_a_short_training_writes_nothing(
    run: Run, sasrec: Callable[[], SASRec], path: Path
) -> None:
    run(sasrec(), path, every=60)
    assert not path.exists()


def test_writing_takes_a_small_part_of_the_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: now)
    store = checkpoints.Checkpoint(path, {}, every=60)
    store._took = 10.0
    now = 199.0
    assert not store.is_due()
    now = 200.0
    assert store.is_due()


def test_another_trainings_checkpoint_is_refused(
    run: Run, sasrec: Callable[[], SASRec], windows: list[np.ndarray], path: Path
) -> None:
    run(sasrec(), path)
    for changes, message in (
        ({"seed": 1}, "seed was 0, is 1"),
        ({"learning_rate": 0.02}, "recipe.learning_rate was 0.01, is 0.02"),
        ({"objective": "last"}, "recipe.objective was every, is last"),
        ({"windows": [*windows[:-1], windows[-1][::-1]]}, "windows was .*"),
    ):
        with pytest.raises(ValueError, match=f"another training \\({message}\\)"):
            run(sasrec(), path, **changes)
    with pytest.raises(ValueError, match="another training \\(weights was"):
        run(sasrec().double(), path)


def test_a_damaged_file_or_another_format_is_refused(
    run: Run, sasrec: Callable[[], SASRec], path: Path
) -> None:
    path.parent.mkdir()
    other = {"depthprobe": json.dumps({"format": "new"})}
    for write, message in (
        (lambda: path.write_bytes(b""), "no checkpoint of a training"),
        (lambda: path.write_bytes(b"nonsense with a header's length"), "no checkpoint"),
        (lambda: save_file({"a": torch.zeros(1)}, path), "no checkpoint"),
        (lambda: save_file({"a": torch.zeros(1)}, path, other), "format 'new'"),
    ):
        write()
        with pytest.raises(ValueError, match=message):
            run(sasrec(), path)


def test_scores_that_are_no_number_survive(
    run: Run, sasrec: Callable[[], SASRec], path: Path
) -> None:
    score = {"validate": lambda: float("nan"), "epochs": 2}
    with pytest.raises(SystemExit):
        run(sasrec(), path, killed=12, **score)
    assert np.isnan(run(sasrec(), path, **score).scores).tolist() == [True, True]


def test_weights_put_aside_stay_as_they_were(tmp_path: Path) -> None:
    weights = {
        "odd": torch.randn(3, 5).bfloat16(),
        "scalar": torch.randn(()),
        "view": torch.randn(4, 6).T,
        "double": torch.randn(7, dtype=torch.float64),
    }
    before = {name: weight.clone() for name, weight in weights.items()}
    kept = [checkpoints.put_aside(weights, folder) for folder in (None, tmp_path / "aside")]
    for weight in weights.values():
        weight.zero_()
    for own in kept:
        own.leave_memory()
        assert {name: own[name].dtype for name in own} == {n: w.dtype for n, w in before.items()}
        for name, weight in before.items():
            assert torch.equal(own[name], weight)
    assert not any((tmp_path / "aside").iterdir())  # no file is left if the process is killed
