"""Losses: cross-entropy over the whole catalogue in chunks, and SLMRec's distillation losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

# of logits at once: on a CPU what its cache holds, on a GPU what keeps it busy
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}
FEWEST_ROWS = 32  # below, a matrix product is slow, however large the catalogue


class _CatalogueCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy whose gradients are made in the forward pass, chunk by chunk.

    Only one chunk of logits exists at a time, and it fits the processor's cache; autograd would
    keep the whole (positions x items) matrix, and its softmax, for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
        """(N, d), (I + 1, d), (N,) item ids -> scalar."""
        catalogue = items[1:]
        size = catalogue.shape[0] * vectors.element_size()
        rows = max(FEWEST_ROWS, CHUNK_BYTES[vectors.device.type] // size)
        d_vectors = torch.empty_like(vectors) if ctx.needs_input_grad[0] else None
        d_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        buffer = vectors.new_empty(min(rows, len(vectors)), catalogue.shape[0])
        total = vectors.new_zeros((), dtype=torch.float64)
        for start in range(0, len(vectors), rows):
            part = vectors[start : start + rows]
            column = (targets[start : start + rows] - 1)[:, None]
            logits = torch.mm(part, catalogue.T, out=buffer[: len(part)])  # (rows, I)
            wanted = logits.gather(1, column)
            largest = logits.amax(dim=1, keepdim=True)
            # in place from here: the logits become the softmax, then the gradient
            share = logits.sub_(largest).exp_()
            weight = share.sum(dim=1, keepdim=True)
            total += (largest + weight.log() - wanted).double().sum()
            error = share.div_(weight).scatter_add_(1, column, torch.full_like(wanted, -1))
            if d_vectors is not None:
                torch.mm(error, catalogue, out=d_vectors[start : start + rows])
            if d_items is not None:
                d_items[1:].addmm_(error.T, part)
        ctx.save_for_backward(d_vectors, d_items)
        ctx.count = len(vectors)
        return (total / len(vectors)).to(vectors.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale the gradients that the forward pass made."""
        d_vectors, d_items = ctx.saved_tensors
        scale = grads[0] / ctx.count
        return (
            d_vectors * scale if d_vectors is not None else None,
            d_items * scale if d_items is not None else None,
            None,
        )


def catalogue_cross_entropy(vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of targets against every item of the catalogue.

    Args:
        vectors: user vectors, (N, d).
        items: item table, (I + 1, d); row 0 is padding and never a candidate.
        targets: item ids, (N,), in 1..I.

    Raises:
        ValueError: without a single position, where a mean is undefined.
    """
    if not len(vectors):
        raise ValueError("no position to compute a loss on")
    loss: Tensor = _CatalogueCrossEntropy.apply(vectors, items, targets)  # type: ignore[no-untyped-call]
    return loss


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SLMRec's D_cos: ``1 - cos(h_s, h_t)``, (..., N, D) summed over the groups, mean over N."""
    return (1 - cosine_similarity(student, teacher, dim=-1)).mean(dim=-1).sum()


def norm_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SLMRec's D_norm: ``||h_s - h_t||_2``, (..., N, D) summed over the groups, mean over N."""
    distance: Tensor = torch.linalg.vector_norm(student - teacher, dim=-1)  # (..., N)
    return distance.mean(dim=-1).sum()
