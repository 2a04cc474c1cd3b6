"""Means over positions whose gradients are made in the forward pass, with no graph in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
