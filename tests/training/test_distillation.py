"""Distillation: groups, the teacher computed once, the loss, and who is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.tap import tap_blocks
from depthprobe.study import Distillation, Recipe
from depthprobe.training.distillation import (
    Distiller,
    TeacherStates,
    group_ends,
    teacher_states,
)
from depthprobe.training.losses import catalogue_cross_entropy, cosine_loss, norm_loss
from depthprobe.training.objectives import Batch, NextItem, make_batch

CPU = torch.device("cpu")
OBJECTIVES = ("every", "last")


@given(st.integers(1, 40), st.integers(1, 40))
def test_groups_cover_the_model_evenly(depth: int, groups: int) -> None:
    if groups > depth:
        with pytest.raises(ValueError, match="groups"):
            group_ends(depth, groups)
        return
    ends = (0, *group_ends(depth, groups))
    sizes = np.diff(ends)
    assert ends[-1] == depth
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


def asked_at(batch: Batch, state: torch.Tensor, objective: str) -> torch.Tensor:
    """A block's output where the next item is asked, without prompt or suffix: (N, D)."""
    rows = zip(state, batch.lengths.tolist(), strict=True)
    if objective == "last":
        return torch.stack([row[length - 1] for row, length in rows])
    return torch.cat([row[:length] for row, length in rows])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cached_states_are_the_teachers(
    objective: str,
    make_recommender: Callable[..., Recommender],
    windows: list[np.ndarray],
    tmp_path: Path,
) -> None:
    teacher = make_recommender().eval()
    stored = teacher_states(
        teacher,
        windows,
        ends=(2, 3, 4),
        objective=objective,  # type: ignore[arg-type]
        path=tmp_path / "states.npy",
        device=CPU,
        batch_size=7,
    )
    batch = make_batch(windows, np.array([4, 0, 9]), CPU, objective)  # type: ignore[arg-type]
    with torch.no_grad(), tap_blocks(teacher.backbone) as tap:
        teacher(batch.inputs)
    for group, end in enumerate((2, 4)):
        direct = asked_at(batch, tap.states[end], objective)
        cached = stored.at(batch, (2, 4))[group]
        torch.testing.assert_close(cached, direct, rtol=1e-3, atol=1e-5)  # float16's rounding


def test_states_behind_a_suffix(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender(suffix=(5, 2)).eval()
    path = tmp_path / "states.npy"
    stored = teacher_states(teacher, windows, ends=(4,), objective="last", path=path, device=CPU)
    batch = make_batch(windows, np.arange(6), CPU, "last")
    for user in range(6):
        alone = make_batch(windows, np.array([user]), CPU, "last")
        with torch.no_grad(), tap_blocks(teacher.backbone) as tap:
            teacher(alone.inputs, alone.lengths)
        # alone nothing is padded: the suffix ends the sequence
        torch.testing.assert_close(
            stored.at(batch, (4,))[0, user], tap.states[4][0, -1], rtol=1e-3, atol=1e-5
        )


def test_states_that_overflow_float16_are_an_error(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender().eval()
    with torch.no_grad():
        teacher.input_adapter.weight.mul_(1e8)
    with pytest.raises(ValueError, match="float16"):
        teacher_states(
            teacher,
            windows,
            ends=(4,),
            objective="every",
            path=tmp_path / "s.npy",
            device=CPU,
        )


def some_states(batch: Batch, groups: int) -> TeacherStates:
    """Random states of a teacher of four blocks, for windows 0, 1, ... of the batch."""
    states = torch.randn(batch.count, groups, 16).numpy()
    return TeacherStates(states, batch.mask.sum(dim=1).numpy(), group_ends(4, groups))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_the_sum_of_its_parts(
    objective: str, make_recommender: Callable[..., Recommender], windows: list[np.ndarray]
) -> None:
    student, recipe = make_recommender(blocks=2), Recipe(objective=objective)  # type: ignore[arg-type]
    weights = Distillation(groups=2, cosine=0.7, norm=0.3, supervision=0.2)
    batch = make_batch(windows, np.arange(5), CPU, recipe.objective)
    stored = some_states(batch, 2)
    whole = Distiller(student, weights, recipe, stored)
    teacher = torch.from_numpy(stored.states).transpose(0, 1)
    with torch.no_grad(), tap_blocks(student.backbone) as tap:
        student(batch.inputs)
        states = torch.stack([asked_at(batch, tap.states[end], objective) for end in (1, 2)])
        guess = whole.adapters[0](states_at(tap.states[1], batch.lengths - 1))
        last = torch.tensor([int(windows[i][-1]) for i in range(5)])
        expected = (
            NextItem(student, recipe)(batch)
            + 0.7 * cosine_loss(states, teacher)
            + 0.3 * norm_loss(states, teacher)
            + 0.2 * catalogue_cross_entropy(guess, student.item_matrix(), last)
        )
    torch.testing.assert_close(whole(batch).detach(), expected)


def test_gradients_reach_the_student_and_its_adapters_alone(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray]
) -> None:
    student = make_recommender(blocks=2)
    batch = make_batch(windows, np.arange(5), CPU, "every")
    whole = Distiller(student, Distillation(groups=2), Recipe(), some_states(batch, 2))
    whole(batch).backward()
    assert student.items.weight.grad is None
    assert all(p.grad is not None for p in whole.adapters.parameters())
    assert all(p.grad is not None for p in student.backbone.layers.parameters())


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher, twin = make_recommender().eval(), make_recommender().eval()
    keep_blocks(twin.backbone, range(4))
    ends, path = group_ends(4, 4), tmp_path / "s.npy"
    stored = teacher_states(teacher, windows, ends=ends, objective="every", path=path, device=CPU)
    batch = make_batch(windows, np.arange(8), CPU, "every")
    weights = Distillation(groups=4, cosine=1.0, norm=1.0, supervision=0.0)
    loss = Distiller(twin, weights, Recipe(), stored)(batch)
    torch.testing.assert_close(loss, NextItem(twin, Recipe())(batch), rtol=0, atol=2e-2)
