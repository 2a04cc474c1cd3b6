"""Distillation: groups, the loss, and who is trained."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.taps import tap_blocks
from depthprobe.study import Distillation, Recipe
from depthprobe.training.distillation import (
    Distiller,
    catalogue_kl,
    feature_spec,
    group_ends,
    state_loss,
    top_kl,
)
from depthprobe.training.features import (
    CachedTeacher,
    OnlineTeacher,
    TeacherOutputs,
    write_features,
)
from depthprobe.training.loop import fit
from depthprobe.training.losses import catalogue_cross_entropy
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


class Fixed:
    """A teacher that says what it was given, whatever it is asked."""

    def __init__(self, said: TeacherOutputs) -> None:
        self.said = said

    def at(self, _: Batch) -> TeacherOutputs:
        return self.said


def parts_of(student: Recommender, batch: Batch, ends: tuple[int, ...]) -> list[torch.Tensor]:
    """The student's states after some blocks, whole: (B, T, D)."""
    with tap_blocks(student.backbone) as tap:
        student(batch.inputs)
    return [tap.states[end] for end in ends]


def rows_of(batch: Batch, state: torch.Tensor, last: bool) -> torch.Tensor:
    """A state where students are compared: each user's last position, or all, (N, D)."""
    rows = zip(state, batch.lengths.tolist(), strict=True)
    if last:
        return torch.stack([row[length - 1] for row, length in rows])
    return torch.cat([row[:length] for row, length in rows])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("positions", ["asked", "last"])
@pytest.mark.parametrize("form", ["distance", "squared"])
def test_slmrecs_loss_is_the_sum_of_its_parts(
    objective: str, positions: str, form: str, make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    student, recipe = make_recommender(blocks=2), Recipe(objective=objective)  # type: ignore[arg-type]
    weights = Distillation(
        groups=2, ce=0.9, cosine=0.7, norm=0.3, supervision=0.2, norm_form=form, positions=positions
    )  # type: ignore[arg-type]
    batch = make_batch(windows, np.arange(5), CPU, recipe.objective)
    last = "last" in (objective, positions)
    teacher = torch.randn(2, 5 if last else batch.count, 16)
    whole = Distiller(student, weights, recipe, Fixed(TeacherOutputs(states=teacher)))
    with torch.no_grad():
        after = parts_of(student, batch, (1, 2))
        states = torch.stack([rows_of(batch, state, last) for state in after])
        guess = whole.adapters[0](states_at(after[0], batch.lengths - 1))
        targets = torch.tensor([int(windows[i][-1]) for i in range(5)])
        expected = (
            0.9 * NextItem(student, recipe)(batch)
            + state_loss(states, teacher, cosine=0.7, norm=0.3, form=form)  # type: ignore[arg-type]
            + 0.2 * catalogue_cross_entropy(guess, student.item_matrix(), targets)
        )
    torch.testing.assert_close(whole(batch).detach(), expected)


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("positions", ["asked", "last"])
def test_scores_are_followed(
    top: int, positions: str, make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    student, teacher = make_recommender(blocks=2), make_recommender(seed=1).eval()
    weights = Distillation(
        ce=0.5, logits=2.0, temperature=3.0, top=top, positions=positions, **NOTHING
    )  # type: ignore[arg-type]
    wanted = feature_spec(weights, Recipe(), depth=2, teacher_depth=4)
    assert not wanted.ends
    batch, goal = make_batch(windows, np.arange(5), CPU, "every"), teacher.item_matrix()
    whole = Distiller(student, weights, Recipe(), OnlineTeacher(teacher, wanted), goal_items=goal)
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
    wanted = feature_spec(weights, Recipe(), depth=2, teacher_depth=4)
    online = OnlineTeacher(teacher, wanted)
    whole = Distiller(student, weights, Recipe(), online, goal_items=teacher.item_matrix())
    whole(make_batch(windows, np.arange(5), CPU, "every")).backward()
    assert student.items.weight.grad is None
    assert all(p.grad is not None for p in whole.adapters.parameters())
    assert all(p.grad is not None for p in student.backbone.layers.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(name.startswith("teacher") for name, _ in whole.named_parameters())


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(
    make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    teacher, twin = make_recommender().eval(), make_recommender().eval()
    batch = make_batch(windows, np.arange(8), CPU, "every")
    weights = Distillation(groups=4, cosine=1.0, norm=1.0, supervision=0.0, logits=1.0)
    wanted = feature_spec(weights, Recipe(), depth=4, teacher_depth=4)
    online = OnlineTeacher(teacher, wanted)
    distiller = Distiller(twin, weights, Recipe(), online, goal_items=teacher.item_matrix())
    torch.testing.assert_close(distiller(batch), NextItem(twin, Recipe())(batch), rtol=0, atol=2e-2)


def trained(model: Recommender, objective: torch.nn.Module, windows: list[np.ndarray]) -> list:
    recipe = Recipe(epochs=2, batch_size=8, learning_rate=0.01, patience=2)
    fit(objective, windows, recipe=recipe, validate=count().__next__, seed=3, device=CPU)
    return [p.detach().clone() for p in model.parameters()]


def test_a_cached_teacher_makes_the_same_student_to_the_bit(
    make_recommender: Maker, windows: list[np.ndarray], tmp_path: Path
) -> None:
    teacher = make_recommender().double().eval()
    weights = Distillation(groups=2, logits=1.0)
    wanted = feature_spec(weights, Recipe(), depth=2, teacher_depth=4)
    write_features(teacher, windows, wanted, folder=tmp_path, device=CPU)
    students = []
    for source in (CachedTeacher(tmp_path, windows, wanted), OnlineTeacher(teacher, wanted)):
        student, goal = make_recommender(blocks=2, seed=5), teacher.item_matrix().float()
        torch.manual_seed(0)
        distiller = Distiller(student, weights, Recipe(), source, goal_items=goal)
        students.append(trained(student, distiller, windows))
    for one, other in zip(*students, strict=True):
        assert torch.equal(one, other)


def test_without_a_loss_of_its_own_a_student_is_the_fine_tuned_variant(
    make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    plain, student = make_recommender(blocks=2), make_recommender(blocks=2)
    distiller = Distiller(student, Distillation(**NOTHING), Recipe(), None)
    one = trained(plain, NextItem(plain, Recipe()), windows)
    other = trained(student, distiller, windows)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
