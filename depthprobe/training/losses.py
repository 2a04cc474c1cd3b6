"""Losses over the catalogue: the recipe's choice among the full one and two that sample.

Sampled softmax and gBCE score some random items a position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from depthprobe.study import Recipe
from depthprobe.training.cross_entropy import catalogue_cross_entropy
from depthprobe.training.mean_loss import CHUNK_BYTES, exact_dtype, mean_loss

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
