"""Losses over the item catalogue that compute their gradients in the forward pass.

Shapes, in every function:

    vectors  (N, d)      user vectors, one for each target position
    items    (I + 1, d)  the item table; row 0 is padding and never a candidate
    targets  (N,)        item ids in 1..I

A loss is a mean over the N positions, a scalar; without a single position it raises ``ValueError``.

The matrix of scores (N, I) never exists as a whole: with a million items it would be larger than
the model. A loss goes over chunks of positions (and of items), and adds each chunk's gradients for
vectors and items to their sums while it has the scores. Autograd then keeps no graph, and the
backward pass only scales the sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, embedding, log_softmax, logsigmoid

from depthprobe.study import Recipe

# bytes of scores at a time: they fit a CPU's cache, and keep a GPU busy
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}
# Positions in a chunk of the full cross-entropy. With fewer, going over all items and their
# gradient for each chunk costs more than computing its scores twice, in tiles of MOST_ROWS.
FEWEST_ROWS, MOST_ROWS = 128, 2048

Sum = Tensor | None  # where the gradients of the summed loss are added; None if none are needed
# (vectors, items, d_vectors, d_items) -> the loss of each position, (N,)
Fill = Callable[[Tensor, Tensor, Sum, Sum], Tensor]
# a chunk of positions -> the items that each of them is scored against, (rows, n)
Choose = Callable[[slice], Tensor]
# scores (rows, n) and their chunk -> losses (rows,) and their gradients by the scores (rows, n)
Judge = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class _MeanLoss(torch.autograd.Function):
    """A mean over positions, computed together with its gradients.

    The backward pass scales them in place and returns them without a copy, since a table's gradient
    is as large as the table. So only one backward pass is possible, and no second derivative.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, items: Tensor, fill: Fill) -> Tensor:
        """(N, d), (I + 1, d) -> scalar."""
        dtype = _sum_dtype(vectors.dtype)
        pairs = zip((vectors, items), ctx.needs_input_grad, strict=False)
        ctx.sums = [torch.zeros_like(x, dtype=dtype) if needed else None for x, needed in pairs]
        ctx.dtypes, ctx.count = (vectors.dtype, items.dtype), len(vectors)
        return fill(vectors, items, *ctx.sums).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Sum, Sum, None]:
        """Scale the gradients from the forward pass."""
        scale = grad / ctx.count
        d_vectors, d_items = (
            None if each is None else each.mul_(scale).to(dtype)
            for each, dtype in zip(ctx.sums, ctx.dtypes, strict=True)
        )
        del ctx.sums
        return d_vectors, d_items, None


def _mean_loss(vectors: Tensor, items: Tensor, fill: Fill) -> Tensor:
    """The mean of what ``fill`` computes; differentiable in vectors and items."""
    if not len(vectors):
        raise ValueError("no position to compute a loss on")
    with torch.autocast(vectors.device.type, enabled=False):  # each ``fill`` chooses its own dtypes
        if not torch.is_grad_enabled():
            return fill(vectors, items, None, None).mean()
        loss: Tensor = _MeanLoss.apply(vectors, items, fill)  # type: ignore[no-untyped-call, unused-ignore]
    return loss


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _chosen_loss(
    vectors: Tensor, items: Tensor, *, count: int, choose: Choose, judge: Judge
) -> Tensor:
    """A loss over ``count`` chosen items a position, a chunk of positions after the other.

    In float32 even under autocast: the time goes into fetching the items, not into products.
    """

    def fill(vectors: Tensor, items: Tensor, d_vectors: Sum, d_items: Sum) -> Tensor:
        dtype = _sum_dtype(vectors.dtype)
        size = count * items.shape[1] * dtype.itemsize  # bytes of a position's items
        rows = max(1, CHUNK_BYTES[vectors.device.type] // size)
        losses = torch.empty(len(vectors), dtype=dtype, device=vectors.device)
        for start in range(0, len(vectors), rows):
            chunk = slice(start, start + rows)
            part, ids = vectors[chunk].to(dtype), choose(chunk)  # (rows, d), (rows, n)
            chosen = items[ids].to(dtype)  # (rows, n, d)
            scores = torch.bmm(chosen, part[:, :, None])[:, :, 0]  # (rows, n)
            losses[chunk], error = judge(scores, chunk)
            if d_vectors is not None:
                d_vectors[chunk] = torch.bmm(error[:, None], chosen)[:, 0]  # (rows, d)
            if d_items is not None:
                # sum each item's gradient over the places where it was chosen; reuses memory
                outer = torch.mul(error[:, :, None], part[:, None], out=chosen)  # (rows, n, d)
                d_items.index_add_(0, ids.flatten(), outer.flatten(0, 1))
        return losses

    return _mean_loss(vectors, items, fill)


# The next item


def catalogue_loss(vectors: Tensor, items: Tensor, targets: Tensor, *, recipe: Recipe) -> Tensor:
    """The recipe's loss of the next item: over the catalogue, or over some random items."""
    if recipe.loss == "sampled-softmax":
        return sampled_softmax(vectors, items, targets, negatives=recipe.negatives)
    if recipe.loss == "shared-softmax":
        return shared_softmax(vectors, items, targets, negatives=recipe.negatives)
    if recipe.loss == "gbce":
        return gbce(vectors, items, targets, negatives=recipe.negatives, t=recipe.gbce_t)
    return catalogue_cross_entropy(vectors, items, targets)


def catalogue_cross_entropy(vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the targets against every item of the catalogue.

    Computed in the dtype of the vectors, or of autocast where that is on. In bfloat16 the three
    kinds of matrix products are; the softmax, the loss and the sums of gradients are in float32.

    No fused kernel on a GPU: the existing ones are made for states as wide as a language model's,
    not for a table of a million items of width 64 (``analyses/catalogue_loss``).
    """
    device, dtype = vectors.device.type, vectors.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)

    def fill(vectors: Tensor, items: Tensor, d_vectors: Sum, d_items: Sum) -> Tensor:
        count, n_items = len(vectors), len(items) - 1
        sums = _sum_dtype(dtype)
        cells = CHUNK_BYTES[vectors.device.type] // sums.itemsize
        fitting = cells // n_items  # positions whose scores for all items fit
        chunks = -(-count // (fitting if fitting >= FEWEST_ROWS else MOST_ROWS))
        rows = -(-count // chunks)
        width = min(n_items, max(1, cells // rows))
        tiles = [(low, min(low + width, n_items)) for low in range(0, n_items, width)]
        buffer = torch.empty(rows * width, dtype=sums, device=vectors.device)
        losses = torch.empty(count, dtype=sums, device=vectors.device)
        for start in range(0, count, rows):
            chunk = slice(start, start + rows)
            d_part = None if d_vectors is None else d_vectors[chunk]
            part, columns = vectors[chunk].to(dtype), targets[chunk, None] - 1
            losses[chunk] = _fill_chunk(part, items, d_part, d_items, columns, tiles, buffer)
        return losses

    return _mean_loss(vectors, items, fill)


def _fill_chunk(
    vectors: Tensor,
    items: Tensor,
    d_vectors: Sum,
    d_items: Sum,
    columns: Tensor,
    tiles: list[tuple[int, int]],
    buffer: Tensor,
) -> Tensor:
    """Cross-entropy of a chunk of positions, (rows,), tile by tile of the catalogue.

    A catalogue that does not fit in one tile is scored twice: for each position's normaliser, then
    for the gradients (as Cut Cross-Entropy does, arXiv 2411.09009). ``columns`` (rows, 1) are
    the targets as columns of the catalogue, ``buffer`` is room for the scores of a tile.
    """
    catalogue = items[1:]
    # First pass: the softmax's normaliser, with a running maximum so that no exponential overflows.
    largest = buffer.new_full((len(vectors), 1), -torch.inf)  # (rows, 1), of the tiles so far
    total, target_score = torch.zeros_like(largest), torch.zeros_like(largest)
    for low, high in tiles:
        share = _product(vectors, catalogue[low:high].to(vectors.dtype), buffer)  # (rows, width)
        place, inside = _within(columns, low, high)
        target_score = torch.where(inside, share.gather(1, place), target_score)
        before, largest = largest, torch.maximum(largest, share.amax(dim=1, keepdim=True))
        # in place from here: the scores become the softmax, then the gradient
        share.sub_(largest).exp_()
        total = total * (before - largest).exp_() + share.sum(dim=1, keepdim=True)
    normaliser = largest + total.log()  # log of the sum of exponentials, (rows, 1)
    if d_vectors is not None or d_items is not None:
        # Second pass, backwards: the gradient by the scores is the softmax, less 1 at the target.
        for low, high in reversed(tiles):
            part = catalogue[low:high].to(vectors.dtype)  # (width, d)
            if high == tiles[-1][1]:  # still in the buffer; a small catalogue has only this tile
                share.div_(total)
            else:
                share = _product(vectors, part, buffer).sub_(normaliser).exp_()
            place, inside = _within(columns, low, high)
            # subtract before rounding: the target's share less one must not cancel in bfloat16
            error = share.scatter_add_(1, place, -inside.to(share.dtype)).to(vectors.dtype)
            if d_vectors is not None:
                _add_product(d_vectors, error, part)
            if d_items is not None:
                _add_product(d_items[1 + low : 1 + high], error.T, vectors)
    return (normaliser - target_score)[:, 0]


def _within(columns: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Each target's place in a tile, and whether it is there, without synchronising a GPU."""
    return (columns - low).clamp(0, high - low - 1), (columns >= low) & (columns < high)


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


def sampled_softmax(vectors: Tensor, items: Tensor, targets: Tensor, *, negatives: int) -> Tensor:
    """Cross-entropy of each target against ``negatives`` random other items.

    The scores of the ``n`` negatives are raised by ``log((I - 1) / n)``, so that their sum of
    exponentials estimates the catalogue's without bias (Jean et al., arXiv 1412.2007). With
    ``I - 1`` negatives or more nothing is sampled: it is the full cross-entropy.
    """
    others = len(items) - 2
    if negatives >= others:
        return catalogue_cross_entropy(vectors, items, targets)
    raised = math.log(others / negatives)

    def judge(scores: Tensor, _: slice) -> tuple[Tensor, Tensor]:
        scores[:, 1:] += raised
        logs = log_softmax(scores, dim=1)
        error = logs.exp()
        error[:, 0] -= 1
        return -logs[:, 0], error

    return _sampled(vectors, items, targets, negatives, judge)


def shared_softmax(vectors: Tensor, items: Tensor, targets: Tensor, *, negatives: int) -> Tensor:
    """Cross-entropy of each target against one random set of items, which all positions share.

    The scores are one matrix product, while ``sampled_softmax`` fetches items for every position: a
    thousand negatives cost less than its 256. They are raised as there, and a target that is in the
    set counts once.
    """
    count = len(items) - 1
    if negatives >= count:
        return catalogue_cross_entropy(vectors, items, targets)
    drawn = torch.randperm(count, device=items.device)[:negatives] + 1  # (n,)
    others = vectors @ embedding(drawn, items).T + math.log(count / negatives)  # (N, n)
    others = others.masked_fill(drawn == targets[:, None], -torch.inf)
    own = (vectors * embedding(targets, items)).sum(dim=1, keepdim=True)  # (N, 1)
    return cross_entropy(torch.cat([own, others], dim=1), torch.zeros_like(targets))


def gbce(vectors: Tensor, items: Tensor, targets: Tensor, *, negatives: int, t: float) -> Tensor:
    """Generalised binary cross-entropy, gSASRec's (Petrov and Macdonald, RecSys 2023).

    ``-(log s(+)^beta + sum of log(1 - s(-))) / (n + 1)`` where ``s`` is the sigmoid of a score,
    ``beta = alpha (t (1 - 1 / alpha) + 1 / alpha)`` and ``alpha = n / (I - 1)``. At ``t = 0`` it is
    the plain binary cross-entropy, which sampling makes overconfident; at ``t = 1`` calibrated.
    """
    others = len(items) - 2
    negatives = min(negatives, others)
    alpha = negatives / others if others else 1.0
    beta = 1 - t * (1 - alpha)  # the paper's, multiplied out

    def judge(scores: Tensor, _: slice) -> tuple[Tensor, Tensor]:
        size = scores.shape[1]
        target, rest = scores[:, 0], scores[:, 1:]
        losses = -(beta * logsigmoid(target) + logsigmoid(-rest).sum(dim=1)) / size
        error = torch.sigmoid(scores)
        error[:, 0] = -beta * torch.sigmoid(-target)
        return losses, error / size

    return _sampled(vectors, items, targets, negatives, judge)


def _sampled(
    vectors: Tensor, items: Tensor, targets: Tensor, negatives: int, judge: Judge
) -> Tensor:
    """A loss over each target and its negatives; scores (rows, 1 + n), the target's first."""
    pattern, shifts = _draw(len(items) - 1, negatives, positions=len(vectors), like=targets)

    def choose(chunk: slice) -> Tensor:
        others = _negatives(pattern, shifts[chunk], targets[chunk], n_items=len(items) - 1)
        return torch.cat([targets[chunk, None], others], dim=1)  # (rows, 1 + n)

    return _chosen_loss(vectors, items, count=1 + len(pattern), choose=choose, judge=judge)


def _draw(n_items: int, negatives: int, *, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Random numbers that decide every position's negatives: (n,) distinct ones, and (N,) shifts.

    Each position shifts one random set around the catalogue. This is a uniform sample without
    repeats, with sums that are uncorrelated between positions. Separate samples would need a
    shuffled catalogue per position, and one sample for all would give a few items all of its noise
    (``analyses/catalogue_loss``).
    """
    others = n_items - 1
    pattern = torch.randperm(others, device=like.device)[:negatives]
    return pattern, torch.randint(max(1, others), (positions,), device=like.device)


def _negatives(pattern: Tensor, shifts: Tensor, targets: Tensor, *, n_items: int) -> Tensor:
    """Item ids of each position's negatives, (rows, n): never its target, none twice."""
    place = (pattern + shifts[:, None]) % max(1, n_items - 1)  # (rows, n) in 0..I-2
    return place + 1 + (place + 1 >= targets[:, None])  # skip the target


# A teacher's scores


def catalogue_kl(
    vectors: Tensor, items: Tensor, goal: Tensor, goal_items: Tensor, *, temperature: float
) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` over the catalogue.

    Distillation of Hinton et al. (arXiv 1503.02531); T^2 keeps the size of the gradient. The
    teacher's user vectors are ``goal`` (N, d'), its items (I + 1, d').
    """

    def fill(vectors: Tensor, items: Tensor, d_vectors: Sum, d_items: Sum) -> Tensor:
        dtype = _sum_dtype(vectors.dtype)
        catalogue, others = items[1:].to(dtype), goal_items[1:].to(dtype)
        # four matrices (rows, I) exist at a time
        rows = max(1, CHUNK_BYTES[vectors.device.type] // (4 * len(catalogue) * dtype.itemsize))
        losses = torch.empty(len(vectors), dtype=dtype, device=vectors.device)
        for start in range(0, len(vectors), rows):
            chunk = slice(start, start + rows)
            part = vectors[chunk].to(dtype)
            own, teachers = part @ catalogue.T, goal[chunk].to(dtype) @ others.T  # (rows, I) each
            losses[chunk], error = _divergence(own, teachers, temperature)
            if d_vectors is not None:
                d_vectors[chunk] = error @ catalogue
            if d_items is not None:
                d_items[1:].addmm_(error.T, part)
        return losses

    return _mean_loss(vectors, items, fill)


def top_kl(
    vectors: Tensor, items: Tensor, top: Tensor, scores: Tensor, *, temperature: float
) -> Tensor:
    """The same over only the teacher's best items ``top`` (N, K), with its scores of them (N, K).

    This is ListNet's loss on the teacher's list; it does not constrain the other items.
    """

    def judge(own: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        return _divergence(own, scores[chunk].to(own.dtype), temperature)

    count = top.shape[1]
    return _chosen_loss(vectors, items, count=count, choose=lambda c: top[c].long(), judge=judge)


def _divergence(own: Tensor, teachers: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``T^2 KL`` of each row of scores, (rows,), and its gradient by the student's, (rows, n)."""
    logs = torch.log_softmax(own / temperature, dim=1)
    goal = torch.log_softmax(teachers / temperature, dim=1)
    shares = goal.exp()
    losses = temperature**2 * (shares * (goal - logs)).sum(dim=1)
    return losses, (logs.exp() - shares).mul_(temperature)
