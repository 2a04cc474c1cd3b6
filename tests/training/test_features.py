"""What the teacher says: on disk as directly, for every kind of feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import tap_blocks
from depthprobe.training.features import CachedTeacher, FeatureSpec, OnlineTeacher, write_features
from depthprobe.training.objectives import Batch, last_only, make_batch

CPU = torch.device("cpu")
OBJECTIVES = ("every", "last")
Maker = Callable[..., Recommender]


def cached(
    teacher: Recommender, windows: list[np.ndarray], wanted: FeatureSpec, folder: Path
) -> CachedTeacher:
    folder.mkdir()
    write_features(teacher, windows, wanted, folder=folder, device=CPU, batch_size=7)
    return CachedTeacher(folder, windows, wanted)


def asked_at(batch: Batch, state: torch.Tensor) -> torch.Tensor:
    """A block's output where the next item is asked, without prompt or suffix: (N, D)."""
    rows = zip(state, batch.lengths.tolist(), strict=True)
    if batch.objective == "last":
        return torch.stack([row[length - 1] for row, length in rows])
    return torch.cat([row[:length] for row, length in rows])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_states_and_scores_are_the_teachers(
    objective: str, make_recommender: Maker, windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender().eval()
    wanted = FeatureSpec(objective=objective, ends=(2, 3, 4), vectors=True, top=5)  # type: ignore[arg-type]
    cached(teacher, windows, wanted, tmp_path / "f")
    # a student may want less than there is
    own = FeatureSpec(objective=objective, ends=(2, 4), vectors=True, top=3)  # type: ignore[arg-type]
    batch = make_batch(windows, np.array([4, 0, 9]), CPU, objective)  # type: ignore[arg-type]
    said = CachedTeacher(tmp_path / "f", windows, own).at(batch)
    with torch.no_grad(), tap_blocks(teacher.backbone) as tap:
        every = teacher(batch.inputs)
    assert said.states is not None
    assert said.vectors is not None
    assert said.top is not None
    assert said.scores is not None
    for found, end in zip(said.states, own.ends, strict=True):
        direct = asked_at(batch, tap.states[end])
        torch.testing.assert_close(found, direct, rtol=1e-3, atol=1e-5)  # float16's rounding
    vectors = asked_at(batch, every)
    torch.testing.assert_close(said.vectors, vectors)
    best = (vectors @ teacher.item_matrix()[1:].T).topk(3, dim=1)
    assert torch.equal(said.top.long(), best.indices + 1)
    torch.testing.assert_close(said.scores, best.values)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("top", [0, 4])
def test_cached_and_online_say_the_same_to_the_bit(
    objective: str, top: int, make_recommender: Maker, windows: list[np.ndarray], tmp_path: Path
) -> None:
    """In float64: in float32 another batch moves a number by its last bit, here and there."""
    teacher = make_recommender().double().eval()
    wanted = FeatureSpec(objective=objective, ends=(1, 4), vectors=True, top=top)  # type: ignore[arg-type]
    on_disk, online = (
        cached(teacher, windows, wanted, tmp_path / "f"),
        OnlineTeacher(teacher, wanted),
    )
    for chosen in ([0, 1, 2], [9, 5], [20]):
        batch = make_batch(windows, np.array(chosen), CPU, objective)  # type: ignore[arg-type]
        one, other = on_disk.at(batch), online.at(batch)
        for name in ("states", "vectors", "top", "scores"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None and b is None) or torch.equal(a, b.to(a.dtype)), name


def test_last_positions_alone_are_kept_where_they_are_wanted(
    make_recommender: Maker, windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender().eval()
    last = cached(teacher, windows, FeatureSpec("last", ends=(4,)), tmp_path / "last")
    every = cached(teacher, windows, FeatureSpec("every", ends=(4,)), tmp_path / "every")
    batch = make_batch(windows, np.array([3, 8]), CPU, "every")
    places = batch.lengths.cumsum(dim=0) - 1
    found, direct = last.at(last_only(batch)).states, every.at(batch).states
    assert found is not None
    assert direct is not None
    torch.testing.assert_close(found[0], direct[0, places], rtol=1e-3, atol=1e-5)
    assert (tmp_path / "last/states.npy").stat().st_size < (
        tmp_path / "every/states.npy"
    ).stat().st_size


def test_states_behind_a_suffix(
    make_recommender: Maker, windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender(suffix=(5, 2)).eval()
    stored = cached(teacher, windows, FeatureSpec("last", ends=(4,)), tmp_path / "f")
    said = stored.at(make_batch(windows, np.arange(6), CPU, "last")).states
    assert said is not None
    for user in range(6):
        alone = make_batch(windows, np.array([user]), CPU, "last")
        with torch.no_grad(), tap_blocks(teacher.backbone) as tap:
            teacher(alone.inputs, alone.lengths)
        # alone nothing is padded: the suffix ends the sequence
        torch.testing.assert_close(said[0, user], tap.states[4][0, -1], rtol=1e-3, atol=1e-5)


def test_states_too_large_for_float16_are_kept_in_bfloat16(
    make_recommender: Maker, windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender().eval()
    with torch.no_grad():
        teacher.input_adapter.weight.mul_(1e8)
    wanted = FeatureSpec("every", ends=(4,))
    stored = cached(teacher, windows, wanted, tmp_path / "f")
    batch = make_batch(windows, np.arange(4), CPU, "every")
    said, direct = stored.at(batch).states, OnlineTeacher(teacher, wanted).at(batch).states
    assert said is not None
    assert direct is not None
    assert said.abs().max() > 65504
    torch.testing.assert_close(said, direct, rtol=1e-2, atol=1)


def test_states_that_are_no_numbers_are_an_error(
    make_recommender: Maker, windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender().eval()
    with torch.no_grad():
        teacher.input_adapter.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="infinite or NaN"):
        cached(teacher, windows, FeatureSpec("every", ends=(4,)), tmp_path / "f")


def test_features_that_are_not_there_are_refused(
    make_recommender: Maker, windows: list[np.ndarray], tmp_path: Path
) -> None:
    wanted = FeatureSpec("every", ends=(2,))
    cached(make_recommender().eval(), windows, wanted, tmp_path / "f")
    for other in (
        replace(wanted, ends=(2, 3)),
        replace(wanted, vectors=True),
        replace(wanted, top=1),
        replace(wanted, objective="last"),
    ):
        with pytest.raises(ValueError, match="does not hold"):
            CachedTeacher(tmp_path / "f", windows, other)
