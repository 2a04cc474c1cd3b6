"""Distillation: a student follows its teacher, in its states (SLMRec) or in its scores.

SLMRec (arXiv 2405.17890) divides teacher and student into the same number of groups of blocks.
After each group the student's state is pulled to the teacher's (D_cos, D_norm), and inner groups
learn to recommend through adapters of their own (L_ms). The paper compares the state of the last
token. With the objective ``every``, each position is the last one of a shorter history, so all are
compared.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from depthprobe.models.parts import check_readable
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.taps import tap_blocks
from depthprobe.study import Distillation, Recipe
from depthprobe.training.features import FeatureSpec, Teacher, TeacherOutputs
from depthprobe.training.losses import catalogue_kl, catalogue_loss, top_kl
from depthprobe.training.objectives import Batch, Objective, at_targets, last_only, target_states

TINY = 1e-12  # the smallest norm of a state, to avoid a division by 0


def group_ends(depth: int, groups: int) -> tuple[int, ...]:
    """After how many blocks each group ends; the last one ends the model.

    >>> group_ends(12, 4), group_ends(6, 4), group_ends(1, 1)
    ((3, 6, 9, 12), (2, 3, 5, 6), (1,))
    """
    if not 1 <= groups <= depth:
        raise ValueError(f"{groups} groups of a model of {depth} blocks")
    return tuple((2 * (g + 1) * depth + groups) // (2 * groups) for g in range(groups))


def compared(settings: Distillation, recipe: Recipe) -> Objective:
    """The positions at which a student is compared with its teacher."""
    return "last" if settings.positions == "last" else recipe.objective


def feature_spec(
    settings: Distillation, recipe: Recipe, *, depth: int, teacher_depth: int
) -> FeatureSpec:
    """Which of the teacher's outputs a student of some depth needs."""
    ends = group_ends(teacher_depth, min(settings.groups, depth))
    return FeatureSpec(
        objective=compared(settings, recipe),
        ends=ends if settings.follows_states else (),
        vectors=bool(settings.logits) and not settings.top,
        top=settings.top if settings.logits else 0,
    )


def state_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    cosine: float,
    norm: float,
    form: Literal["distance", "squared"] = "distance",
) -> Tensor:
    """``cosine D_cos + norm D_norm`` of states (G, N, D), summed over groups, mean over N.

    SLMRec's ``D_cos = 1 - cos(h_s, h_t)`` and ``D_norm = ||h_s - h_t||_2``, or ``squared``:
    ``||h_s - h_t||_2^2 / D``, which does not grow with the width. The teacher gets no gradient; the
    student's is made with the loss, in a third of autograd's time.
    """
    loss: Tensor = _StateLoss.apply(student, teacher, cosine, norm, form)  # type: ignore[no-untyped-call, unused-ignore]
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
        alike = (student * teacher).sum(dim=-1, keepdim=True) / product  # the cosine, (G, N, 1)
        gap = student - teacher
        # the slope: by how much the gap, (G, N, D), enters the gradient of the distance
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
        """The gradient of the student's states; the teacher gets none."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


def _size(states: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return size.clamp_min(TINY)


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
        """Combine a student with its teacher's outputs, if it follows a teacher.

        ``goal_items`` is the teacher's item matrix, (I + 1, d'), for the scores of all items.

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
        # a tapped model runs uncompiled, so tap it only if its states are read
        with tap_blocks(student.backbone) if tapping else nullcontext() as tap:
            vectors = at_targets(student(batch.inputs, batch.ends), batch)  # (N, d)
        states = [tap.states[end] for end in self.ends] if tap is not None else []  # (B, P, D) each
        items = student.item_matrix()
        loss = vectors.new_zeros(())
        if weights.ce:
            part = catalogue_loss(vectors, items, batch.targets, recipe=recipe)
            loss = loss + weights.ce * part
        if self.teacher is not None:
            place = last_only(batch) if compared(weights, recipe) == "last" else batch
            outputs = self.teacher.at(place)
            if outputs.states is not None:
                own = torch.stack([target_states(student, s, place) for s in states]).float()
                sizes = {"cosine": weights.cosine, "norm": weights.norm}
                loss = loss + state_loss(own, outputs.states, **sizes, form=weights.norm_form)
            if weights.logits:
                if place.objective != batch.objective:  # all positions -> each window's last, (B,)
                    vectors = vectors[batch.lengths.cumsum(dim=0) - 1]
                loss = loss + weights.logits * self._follow_scores(vectors, items, outputs)
        if len(self.adapters):
            loss = loss + weights.supervision * self._supervise(states[:-1], items, batch)
        return loss

    def _follow_scores(self, vectors: Tensor, items: Tensor, outputs: TeacherOutputs) -> Tensor:
        temperature, goal_items = self.settings.temperature, self.goal_items
        if outputs.vectors is not None and goal_items is not None:
            goal = outputs.vectors
            return catalogue_kl(vectors, items, goal, goal_items, temperature=temperature)
        best = cast("tuple[Tensor, Tensor]", (outputs.top, outputs.scores))
        return top_kl(vectors, items, *best, temperature=temperature)

    def _supervise(self, states: list[Tensor], items: Tensor, batch: Batch) -> Tensor:
        """L_ms: each inner group predicts the last item of each window, as in the paper."""
        places = self.student.last_place(batch.inputs, batch.lengths)
        vectors = [
            adapter(states_at(state, places).float())  # (B, d)
            for adapter, state in zip(self.adapters, states, strict=True)
        ]
        targets = batch.last.repeat(len(vectors))  # all groups at once: the sum of their means
        return len(vectors) * catalogue_loss(torch.cat(vectors), items, targets, recipe=self.recipe)
