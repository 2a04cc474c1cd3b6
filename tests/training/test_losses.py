"""Each loss against a direct computation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid, softplus

from depthprobe.study import Recipe
from depthprobe.training import losses
from depthprobe.training.losses import (
    catalogue_cross_entropy,
    catalogue_kl,
    catalogue_loss,
    gbce,
    sampled_softmax,
    shared_softmax,
    top_kl,
)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SAMPLED: dict[str, Loss] = {
    "sampled-softmax": partial(sampled_softmax, negatives=3),
    "gbce": partial(gbce, negatives=3, t=0.75),
}
ALL: dict[str, Loss] = {"full": catalogue_cross_entropy, **SAMPLED}
every_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
every_sampled_loss = pytest.mark.parametrize("loss", SAMPLED.values(), ids=SAMPLED)


def naive(vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(vectors @ items[1:].T, targets - 1)


def naive_sampled_softmax(scores: Tensor, *, others: int) -> Tensor:
    """Scores (N, 1 + n), the target's first; each negative stands for others / n items."""
    total = scores[:, 0].exp() + others / (scores.shape[1] - 1) * scores[:, 1:].exp().sum(dim=1)
    return (total.log() - scores[:, 0]).mean()


def naive_gbce(scores: Tensor, *, others: int, t: float) -> Tensor:
    """The formula of the paper, on scores (N, 1 + n), the target's first."""
    alpha = (scores.shape[1] - 1) / others
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    share = scores.sigmoid()
    losses = (share[:, 0] ** beta).log() + (1 - share[:, 1:]).log().sum(dim=1)
    return -(losses / scores.shape[1]).mean()


def make(
    positions: int, n_items: int, seed: int = 0, width: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, item table and targets, in float64; the first two ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    vectors, items = (
        torch.randn(n, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (positions, n_items + 1)
    )
    return vectors, items, torch.randint(1, n_items + 1, (positions,), generator=generator)


@contextmanager
def small_chunks(cells: int, fewest: int = 1, most: int = 1) -> Iterator[None]:
    """So many scores at once, in float64; chunks of positions of the given heights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.CHUNK_BYTES, "cpu", cells * 8)
        patch.setattr(losses, "FEWEST_ROWS", fewest)
        patch.setattr(losses, "MOST_ROWS", most)
        yield


def check_same(ours: Tensor, theirs: Tensor, vectors: Tensor, items: Tensor) -> None:
    """Value and gradients; the factor stands for what a loss is multiplied by before backward."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    left, right = (
        torch.autograd.grad(3 * loss, [vectors, items], retain_graph=True)
        for loss in (ours, theirs)
    )
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(
    positions=st.integers(1, 9),
    n_items=st.integers(1, 9),
    cells=st.integers(1, 60),
    fewest=st.integers(1, 4),
    most=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_equal_the_full_matrix(
    positions: int, n_items: int, cells: int, fewest: int, most: int, seed: int
) -> None:
    vectors, items, targets = make(positions, n_items, seed)
    with small_chunks(cells, fewest, most):
        ours = catalogue_cross_entropy(vectors, items, targets)
    check_same(ours, naive(vectors, items, targets), vectors, items)


@given(
    positions=st.integers(1, 9),
    n_items=st.integers(3, 12),
    share=st.floats(0, 1),
    t=st.floats(0, 1),
    cells=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_sampled_losses_equal_the_formula_on_the_same_negatives(
    positions: int, n_items: int, share: float, t: float, cells: int, seed: int
) -> None:
    vectors, items, targets = make(positions, n_items, seed)
    others = n_items - 1
    negatives = 1 + round(share * (others - 1))
    torch.manual_seed(seed)
    pattern, shifts = losses._draw(n_items, negatives, positions=positions, like=targets)
    drawn = losses._negatives(pattern, shifts, targets, n_items=n_items)
    scores = torch.einsum("nd,nkd->nk", vectors, items[torch.cat([targets[:, None], drawn], 1)])
    with small_chunks(cells):
        torch.manual_seed(seed)
        ours = sampled_softmax(vectors, items, targets, negatives=negatives)
        torch.manual_seed(seed)
        binary = gbce(vectors, items, targets, negatives=negatives, t=t)
    check_same(ours, naive_sampled_softmax(scores, others=others), vectors, items)
    check_same(binary, naive_gbce(scores, others=others, t=t), vectors, items)


@given(n_items=st.integers(2, 12), negatives=st.integers(1, 20), seed=st.integers(0, 99))
def test_negatives_are_distinct_and_never_the_target(
    n_items: int, negatives: int, seed: int
) -> None:
    torch.manual_seed(seed)
    targets = torch.randint(1, n_items + 1, (5,))
    pattern, shifts = losses._draw(n_items, negatives, positions=5, like=targets)
    drawn = losses._negatives(pattern, shifts, targets, n_items=n_items)
    assert drawn.shape == (5, min(negatives, n_items - 1))
    for row, target in zip(drawn.tolist(), targets.tolist(), strict=True):
        assert len(set(row)) == len(row)
        assert set(row) <= set(range(1, n_items + 1)) - {target}


@pytest.mark.parametrize("target", [1, 4, 7])
def test_every_other_item_is_drawn_equally_often(target: int) -> None:
    shifts, targets = torch.arange(6), torch.full((6,), target)  # each shift of 7 items once
    drawn = losses._negatives(torch.tensor([0, 1, 4]), shifts, targets, n_items=7)
    counts = torch.bincount(drawn.flatten(), minlength=8)
    assert counts.tolist() == [0 if item in {0, target} else 3 for item in range(8)]


@pytest.mark.parametrize("negatives", [6, 1000])
def test_with_all_items_drawn_nothing_is_sampled(negatives: int) -> None:
    vectors, items, targets = make(5, 7)
    ours = sampled_softmax(vectors, items, targets, negatives=negatives)
    check_same(ours, naive(vectors, items, targets), vectors, items)
    scores = vectors @ items[1:].T
    target = scores.gather(1, targets[:, None] - 1)
    # without sampling there is nothing to calibrate: plain binary cross-entropy, whatever t
    whole = (softplus(scores).sum(dim=1, keepdim=True) - target).mean() / 7
    for t in (0.0, 0.75):
        binary = gbce(vectors, items, targets, negatives=negatives, t=t)
        check_same(binary, whole, vectors, items)


def test_gbce_by_hand() -> None:
    # the target's sigmoid is 3/4, every negative's 1/2, so which are drawn does not matter
    items = torch.tensor([[9.0], [0.0], [math.log(3)], [0.0], [0.0], [0.0]])
    loss = gbce(torch.ones(1, 1), items, torch.tensor([2]), negatives=2, t=0.75)
    # alpha = 2/4, beta = 1/2 (3/4 (1 - 2) + 2) = 5/8
    by_hand = -(5 / 8 * math.log(3 / 4) + 2 * math.log(1 / 2)) / 3
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


@every_sampled_loss
def test_the_seed_decides_the_negatives(loss: Loss) -> None:
    vectors, items, targets = make(4, 40)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(loss(vectors, items, targets).item())
    assert values[0] == values[1] != values[2]


def test_there_is_no_second_derivative() -> None:
    vectors, items, targets = make(2, 3)
    loss = catalogue_cross_entropy(vectors, items, targets)
    (grad,) = torch.autograd.grad(loss**2, vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_loss
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(loss: Loss, frozen: int) -> None:
    vectors, items, targets = make(3, 6)
    tensors = [vectors, items]
    tensors[frozen].requires_grad_(False)
    loss(vectors, items, targets).backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None


@every_loss
def test_no_gradient_is_made_where_none_is_kept(
    loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, items, targets = make(3, 6)
    torch.manual_seed(0)
    value = loss(vectors, items, targets)
    monkeypatch.delattr(losses, "_MeanLoss")  # what makes gradients
    torch.manual_seed(0)
    with torch.no_grad():
        assert loss(vectors, items, targets) == value


@every_loss
def test_padding_is_no_candidate(loss: Loss) -> None:
    vectors, items, targets = make(3, 6)
    torch.manual_seed(0)
    value = loss(vectors, items, targets)
    value.backward()
    assert not items.grad[0].any()
    with torch.no_grad():
        items[0] = 100
    torch.manual_seed(0)
    assert loss(vectors, items, targets) == value


@every_loss
def test_a_catalogue_of_one_item(loss: Loss) -> None:
    vectors, items, targets = make(2, 1)
    score = (vectors @ items[1:].T).detach()
    value = loss(vectors, items, targets)
    value.backward()
    # nothing else to recommend: certain for a softmax; a binary loss still asks if it is liked
    binary = loss is ALL["gbce"]
    expected = -logsigmoid(score).mean() if binary else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(value.detach(), expected)
    assert torch.isfinite(items.grad).all()
    assert vectors.grad.any() == binary


@every_loss
def test_no_position_is_an_error(loss: Loss) -> None:
    with pytest.raises(ValueError, match="no position"):
        loss(torch.zeros(0, 2), torch.zeros(6, 2), torch.zeros(0).long())


@every_loss
def test_a_vector_that_diverged_shows_in_the_loss(loss: Loss) -> None:
    vectors, items, targets = make(3, 6)
    with torch.no_grad():
        vectors[1, 0] = torch.inf
    assert not torch.isfinite(loss(vectors, items, targets))


def test_a_recipe_chooses_the_loss() -> None:
    vectors, items, targets = make(5, 9)
    for name, loss in {**ALL, "shared-softmax": partial(shared_softmax, negatives=3)}.items():
        recipe = Recipe(loss=name, negatives=3, gbce_t=0.75)
        torch.manual_seed(0)
        expected = loss(vectors, items, targets)
        torch.manual_seed(0)
        assert catalogue_loss(vectors, items, targets, recipe=recipe) == expected


# bfloat16 has 8 bits: products and errors are rounded by at most 1 part in 256
NEAR = 2**-8


@pytest.mark.parametrize("autocast", [True, False])
@given(seed=st.integers(0, 20), whole=st.booleans())
def test_bfloat16_is_near_the_exact_loss(autocast: bool, seed: int, whole: bool) -> None:
    vectors, items, targets = make(40, 300, seed, width=16)
    dtype = torch.float32 if autocast else torch.bfloat16
    low, table = (x.detach().to(dtype).requires_grad_() for x in (vectors, items))
    with (
        small_chunks(10**5 if whole else 1000, 1 if whole else 99, 16),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        ours = catalogue_cross_entropy(low, table, targets)
    ours.backward()
    theirs = naive(vectors, items, targets)
    theirs.backward()
    assert ours.dtype == torch.float32
    assert abs(ours.item() / theirs.item() - 1) < NEAR
    for a, b in ((low.grad, vectors.grad), (table.grad, items.grad)):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 4 * NEAR * b.norm()


def test_bfloat16_keeps_the_gradient_of_a_nearly_certain_position() -> None:
    # a share of 0.9995 is 1 in bfloat16, and 1 - 1 no gradient
    items = torch.tensor([[0.0], [7.625], [0.0]], requires_grad=True)
    vectors = torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        catalogue_cross_entropy(vectors, items, torch.tensor([1])).backward()
    wrong = 1 / (1 + math.exp(7.625))
    assert items.grad.flatten().tolist() == pytest.approx([0, -wrong, wrong], rel=NEAR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_loss
def test_autocast_changes_no_sampled_loss_and_nothing_in_float64(
    loss: Loss, dtype: torch.dtype
) -> None:
    vectors, items, targets = make(5, 20)
    values = []
    for on in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            values.append(loss(vectors.to(dtype), items.to(dtype), targets))
    assert values[0].dtype == values[1].dtype == dtype
    rounded = loss is ALL["full"] and dtype == torch.float32
    assert (values[0] == values[1]) != rounded


# A teacher's scores


def naive_kl(own: Tensor, teachers: Tensor, temperature: float) -> Tensor:
    """From scores (N, n), by torch's own functions."""
    logs, goal = (log_softmax(each / temperature, dim=1) for each in (own, teachers))
    return temperature**2 * kl_div(logs, goal, reduction="batchmean", log_target=True)


@given(
    positions=st.integers(1, 9),
    n_items=st.integers(3, 12),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    cells=st.sampled_from([1, 40, 10**6]),
)
def test_divergence_over_the_catalogue_and_over_the_best_items(
    positions: int, n_items: int, temperature: float, cells: int
) -> None:
    vectors, items, _ = make(positions, n_items, width=4)
    goal, others, _ = (x.detach() for x in make(positions, n_items, seed=1, width=6))
    scores, teachers = vectors @ items[1:].T, goal @ others[1:].T
    best = teachers.topk(3, dim=1)
    with small_chunks(cells):
        every = catalogue_kl(vectors, items, goal, others, temperature=temperature)
        top = top_kl(vectors, items, best.indices + 1, best.values, temperature=temperature)
    check_same(every, naive_kl(scores, teachers, temperature), vectors, items)
    listed = naive_kl(scores.gather(1, best.indices), best.values, temperature)
    check_same(top, listed, vectors, items)


def test_shared_softmax_is_a_softmax_over_the_target_and_what_was_drawn() -> None:
    torch.manual_seed(2)
    vectors = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 9, 4, 4, 7])
    torch.manual_seed(3)
    loss = shared_softmax(vectors, items, targets, negatives=6)
    torch.manual_seed(3)
    drawn = (torch.randperm(9)[:6] + 1).tolist()
    losses = []
    for vector, target in zip(vectors, targets.tolist(), strict=True):
        own = (vector @ items[target]).exp()
        others = sum((vector @ items[i]).exp() for i in drawn if i != target)
        losses.append(-(own / (own + 9 / 6 * others)).log())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(each, (vectors, items)) for each in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    # with room for all, nothing is drawn
    full = catalogue_cross_entropy(vectors, items, targets)
    torch.testing.assert_close(shared_softmax(vectors, items, targets, negatives=9), full)
