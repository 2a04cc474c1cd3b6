"""What a student is pulled by, against direct computations."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from depthprobe.training import distillation as following
from depthprobe.training.distillation import catalogue_kl, state_loss, top_kl


def test_state_losses_by_hand() -> None:
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


def naive_state_loss(
    student: Tensor, teacher: Tensor, cosine: float, norm: float, form: str
) -> Tensor:
    """By torch's own functions and its graph."""
    gap = student - teacher
    distance = torch.linalg.vector_norm(gap, dim=-1)
    if form == "squared":
        distance = gap.square().mean(dim=-1)
    turned = 1 - cosine_similarity(student, teacher, dim=-1)
    return (cosine * turned + norm * distance).mean(dim=-1).sum()


@given(
    groups=st.integers(1, 3),
    positions=st.integers(1, 6),
    weights=st.tuples(st.sampled_from([0.0, 0.7]), st.sampled_from([0.0, 0.3])),
    form=st.sampled_from(["distance", "squared"]),
)
def test_state_losses_and_their_gradients(
    groups: int, positions: int, weights: tuple[float, float], form: Literal["distance", "squared"]
) -> None:
    torch.manual_seed(groups + 7 * positions)
    student, teacher = torch.randn(2, groups, positions, 5, dtype=torch.float64)
    student.requires_grad_()
    cosine, norm = weights
    ours = state_loss(student, teacher, cosine=cosine, norm=norm, form=form)
    check_same(ours, naive_state_loss(student, teacher, cosine, norm, form), student)


def test_states_that_are_the_teachers_or_zero_have_finite_gradients() -> None:
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]], requires_grad=True)
    state_loss(student, torch.tensor([[[1.0, 2.0], [1.0, 0.0]]]), cosine=1, norm=1).backward()
    assert torch.isfinite(student.grad).all()
    torch.testing.assert_close(student.grad[0, 0], torch.zeros(2))


def naive_kl(own: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """From scores (N, n), by torch's own."""
    logs, goal = (log_softmax(each / temperature, dim=1) for each in (own, wanted))
    return temperature**2 * kl_div(logs, goal, reduction="batchmean", log_target=True)


def make(positions: int, n_items: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's vectors and items, teacher's vectors and items of another width."""
    torch.manual_seed(n_items)
    shapes = ((positions, 4), (n_items + 1, 4), (positions, 6), (n_items + 1, 6))
    vectors, items, goal, others = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    return vectors.requires_grad_(), items.requires_grad_(), goal, others


def check_same(ours: Tensor, naive: Tensor, *weights: Tensor) -> None:
    torch.testing.assert_close(ours, naive)
    found = torch.autograd.grad(3 * ours, weights)
    expected = torch.autograd.grad(3 * naive, weights)
    torch.testing.assert_close(found, expected)


@given(
    positions=st.integers(1, 9),
    n_items=st.integers(2, 12),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    cells=st.sampled_from([1, 40, 10**6]),
)
def test_divergence_over_the_catalogue(
    positions: int, n_items: int, temperature: float, cells: int
) -> None:
    vectors, items, goal, others = make(positions, n_items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(following.CHUNK_BYTES, "cpu", cells * 8)
        ours = catalogue_kl(vectors, items, goal, others, temperature=temperature)
        naive = naive_kl(vectors @ items[1:].T, goal @ others[1:].T, temperature)
        check_same(ours, naive, vectors, items)


@given(
    positions=st.integers(1, 9),
    n_items=st.integers(3, 12),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    cells=st.sampled_from([1, 40, 10**6]),
)
def test_divergence_over_the_best_items(
    positions: int, n_items: int, temperature: float, cells: int
) -> None:
    vectors, items, goal, others = make(positions, n_items)
    best = (goal @ others[1:].T).topk(3, dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(following.CHUNK_BYTES, "cpu", cells * 8)
        top = best.indices + 1
        ours = top_kl(vectors, items, top, best.values, temperature=temperature)
        naive = naive_kl((vectors @ items.T).gather(1, top), best.values, temperature)
        check_same(ours, naive, vectors, items)


def test_nothing_to_learn_from_oneself() -> None:
    vectors, items, _, _ = make(5, 8)
    loss = catalogue_kl(vectors, items, vectors.detach(), items.detach(), temperature=2.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
