"""Distillation: groups, the loss, and who is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.taps import tap_blocks
from depthprobe.study import Distillation, Recipe
from depthprobe.training.distillation import Distiller, feature_spec, group_ends, state_loss
from depthprobe.training.features import (
    CachedTeacher,
    OnlineTeacher,
    TeacherOutputs,
    write_features,
)
from depthprobe.training.loop import Fit
from depthprobe.training.losses import catalogue_cross_entropy, catalogue_kl, top_kl
from depthprobe.training.objectives import Batch, NextItem, make_batch

CPU = torch.device("cpu")
OBJECTIVES = ("every", "last")
NOTHING = {"cosine": 0.0, "norm": 0.0, "supervision": 0.0}
Maker = Callable[..., Recommender]


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


# States


def test_state_loss_by_hand() -> None:
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 0.0]]])  # (2, 2, 2)
    student = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[3.0, 4.0], [-1.0, 0.0]]])
    # group 1: 1 - 0 and 1 - 1, mean .5; group 2: 1 - 1 and 1 + 1, mean 1
    assert state_loss(student, teacher, cosine=1, norm=0).item() == pytest.approx(1.5)
    # group 1: sqrt 2 and 1; group 2: 0 and 2
    distance = (math.sqrt(2) + 1) / 2 + 1
    assert state_loss(student, teacher, cosine=0, norm=1).item() == pytest.approx(distance)
    # squares over the width of 2: group 1: 1 and .5; group 2: 0 and 2
    squared = state_loss(student, teacher, cosine=0, norm=1, form="squared").item()
    assert squared == pytest.approx(0.75 + 1)


@given(
    groups=st.integers(1, 3),
    positions=st.integers(1, 6),
    weights=st.tuples(st.sampled_from([0.0, 0.7]), st.sampled_from([0.0, 0.3])),
    form=st.sampled_from(["distance", "squared"]),
)
def test_state_loss_and_its_gradients(
    groups: int, positions: int, weights: tuple[float, float], form: Any
) -> None:
    torch.manual_seed(groups + 7 * positions)
    student, teacher = torch.randn(2, groups, positions, 5, dtype=torch.float64)
    student.requires_grad_()
    cosine, norm = weights
    gap = student - teacher
    squared = gap.square().mean(dim=-1)
    distance = squared if form == "squared" else torch.linalg.vector_norm(gap, dim=-1)
    turned = 1 - cosine_similarity(student, teacher, dim=-1)
    naive = (cosine * turned + norm * distance).mean(dim=-1).sum()
    ours = state_loss(student, teacher, cosine=cosine, norm=norm, form=form)
    torch.testing.assert_close(ours, naive)
    gradients = [torch.autograd.grad(3 * loss, student)[0] for loss in (ours, naive)]
    torch.testing.assert_close(*gradients)


def test_states_that_are_equal_or_zero_have_finite_gradients() -> None:
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]], requires_grad=True)
    state_loss(student, torch.tensor([[[1.0, 2.0], [1.0, 0.0]]]), cosine=1, norm=1).backward()
    assert torch.isfinite(student.grad).all()
    torch.testing.assert_close(student.grad[0, 0], torch.zeros(2))


# The student


class Fixed:
    """A teacher with the same outputs for every batch."""

    def __init__(self, outputs: TeacherOutputs) -> None:
        self.outputs = outputs

    def at(self, _: Batch) -> TeacherOutputs:
        return self.outputs


def rows_of(batch: Batch, state: torch.Tensor, last: bool) -> torch.Tensor:
    """A state (B, T, D) at each user's last position, or at all, (N, D)."""
    rows = zip(state, batch.lengths.tolist(), strict=True)
    if last:
        return torch.stack([row[length - 1] for row, length in rows])
    return torch.cat([row[:length] for row, length in rows])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("positions", ["asked", "last"])
@pytest.mark.parametrize("form", ["distance", "squared"])
def test_slmrecs_loss_is_the_sum_of_its_parts(
    objective: Any, positions: Any, form: Any, make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    student, recipe = make_recommender(blocks=2), Recipe(objective=objective)
    weights = Distillation(
        groups=2, ce=0.9, cosine=0.7, norm=0.3, supervision=0.2, norm_form=form, positions=positions
    )
    batch = make_batch(windows, np.arange(5), CPU, recipe.objective)
    last = "last" in (objective, positions)
    teacher = torch.randn(2, 5 if last else batch.count, 16)
    whole = Distiller(student, weights, recipe, Fixed(TeacherOutputs(states=teacher)))
    with torch.no_grad():
        with tap_blocks(student.backbone) as tap:
            student(batch.inputs)
        after = tap.states[1:]
        states = torch.stack([rows_of(batch, state, last) for state in after])
        guess = whole.adapters[0](states_at(after[0], batch.lengths - 1))
        targets = torch.tensor([int(windows[i][-1]) for i in range(5)])
        expected = (
            0.9 * NextItem(student, recipe)(batch)
            + state_loss(states, teacher, cosine=0.7, norm=0.3, form=form)
            + 0.2 * catalogue_cross_entropy(guess, student.item_matrix(), targets)
        )
    torch.testing.assert_close(whole(batch).detach(), expected)


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("positions", ["asked", "last"])
def test_scores_are_followed(
    top: int, positions: Any, make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    student, teacher = make_recommender(blocks=2), make_recommender(seed=1).eval()
    weights = Distillation(
        ce=0.5, logits=2.0, temperature=3.0, top=top, positions=positions, **NOTHING
    )
    spec = feature_spec(weights, Recipe(), depth=2, teacher_depth=4)
    assert not spec.ends
    batch, goal = make_batch(windows, np.arange(5), CPU, "every"), teacher.item_matrix()
    whole = Distiller(student, weights, Recipe(), OnlineTeacher(teacher, spec), goal_items=goal)
    last = positions == "last"
    with torch.no_grad():
        own, theirs = (rows_of(batch, m(batch.inputs), last) for m in (student, teacher))
        items = student.item_matrix()
        if top:
            best = (theirs @ goal[1:].T).topk(top, dim=1)
            pull = top_kl(own, items, best.indices + 1, best.values, temperature=3)
        else:
            pull = catalogue_kl(own, items, theirs, goal, temperature=3)
        expected = 0.5 * NextItem(student, Recipe())(batch) + 2 * pull
    torch.testing.assert_close(whole(batch).detach(), expected)


def test_gradients_reach_the_student_and_its_adapters_alone(
    make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    student, teacher = make_recommender(blocks=2), make_recommender().eval()
    weights = Distillation(groups=2, logits=1.0)
    spec = feature_spec(weights, Recipe(), depth=2, teacher_depth=4)
    online = OnlineTeacher(teacher, spec)
    whole = Distiller(student, weights, Recipe(), online, goal_items=teacher.item_matrix())
    whole(make_batch(windows, np.arange(5), CPU, "every")).backward()
    assert student.items.weight.grad is None
    assert all(p.grad is not None for p in whole.adapters.parameters())
    assert all(p.grad is not None for p in student.backbone.layers.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(name.startswith("teacher") for name, _ in whole.named_parameters())


@pytest.fixture
def trained(train: Callable[..., Fit]) -> Callable[..., None]:
    """``trained(objective, **recipe)``"""

    def run(objective: torch.nn.Module, **changes: Any) -> Fit:
        recipe = Recipe(epochs=2, batch_size=8, learning_rate=0.01, **changes)
        return train(objective, recipe, count())

    return run


def test_a_cached_teacher_makes_the_same_student_to_the_bit(
    make_recommender: Maker,
    windows: list[np.ndarray],
    tmp_path: Path,
    trained: Callable[..., Fit],
    assert_same: Callable[..., None],
) -> None:
    teacher = make_recommender().double().eval()
    weights = Distillation(groups=2, logits=1.0)
    spec = feature_spec(weights, Recipe(), depth=2, teacher_depth=4)
    write_features(teacher, windows, spec, folder=tmp_path, device=CPU)
    students, losses = [], []
    for source, compiled in (
        (CachedTeacher(tmp_path, windows, spec), False),
        (OnlineTeacher(teacher, spec), False),
        (OnlineTeacher(teacher, spec), True),  # a tapped student runs uncompiled
    ):
        student, goal = make_recommender(blocks=2, seed=5), teacher.item_matrix().float()
        torch.manual_seed(0)
        distiller = Distiller(student, weights, Recipe(), source, goal_items=goal)
        losses.append(trained(distiller, compile=compiled).losses)
        students.append(student)
    assert_same(students[0], students[1])
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_without_a_loss_of_its_own_a_student_is_the_fine_tuned_variant(
    make_recommender: Maker, trained: Callable[..., Fit], assert_same: Callable[..., None]
) -> None:
    plain, student = make_recommender(blocks=2), make_recommender(blocks=2)
    trained(NextItem(plain, Recipe()))
    trained(Distiller(student, Distillation(**NOTHING), Recipe(), None))
    assert_same(plain, student)
