"""How far a student is from its teacher: in its states (SLMRec), and in what it says of the items.

Over the teacher's best items alone, the last one is ListNet's loss on the teacher's list: a ranking
loss, which leaves the student free about all other items.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from depthprobe.training.losses import fill_chosen
from depthprobe.training.mean_loss import CHUNK_BYTES, exact_dtype, mean_loss

TINY = 1e-12  # in place of the size of a state that is zero


def state_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    cosine: float,
    norm: float,
    form: Literal["distance", "squared"] = "distance",
) -> Tensor:
    """``cosine D_cos + norm D_norm`` of states (G, N, D), summed over groups, mean over N.

    SLMRec's ``D_cos = 1 - cos(h_s, h_t)`` and ``D_norm = ||h_s - h_t||_2``. Gradients are made with
    the loss, in a third of the time that they take one operation after the other.

    Args:
        teacher: gets no gradient.
        form: ``squared`` takes ``||h_s - h_t||_2^2 / D``, which does not grow with the width.
    """
    loss: Tensor = _StateLoss.apply(student, teacher, cosine, norm, form)  # type: ignore[no-untyped-call]
    return loss


class _StateLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, cosine: float, norm: float, form: str
    ) -> Tensor:
        """(G, N, D) each -> scalar."""
        positions, width = student.shape[-2:]
        sizes = [_size(states) for states in (student, teacher)]  # (G, N, 1)
        product = sizes[0] * sizes[1]
        alike = (student * teacher).sum(dim=-1, keepdim=True) / product
        gap = student - teacher
        if form == "squared":
            distance = gap.square().mean(dim=-1, keepdim=True)
            slope = torch.full_like(distance, 2 / width)
        else:
            distance = torch.linalg.vector_norm(gap, dim=-1, keepdim=True)
            slope = 1 / distance.clamp_min(TINY)
        loss = (cosine * (1 - alike) + norm * distance).sum() / positions
        # d cos / d h_s = h_t / (|h_s| |h_t|) - cos h_s / |h_s|^2
        gradient = gap.mul_(norm / positions * slope)
        gradient.addcmul_(teacher, -cosine / positions / product)
        gradient.addcmul_(student, cosine / positions * alike / sizes[0].square())
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The student's gradient alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


def _size(states: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return size.clamp_min(TINY)


def catalogue_kl(
    vectors: Tensor,
    items: Tensor,
    goal: Tensor,
    goal_items: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` over the catalogue, mean over N.

    Distillation of Hinton et al. (arXiv 1503.02531); T^2 keeps the size of the gradient.

    Args:
        vectors: the student's user vectors, (N, d).
        items: the student's item table, (I + 1, d); row 0 is padding.
        goal: the teacher's user vectors, (N, d').
        goal_items: the teacher's item table, (I + 1, d').

    Raises:
        ValueError: without a single position, where a mean is undefined.
    """
    fill = partial(_fill_kl, goal=goal, goal_items=goal_items, temperature=temperature)
    return mean_loss(vectors, items, fill)


def top_kl(
    vectors: Tensor, items: Tensor, top: Tensor, scores: Tensor, *, temperature: float
) -> Tensor:
    """The same over each position's ``top`` items alone, both distributions over those.

    Args:
        vectors: the student's user vectors, (N, d).
        items: the student's item table, (I + 1, d).
        top: the items that the teacher scores best, (N, K).
        scores: the teacher's scores of these, (N, K).

    Raises:
        ValueError: without a single position, where a mean is undefined.
    """

    def judge(own: Tensor, block: slice) -> tuple[Tensor, Tensor]:
        return _divergence(own, scores[block].to(own.dtype), temperature)

    fill = partial(
        fill_chosen, count=top.shape[1], choose=lambda block: top[block].long(), judge=judge
    )
    return mean_loss(vectors, items, fill)


def _divergence(own: Tensor, wanted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``T^2 KL`` of each row of scores, (rows,), and its gradient by the student's, (rows, n)."""
    logs = torch.log_softmax(own / temperature, dim=1)
    goal = torch.log_softmax(wanted / temperature, dim=1)
    shares = goal.exp()
    losses = temperature**2 * (shares * (goal - logs)).sum(dim=1)
    return losses, (logs.exp() - shares).mul_(temperature)


def _fill_kl(
    vectors: Tensor,
    items: Tensor,
    d_vectors: Tensor | None,
    d_items: Tensor | None,
    *,
    goal: Tensor,
    goal_items: Tensor,
    temperature: float,
) -> Tensor:
    """The divergence at each position, (N,), some whole rows of scores at a time."""
    exact = exact_dtype(vectors.dtype)
    catalogue, others = items[1:].to(exact), goal_items[1:].to(exact)
    # four such matrices are alive at once
    rows = max(1, CHUNK_BYTES[vectors.device.type] // (4 * len(catalogue) * exact.itemsize))
    losses = torch.empty(len(vectors), dtype=exact, device=vectors.device)
    for start in range(0, len(vectors), rows):
        block = slice(start, start + rows)
        part = vectors[block].to(exact)
        own, wanted = part @ catalogue.T, goal[block].to(exact) @ others.T  # (rows, I)
        losses[block], error = _divergence(own, wanted, temperature)
        if d_vectors is not None:
            d_vectors[block] = error @ catalogue
        if d_items is not None:
            d_items[1:].addmm_(error.T, part)
    return losses
