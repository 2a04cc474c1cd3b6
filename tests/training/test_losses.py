"""Each loss against a direct computation in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from depthprobe.training import losses
from depthprobe.training.losses import catalogue_cross_entropy, cosine_loss, norm_loss


def naive(vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(vectors @ items[1:].T, targets - 1)


@given(
    positions=st.integers(1, 9),
    items=st.integers(1, 7),
    rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_equal_the_full_matrix(
    positions: int, items: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(positions, 3), (items + 1, 3)]
    left = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    right = [t.clone() for t in left]
    for tensor in (*left, *right):
        tensor.requires_grad_(True)
    targets = torch.randint(1, items + 1, (positions,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.CHUNK_BYTES, "cpu", rows * items * 8)
        patch.setattr(losses, "FEWEST_ROWS", 1)
        ours = catalogue_cross_entropy(left[0], left[1], targets)
    theirs = naive(right[0], right[1], targets)
    (3 * ours).backward()
    (3 * theirs).backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_padding_is_no_candidate() -> None:
    items = torch.tensor([[100.0], [1.0], [1.0]])
    loss = catalogue_cross_entropy(torch.ones(1, 1), items, torch.tensor([2]))
    assert loss.item() == pytest.approx(math.log(2))


def test_frozen_items_get_no_gradient() -> None:
    vectors = torch.randn(2, 3, requires_grad=True)
    items = torch.randn(5, 3)
    catalogue_cross_entropy(vectors, items, torch.tensor([1, 4])).backward()
    assert items.grad is None
    assert vectors.grad is not None


def test_no_position_is_an_error() -> None:
    with pytest.raises(ValueError, match="no position"):
        catalogue_cross_entropy(torch.zeros(0, 2), torch.zeros(3, 2), torch.zeros(0).long())


def test_distillation_losses_by_hand() -> None:
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 0.0]]])  # (2, 2, 2)
    student = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[3.0, 4.0], [-1.0, 0.0]]])
    # group 1: 1 - 0 and 1 - 1, mean .5; group 2: 1 - 1 and 1 + 1, mean 1
    assert cosine_loss(student, teacher).item() == pytest.approx(1.5)
    # group 1: sqrt 2 and 1; group 2: 0 and 2
    assert norm_loss(student, teacher).item() == pytest.approx((math.sqrt(2) + 1) / 2 + 1)
