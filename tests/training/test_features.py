"""The teacher's outputs: on disk as directly, for every kind of feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import tap_blocks
from depthprobe.training import features
from depthprobe.training.features import CachedTeacher, FeatureSpec, OnlineTeacher, write_features
from depthprobe.training.objectives import Batch, last_only, make_batch

CPU = torch.device("cpu")
Maker = Callable[..., Recommender]
Cache = Callable[..., CachedTeacher]
every_objective = pytest.mark.parametrize("objective", ["every", "last"])


@pytest.fixture
def cached(windows: list[np.ndarray], tmp_path: Path) -> Cache:
    """``cached(teacher, spec, name="f")``: written and opened."""

    def write(teacher: Recommender, spec: FeatureSpec, name: str = "f") -> CachedTeacher:
        (tmp_path / name).mkdir()
        write_features(teacher, windows, spec, folder=tmp_path / name, device=CPU, batch_size=7)
        return CachedTeacher(tmp_path / name, windows, spec)

    return write


def at_targets(batch: Batch, states: torch.Tensor) -> torch.Tensor:
    """States (B, T, D), without prompt or suffix, at the target positions: (N, D)."""
    rows = zip(states, batch.lengths.tolist(), strict=True)
    if batch.objective == "last":
        return torch.stack([row[length - 1] for row, length in rows])
    return torch.cat([row[:length] for row, length in rows])


@every_objective
def test_stored_outputs_are_the_teachers(
    objective: Any,
    make_recommender: Maker,
    cached: Cache,
    windows: list[np.ndarray],
    tmp_path: Path,
) -> None:
    teacher = make_recommender().eval()
    cached(teacher, FeatureSpec(objective=objective, ends=(2, 3, 4), vectors=True, top=5))
    # a student may need less than there is
    own = FeatureSpec(objective=objective, ends=(2, 4), vectors=True, top=3)
    batch = make_batch(windows, np.array([4, 0, 9]), CPU, objective)
    outputs = CachedTeacher(tmp_path / "f", windows, own).at(batch)
    with torch.no_grad(), tap_blocks(teacher.backbone) as tap:
        vectors = at_targets(batch, teacher(batch.inputs))
    states = torch.stack([at_targets(batch, tap.states[end]) for end in own.ends])
    best = (vectors @ teacher.item_matrix()[1:].T).topk(3, dim=1)
    torch.testing.assert_close(outputs.states, states, rtol=1e-3, atol=1e-5)  # float16's rounding
    torch.testing.assert_close(outputs.vectors, vectors)
    torch.testing.assert_close(outputs.top, (best.indices + 1).int())
    torch.testing.assert_close(outputs.scores, best.values)


@every_objective
@pytest.mark.parametrize("top", [0, 4, 99])  # 99 is more than there are
def test_cached_and_online_outputs_are_equal_to_the_bit(
    objective: Any, top: int, make_recommender: Maker, cached: Cache, windows: list[np.ndarray]
) -> None:
    """In float64: in float32 another batch moves a number by its last bit, here and there."""
    teacher = make_recommender().double().eval()
    spec = FeatureSpec(objective=objective, ends=(1, 4), vectors=True, top=top)
    on_disk, online = cached(teacher, spec), OnlineTeacher(teacher, spec)
    for chosen in ([0, 1, 2], [9, 5], [20]):
        batch = make_batch(windows, np.array(chosen), CPU, objective)
        one, other = on_disk.at(batch), online.at(batch)
        for name in ("states", "vectors", "top", "scores"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None and b is None) or torch.equal(a, b.to(a.dtype)), name


def test_only_the_last_positions_are_stored_where_they_are_enough(
    make_recommender: Maker, cached: Cache, windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender().eval()
    last = cached(teacher, FeatureSpec("last", ends=(4,)), "last")
    every = cached(teacher, FeatureSpec("every", ends=(4,)), "every")
    batch = make_batch(windows, np.array([3, 8]), CPU, "every")
    places = batch.lengths.cumsum(dim=0) - 1
    one, other = last.at(last_only(batch)).states, every.at(batch).states
    torch.testing.assert_close(one[0], other[0, places], rtol=1e-3, atol=1e-5)
    sizes = [(tmp_path / name / "states.npy").stat().st_size for name in ("last", "every")]
    assert sizes[0] < sizes[1]


def test_states_behind_a_suffix(
    make_recommender: Maker, cached: Cache, windows: list[np.ndarray]
) -> None:
    teacher = make_recommender(suffix=(5, 2)).eval()
    stored = cached(teacher, FeatureSpec("last", ends=(4,)))
    states = stored.at(make_batch(windows, np.arange(6), CPU, "last")).states
    for user in range(6):
        alone = make_batch(windows, np.array([user]), CPU, "last")
        with torch.no_grad(), tap_blocks(teacher.backbone) as tap:
            teacher(alone.inputs, alone.lengths)
        # alone nothing is padded: the suffix ends the sequence
        torch.testing.assert_close(states[0, user], tap.states[4][0, -1], rtol=1e-3, atol=1e-5)


def test_states_too_large_for_float16_are_stored_in_bfloat16(
    make_recommender: Maker, cached: Cache, windows: list[np.ndarray]
) -> None:
    teacher, spec = make_recommender().eval(), FeatureSpec("every", ends=(4,))
    with torch.no_grad():
        teacher.input_adapter.weight.mul_(1e8)
    batch = make_batch(windows, np.arange(4), CPU, "every")
    states = cached(teacher, spec).at(batch).states
    assert states.abs().max() > 65504
    direct = OnlineTeacher(teacher, spec).at(batch).states
    torch.testing.assert_close(states, direct, rtol=1e-2, atol=1)


def test_states_that_are_no_numbers_are_an_error(make_recommender: Maker, cached: Cache) -> None:
    teacher = make_recommender().eval()
    with torch.no_grad():
        teacher.input_adapter.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="infinite or NaN"):
        cached(teacher, FeatureSpec("every", ends=(4,)))


def test_a_batch_that_does_not_fit_into_memory_is_halved(
    make_recommender: Maker,
    cached: Cache,
    windows: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, spec, sizes = make_recommender().double().eval(), FeatureSpec("last", vectors=True), []
    run, batch = features._run, make_batch(windows, np.arange(30), CPU, "last")
    expected = cached(teacher, spec, "roomy").at(batch).vectors

    def tight(teacher: Recommender, batch: Batch, spec: FeatureSpec) -> dict[str, torch.Tensor]:
        sizes.append(len(batch.chosen))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        return run(teacher, batch, spec)

    monkeypatch.setattr(features, "_run", tight)
    assert torch.equal(cached(teacher, spec, "tight").at(batch).vectors, expected)
    assert set(sizes) == {7, 4, 2, 1}


def test_features_that_are_not_there_are_refused(
    make_recommender: Maker, cached: Cache, windows: list[np.ndarray], tmp_path: Path
) -> None:
    spec = FeatureSpec("every", ends=(2,))
    cached(make_recommender().eval(), spec)
    changes = ({"ends": (2, 3)}, {"vectors": True}, {"top": 1}, {"objective": "last"})
    for other in (replace(spec, **change) for change in changes):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="does not hold"):
            CachedTeacher(tmp_path / "f", windows, other)
