"""Distillation: a student follows its teacher, in its states (SLMRec) or in its scores.

SLMRec (arXiv 2405.17890) cuts teacher and student into the same number of groups of blocks. After
each group the student's state is pulled to the teacher's (D_cos, D_norm), and inner groups learn to
recommend by themselves through adapters of their own (L_ms). The paper compares the state of the
last token. With the objective ``every`` each position of a history is the last of its beginning,
and all are compared.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.tap import tap_blocks
from depthprobe.study import Distillation, Recipe
from depthprobe.training.features import Said, Teacher, Wanted, asked_states
from depthprobe.training.following import catalogue_kl, cosine_loss, norm_loss, top_kl
from depthprobe.training.losses import catalogue_loss
from depthprobe.training.objectives import Batch, Objective, ask_last, asked_vectors


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


def wanted_features(
    settings: Distillation, recipe: Recipe, *, depth: int, teacher_depth: int
) -> Wanted:
    """What a student of some depth asks its teacher for."""
    ends = group_ends(teacher_depth, min(settings.groups, depth))
    return Wanted(
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
        """
        super().__init__()
        self.student, self.teacher = student, teacher
        self.settings, self.recipe = settings, recipe
        self.ends = group_ends(student.depth, min(settings.groups, student.depth))
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
            vectors = asked_vectors(student, batch, recipe)  # (N, d)
        grouped = [tap.states[end] for end in self.ends] if tap is not None else []
        items = student.item_matrix()
        loss = vectors.new_zeros(())
        if weights.ce:
            targets = batch.targets[batch.mask]
            loss = loss + weights.ce * catalogue_loss(vectors, items, targets, recipe=recipe)
        if self.teacher is not None:
            at = ask_last(batch) if compared(weights, recipe) == "last" else batch
            said = self.teacher.at(at)
            if said.states is not None:
                states = torch.stack([asked_states(student, s, at) for s in grouped]).float()
                loss = loss + self._follow_states(states, said.states)
            if weights.logits:
                # of all asked positions the compared ones, which may be each user's last
                own = vectors if at is batch else vectors[_last_rows(batch)]
                loss = loss + weights.logits * self._follow_scores(own, items, said)
        for adapter, state in zip(self.adapters, grouped, strict=False):
            loss = loss + weights.supervision * self._supervise(adapter, state, items, batch)
        return loss

    def _follow_states(self, own: Tensor, teacher: Tensor) -> Tensor:
        """D_cos and D_norm of states (G, N, D), weighted."""
        weights = self.settings
        loss = weights.cosine * cosine_loss(own, teacher)
        return loss + weights.norm * norm_loss(own, teacher, form=weights.norm_form)

    def _follow_scores(self, vectors: Tensor, items: Tensor, said: Said) -> Tensor:
        temperature = self.settings.temperature
        if said.top is not None and said.scores is not None:
            return top_kl(vectors, items, said.top, said.scores, temperature=temperature)
        if said.vectors is None or self.goal_items is None:
            raise ValueError("no scores of the teacher to follow")
        return catalogue_kl(vectors, items, said.vectors, self.goal_items, temperature=temperature)

    def _supervise(self, adapter: nn.Module, state: Tensor, items: Tensor, batch: Batch) -> Tensor:
        """A part of L_ms: the last item of each user as in the paper, by an inner group's state."""
        rows = torch.arange(len(batch.lengths), device=batch.lengths.device)
        last = batch.targets[rows, batch.lengths - 1]  # (B,)
        guess = adapter(states_at(state, self.student.last_place(batch.lengths)).float())
        return catalogue_loss(guess, items, last, recipe=self.recipe)


def _last_rows(batch: Batch) -> Tensor:
    """Of a batch's N asked positions, the last of each window, (B,)."""
    return batch.mask.sum(dim=1).cumsum(dim=0) - 1
