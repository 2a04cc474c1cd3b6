"""Means over positions whose gradients are made in the forward pass, with no graph in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, logsigmoid

from depthprobe.study import Recipe

# of logits at once: on a CPU what its cache holds, on a GPU what keeps it busy
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}
# vectors (N, d), items (I + 1, d), and zeros of their shapes to add the gradients of the summed
# loss to, None where none is wanted -> the loss of each position, (N,)
Fill = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class _MeanLoss(torch.autograd.Function):
    """A mean over positions whose gradients are made in the forward pass, with the loss.

    The backward pass only scales them, in place, and gives them away: a table's gradient is as
    large as the table, and there is one of it. A second backward pass over a retained graph makes
    them again. There is no second derivative.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, items: Tensor, fill: Fill) -> Tensor:
        """(N, d), (I + 1, d) -> scalar."""
        ctx.save_for_backward(vectors, items)
        ctx.fill, ctx.made = fill, _zeros(vectors, items, ctx.needs_input_grad)
        return fill(vectors, items, *ctx.made).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale the gradients that the forward pass made."""
        vectors, items = ctx.saved_tensors
        made, ctx.made = ctx.made, None
        if made is None:
            made = _zeros(vectors, items, ctx.needs_input_grad)
            ctx.fill(vectors, items, *made)
        scale = grad / len(vectors)
        d_vectors, d_items = (None if each is None else each.mul_(scale) for each in made)
        return (
            None if d_vectors is None else d_vectors.to(vectors.dtype),
            None if d_items is None else d_items.to(items.dtype),
            None,
        )


def mean_loss(vectors: Tensor, items: Tensor, fill: Fill) -> Tensor:
    """The mean of what ``fill`` computes, a scalar; differentiable in vectors and items.

    Args:
        vectors: user vectors, (N, d).
        items: item table, (I + 1, d).

    Raises:
        ValueError: without a single position, where a mean is undefined.
    """
    if not len(vectors):
        raise ValueError("no position to compute a loss on")
    with torch.autocast(vectors.device.type, enabled=False):  # each fill chooses its own dtypes
        if not torch.is_grad_enabled():
            return fill(vectors, items, None, None).mean()
        loss: Tensor = _MeanLoss.apply(vectors, items, fill)  # type: ignore[no-untyped-call]
    return loss


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _zeros(
    vectors: Tensor, items: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    dtype = exact_dtype(vectors.dtype)
    return (
        torch.zeros_like(vectors, dtype=dtype) if wanted[0] else None,
        torch.zeros_like(items, dtype=dtype) if wanted[1] else None,
    )


# The full cross-entropy over the catalogue, which never holds a (positions x items) matrix.
#
# Where a catalogue is too large for whole rows of logits, it goes over the items in tiles, twice:
# once for each position's normaliser, once for the gradients (as Cut Cross-Entropy does, arXiv
# 2411.09009).
#
# No fused kernel on a GPU: those in reach are made for states as wide as a language model's, and a
# table of a million items 64 wide is another shape. ``analyses/catalogue_loss`` says which and why.

# positions in a block: with fewer, going over all items and their gradient for each block costs
# more than computing a tile of logits twice; then the blocks are as high as MOST_ROWS
FEWEST_ROWS, MOST_ROWS = 128, 2048


def catalogue_cross_entropy(vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of targets against every item of the catalogue.

    Computed in the dtype of the vectors, or of autocast where that is on. In bfloat16 the three
    kinds of matrix products are; the softmax, the loss and the sums of gradients are in float32.

    Args:
        vectors: user vectors, (N, d).
        items: item table, (I + 1, d); row 0 is padding and never a candidate.
        targets: item ids, (N,), in 1..I.

    Raises:
        ValueError: without a single position, where a mean is undefined.
    """
    device = vectors.device.type
    dtype = vectors.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    return mean_loss(vectors, items, partial(_fill_full, targets=targets, dtype=dtype))


def _fill_full(
    vectors: Tensor,
    items: Tensor,
    d_vectors: Tensor | None,
    d_items: Tensor | None,
    *,
    targets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Cross-entropy over the whole catalogue, (N,), a block of positions after the other.

    Args:
        dtype: of the matrix products.
    """
    count, n_items = len(vectors), len(items) - 1
    exact = exact_dtype(dtype)
    cells = CHUNK_BYTES[vectors.device.type] // exact.itemsize
    whole = cells // n_items  # positions whose logits fit over the whole catalogue
    blocks = -(-count // (whole if whole >= FEWEST_ROWS else MOST_ROWS))
    rows = -(-count // blocks)
    columns = min(n_items, max(1, cells // rows))
    buffer = torch.empty(rows * columns, dtype=exact, device=vectors.device)
    losses = torch.empty(count, dtype=exact, device=vectors.device)
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        losses[block] = _fill_block(
            vectors[block].to(dtype),
            items,
            None if d_vectors is None else d_vectors[block],
            d_items,
            column=targets[block, None] - 1,
            tiles=[(low, min(low + columns, n_items)) for low in range(0, n_items, columns)],
            buffer=buffer,
        )
    return losses


def _fill_block(
    vectors: Tensor,
    items: Tensor,
    d_vectors: Tensor | None,
    d_items: Tensor | None,
    *,
    column: Tensor,
    tiles: list[tuple[int, int]],
    buffer: Tensor,
) -> Tensor:
    """Cross-entropy of a block of positions, (rows,), over the catalogue tile by tile.

    Args:
        column: the targets, (rows, 1), counted from 0.
        tiles: the catalogue in parts, first and end, counted from 0.
        buffer: room for the logits of a tile, in the dtype of the sums.
    """
    catalogue = items[1:]
    largest = buffer.new_full((len(vectors), 1), -torch.inf)
    weight, wanted = torch.zeros_like(largest), torch.zeros_like(largest)
    for low, high in tiles:
        share = _product(vectors, catalogue[low:high].to(vectors.dtype), buffer)  # (rows, width)
        place, inside = _within(column, low, high)
        wanted = torch.where(inside, share.gather(1, place), wanted)
        before, largest = largest, torch.maximum(largest, share.amax(dim=1, keepdim=True))
        # in place from here: the logits become the softmax, then the gradient
        share.sub_(largest).exp_()
        weight = weight * (before - largest).exp_() + share.sum(dim=1, keepdim=True)
    normaliser = largest + weight.log()
    if d_vectors is not None or d_items is not None:
        for low, high in reversed(tiles):
            part = catalogue[low:high].to(vectors.dtype)
            if high == tiles[-1][1]:  # still in the buffer; a small catalogue has no other tile
                share.div_(weight)
            else:
                share = _product(vectors, part, buffer).sub_(normaliser).exp_()
            place, inside = _within(column, low, high)
            # before any rounding: a target's share less one must not cancel in bfloat16
            error = share.scatter_add_(1, place, -inside.to(share.dtype)).to(vectors.dtype)
            if d_vectors is not None:
                _add_product(d_vectors, error, part)
            if d_items is not None:
                _add_product(d_items[1 + low : 1 + high], error.T, vectors)
    return (normaliser - wanted)[:, 0]


def _within(column: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Where in a tile each target is, and whether; without asking a GPU, which would wait."""
    return (column - low).clamp(0, high - low - 1), (column >= low) & (column < high)


def _product(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """(rows, d), (width, d) -> their products (rows, width), in the buffer."""
    out = buffer[: len(left) * len(right)].view(len(left), len(right))
    if left.dtype == buffer.dtype:
        return torch.mm(left, right.T, out=out)
    return out.copy_(left @ right.T)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


# Losses over the catalogue: the recipe's choice among the full one and two that sample.
#
# Sampled softmax and gBCE score some random items a position.

# which of the batch's positions -> the items that each is scored against, (rows, n)
Choose = Callable[[slice], Tensor]
# scores (rows, n) of some positions, and which -> losses (rows,), and their gradients by the scores
Judge = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def catalogue_loss(vectors: Tensor, items: Tensor, targets: Tensor, *, recipe: Recipe) -> Tensor:
    """The recipe's loss of the next item, a mean over positions; a scalar.

    Args:
        vectors: user vectors, (N, d).
        items: item table, (I + 1, d); row 0 is padding and never a candidate.
        targets: item ids, (N,), in 1..I.
        recipe: which loss, and how many negatives.

    Raises:
        ValueError: without a single position, where a mean is undefined.
    """
    if recipe.loss == "sampled-softmax":
        return sampled_softmax(vectors, items, targets, negatives=recipe.negatives)
    if recipe.loss == "gbce":
        return gbce(vectors, items, targets, negatives=recipe.negatives, t=recipe.gbce_t)
    return catalogue_cross_entropy(vectors, items, targets)


def sampled_softmax(vectors: Tensor, items: Tensor, targets: Tensor, *, negatives: int) -> Tensor:
    """Mean cross-entropy of targets against so many random other items each.

    The scores of the ``n`` negatives are raised by ``log((I - 1) / n)``, so that their sum of
    exponentials estimates the catalogue's without bias (Jean et al., arXiv 1412.2007). With
    ``I - 1`` negatives or more nothing is sampled: it is the full cross-entropy.

    Args:
        vectors: user vectors, (N, d).
        items: item table, (I + 1, d); row 0 is padding and never a candidate.
        targets: item ids, (N,), in 1..I.
        negatives: how many other items each position is compared with.

    Raises:
        ValueError: without a single position, where a mean is undefined.
    """
    others = len(items) - 2
    if negatives >= others:
        return catalogue_cross_entropy(vectors, items, targets)
    judge = partial(_judge_softmax, raised=math.log(others / negatives))
    return _sampled(vectors, items, targets, negatives=negatives, judge=judge)


def gbce(vectors: Tensor, items: Tensor, targets: Tensor, *, negatives: int, t: float) -> Tensor:
    """Mean generalised binary cross-entropy, gSASRec's (Petrov and Macdonald, RecSys 2023).

    ``-(log s(+)^beta + sum of log(1 - s(-))) / (n + 1)`` where ``s`` is the sigmoid of a score,
    ``beta = alpha (t (1 - 1 / alpha) + 1 / alpha)`` and ``alpha = n / (I - 1)``. At ``t = 0`` it is
    the plain binary cross-entropy, which sampling makes overconfident; at ``t = 1`` calibrated.

    Args:
        vectors: user vectors, (N, d).
        items: item table, (I + 1, d); row 0 is padding and never a candidate.
        targets: item ids, (N,), in 1..I.
        negatives: how many other items each position is compared with; at most all of them.
        t: calibration, in [0, 1].

    Raises:
        ValueError: without a single position, where a mean is undefined.
    """
    others = len(items) - 2
    negatives = min(negatives, others)
    alpha = negatives / others if others else 1.0
    judge = partial(_judge_gbce, beta=1 - t * (1 - alpha))  # the paper's, multiplied out
    return _sampled(vectors, items, targets, negatives=negatives, judge=judge)


def _sampled(
    vectors: Tensor, items: Tensor, targets: Tensor, *, negatives: int, judge: Judge
) -> Tensor:
    n_items = len(items) - 1
    pattern, shifts = _draw(n_items, negatives, positions=len(vectors), like=targets)

    def choose(block: slice) -> Tensor:
        target = targets[block]
        others = _negatives(pattern, shifts[block], target, n_items=n_items)
        return torch.cat([target[:, None], others], dim=1)  # (rows, 1 + n), the target first

    fill = partial(fill_chosen, count=1 + len(pattern), choose=choose, judge=judge)
    return mean_loss(vectors, items, fill)


def _draw(n_items: int, negatives: int, *, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Random numbers that decide every position's negatives: (n,) distinct ones, and (N,) shifts.

    Each position has negatives of its own, as in gSASRec and eSASRec: it shifts one random set
    around the catalogue. They are a uniform sample without repeats, and sums over them are
    uncorrelated between positions; samples drawn apart would take a shuffled catalogue a position.
    One sample for the whole batch is faster, but a few items then carry all of its noise
    (``analyses/catalogue_loss``).
    """
    others = n_items - 1
    pattern = torch.randperm(others, device=like.device)[:negatives]
    return pattern, torch.randint(max(1, others), (positions,), device=like.device)


def _negatives(pattern: Tensor, shifts: Tensor, targets: Tensor, *, n_items: int) -> Tensor:
    """Item ids of each position's negatives, (rows, n): never its target, none twice."""
    place = (pattern + shifts[:, None]) % max(1, n_items - 1)  # (rows, n) in 0..I-2
    return place + 1 + (place + 1 >= targets[:, None])


def fill_chosen(
    vectors: Tensor,
    items: Tensor,
    d_vectors: Tensor | None,
    d_items: Tensor | None,
    *,
    count: int,
    choose: Choose,
    judge: Judge,
) -> Tensor:
    """A loss over ``count`` chosen items a position, (N,), some positions at a time.

    In float32 even under autocast: the time goes into fetching the items, not into products.
    """
    exact = exact_dtype(vectors.dtype)
    size = count * items.shape[1] * exact.itemsize
    rows = max(1, CHUNK_BYTES[vectors.device.type] // size)
    losses = torch.empty(len(vectors), dtype=exact, device=vectors.device)
    for start in range(0, len(vectors), rows):
        block = slice(start, start + rows)
        part, ids = vectors[block].to(exact), choose(block)
        chosen = items[ids].to(exact)  # (rows, n, d)
        scores = torch.bmm(chosen, part[:, :, None])[:, :, 0]
        losses[block], error = judge(scores, block)
        if d_vectors is not None:
            d_vectors[block] = torch.bmm(error[:, None], chosen)[:, 0]
        if d_items is not None:
            spread = torch.mul(error[:, :, None], part[:, None], out=chosen)
            d_items.index_add_(0, ids.flatten(), spread.flatten(0, 1))
    return losses


def _judge_softmax(scores: Tensor, _: slice, *, raised: float) -> tuple[Tensor, Tensor]:
    scores[:, 1:] += raised
    logs = log_softmax(scores, dim=1)
    losses = -logs[:, 0]
    error = logs.exp()
    error[:, 0] -= 1
    return losses, error


def _judge_gbce(scores: Tensor, _: slice, *, beta: float) -> tuple[Tensor, Tensor]:
    size = scores.shape[1]
    target, others = scores[:, 0], scores[:, 1:]
    losses = -(beta * logsigmoid(target) + logsigmoid(-others).sum(dim=1)) / size
    error = torch.sigmoid(scores)
    error[:, 0] = -beta * torch.sigmoid(-target)
    return losses, error / size
