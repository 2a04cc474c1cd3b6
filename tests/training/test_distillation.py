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
from depthprobe.models.recommender import Recommender, last_positions
from depthprobe.models.tap import tap_blocks
from depthprobe.study import Distillation
from depthprobe.training.distillation import Distiller, group_ends, teacher_states
from depthprobe.training.loop import make_batch, next_item_loss
from depthprobe.training.losses import catalogue_cross_entropy, cosine_loss, norm_loss

CPU = torch.device("cpu")


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


def test_cached_states_are_the_teachers(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender().eval()
    path = tmp_path / "states.npy"
    stored = teacher_states(teacher, windows, ends=(2, 3, 4), path=path, device=CPU, batch_size=7)
    batch = make_batch(windows, np.array([4, 0, 9]), CPU)
    with torch.no_grad(), tap_blocks(teacher.backbone) as tap:
        teacher(batch.inputs)
    for group, end in enumerate((2, 4)):
        direct = tap.states[end][batch.mask]
        cached = stored.at(batch, (2, 4))[group]
        torch.testing.assert_close(cached, direct, rtol=1e-3, atol=1e-5)  # float16's rounding


def test_states_that_overflow_float16_are_an_error(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender().eval()
    with torch.no_grad():
        teacher.input_adapter.weight.mul_(1e8)
    with pytest.raises(ValueError, match="float16"):
        teacher_states(teacher, windows, ends=(4,), path=tmp_path / "s.npy", device=CPU)


def test_loss_is_the_sum_of_its_parts(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray]
) -> None:
    student = make_recommender(blocks=2)
    weights = Distillation(groups=2, cosine=0.7, norm=0.3, supervision=0.2)
    whole = Distiller(student, weights)
    batch = make_batch(windows, np.arange(5), CPU)
    teacher = torch.randn(2, int(batch.mask.sum()), 16)
    with torch.no_grad(), tap_blocks(student.backbone) as tap:
        student(batch.inputs)
        states = torch.stack([tap.states[1][batch.mask], tap.states[2][batch.mask]])
        lengths = batch.mask.sum(dim=1)
        guess = whole.adapters[0](last_positions(tap.states[1], lengths))
        last = torch.tensor([int(windows[i][-1]) for i in range(5)])
        expected = (
            next_item_loss(student, batch)
            + 0.7 * cosine_loss(states, teacher)
            + 0.3 * norm_loss(states, teacher)
            + 0.2 * catalogue_cross_entropy(guess, student.item_matrix(), last)
        )
    torch.testing.assert_close(whole(batch, teacher).detach(), expected)


def test_gradients_reach_the_student_and_its_adapters_alone(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray]
) -> None:
    student = make_recommender(blocks=2)
    whole = Distiller(student, Distillation(groups=2))
    batch = make_batch(windows, np.arange(5), CPU)
    teacher = torch.randn(2, int(batch.mask.sum()), 16)
    whole(batch, teacher).backward()
    assert teacher.grad is None
    assert student.items.weight.grad is None
    assert all(p.grad is not None for p in whole.adapters.parameters())
    assert all(p.grad is not None for p in student.backbone.layers.parameters())


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(
    make_recommender: Callable[..., Recommender], windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher, twin = make_recommender().eval(), make_recommender().eval()
    keep_blocks(twin.backbone, range(4))
    ends = group_ends(4, 4)
    stored = teacher_states(teacher, windows, ends=ends, path=tmp_path / "s.npy", device=CPU)
    batch = make_batch(windows, np.arange(8), CPU)
    weights = Distillation(groups=4, cosine=1.0, norm=1.0, supervision=0.0)
    loss = Distiller(twin, weights)(batch, stored.at(batch, ends))
    torch.testing.assert_close(loss, next_item_loss(twin, batch), rtol=0, atol=2e-2)
