"""How far a student is from its teacher: in its states (SLMRec), and in what it says of the items.

Over the teacher's best items alone, the last one is ListNet's loss on the teacher's list: a ranking
loss, which leaves the student free about all other items.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from depthprobe.models.parts import check_readable
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.taps import tap_blocks
from depthprobe.study import Distillation, Recipe
from depthprobe.training.features import FeatureSpec, Teacher, TeacherOutputs, target_states
from depthprobe.training.losses import (
    CHUNK_BYTES,
    catalogue_loss,
    exact_dtype,
    fill_chosen,
    mean_loss,
)
from depthprobe.training.objectives import Batch, Objective, last_only, target_vectors

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


# Distillation: a student follows its teacher, in its states (SLMRec) or in its scores.
#
# SLMRec (arXiv 2405.17890) cuts teacher and student into the same number of groups of blocks. After
# each group the student's state is pulled to the teacher's (D_cos, D_norm), and inner groups
# learn to
# recommend by themselves through adapters of their own (L_ms). The paper compares the state of the
# last token. With the objective ``every`` each position of a history is the last of its beginning,
# and all are compared.


def group_ends(depth: int, groups: int) -> tuple[int, ...]:
    """After how many blocks each group ends; the last one ends the model.

    >>> group_ends(12, 4), group_ends(6, 4), group_ends(1, 1)
    ((3, 6, 9, 12), (2, 3, 5, 6), (1,))
    """
    if not 1 <= groups <= depth:
        raise ValueError(f"{groups} groups of a model of {depth} blocks")
    return tuple((2 * (g + 1) * depth + groups) // (2 * groups) for g in range(groups))


def compared(settings: Distillation, recipe: Recipe) -> Objective:
    """Where a student is compared with its teacher."""
    return "last" if settings.positions == "last" else recipe.objective


def feature_spec(
    settings: Distillation, recipe: Recipe, *, depth: int, teacher_depth: int
) -> FeatureSpec:
    """What a student of some depth asks its teacher for."""
    ends = group_ends(teacher_depth, min(settings.groups, depth))
    return FeatureSpec(
        objective=compared(settings, recipe),
        ends=ends if settings.follows_states else (),
        vectors=bool(settings.logits) and not settings.top,
        top=settings.top if settings.logits else 0,
    )


class Distiller(nn.Module):
    """A student with its losses, and the adapters that only its training needs."""

    goal_items: Tensor | None

    def __init__(
        self,
        student: Recommender,
        settings: Distillation,
        recipe: Recipe,
        teacher: Teacher | None,
        *,
        goal_items: Tensor | None = None,
    ) -> None:
        """Put a student together with what it follows.

        Args:
            teacher: None where neither states nor scores are followed.
            goal_items: the teacher's item matrix, (I + 1, d'), for the scores of all items.

        Raises:
            ValueError: for a backbone whose states after each block can't be read.
        """
        super().__init__()
        self.student, self.teacher = student, teacher
        self.settings, self.recipe = settings, recipe
        self.ends = group_ends(student.depth, min(settings.groups, student.depth))
        if settings.follows_states or (settings.supervision and len(self.ends) > 1):
            check_readable(student.backbone, streams=False)
        d_item = student.item_matrix().shape[1]
        inner = self.ends[:-1] if settings.supervision else ()
        self.adapters = nn.ModuleList(nn.Linear(student.width, d_item) for _ in inner)
        self.register_buffer("goal_items", goal_items, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """The weighted sum of the losses of a batch, a scalar."""
        student, weights, recipe = self.student, self.settings, self.recipe
        tapping = weights.follows_states or len(self.adapters) > 0
        # a tapped model runs uncompiled, so only where its states are read
        with tap_blocks(student.backbone) if tapping else nullcontext() as tap:
            vectors = target_vectors(student, batch, recipe)  # (N, d)
        grouped = [tap.states[end] for end in self.ends] if tap is not None else []
        items = student.item_matrix()
        loss = vectors.new_zeros(())
        if weights.ce:
            part = catalogue_loss(vectors, items, batch.targets, recipe=recipe)
            loss = loss + weights.ce * part
        if self.teacher is not None:
            at = last_only(batch) if compared(weights, recipe) == "last" else batch
            said = self.teacher.at(at)
            if said.states is not None:
                states = torch.stack([target_states(student, s, at) for s in grouped]).float()
                loss = loss + state_loss(
                    states,
                    said.states,
                    cosine=weights.cosine,
                    norm=weights.norm,
                    form=weights.norm_form,
                )
            if weights.logits:
                # of all asked positions the compared ones, which may be each user's last
                own = vectors if at.objective == batch.objective else vectors[_last_rows(batch)]
                loss = loss + weights.logits * self._follow_scores(own, items, said)
        if len(self.adapters):
            loss = loss + weights.supervision * self._supervise(grouped[:-1], items, batch)
        return loss

    def _follow_scores(self, vectors: Tensor, items: Tensor, said: TeacherOutputs) -> Tensor:
        temperature = self.settings.temperature
        if said.top is not None and said.scores is not None:
            return top_kl(vectors, items, said.top, said.scores, temperature=temperature)
        if said.vectors is None or self.goal_items is None:
            raise ValueError("no scores of the teacher to follow")
        return catalogue_kl(vectors, items, said.vectors, self.goal_items, temperature=temperature)

    def _supervise(self, grouped: list[Tensor], items: Tensor, batch: Batch) -> Tensor:
        """L_ms: the last item of each user as in the paper, by each inner group's state."""
        places = self.student.last_place(batch.lengths)
        guesses = [
            adapter(states_at(state, places).float())
            for adapter, state in zip(self.adapters, grouped, strict=True)
        ]
        targets = batch.last.repeat(len(guesses))  # the groups in one go: the sum of their means
        return len(guesses) * catalogue_loss(torch.cat(guesses), items, targets, recipe=self.recipe)


def _last_rows(batch: Batch) -> Tensor:
    """Of a batch's N positions, all that windows have, the last of each window, (B,)."""
    return batch.lengths.cumsum(dim=0) - 1
