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

from depthprobe.models.readable import check_readable
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.tap import tap_blocks
from depthprobe.study import Distillation, Recipe
from depthprobe.training.features import Said, Teacher, Wanted, asked_states
from depthprobe.training.following import catalogue_kl, state_loss, top_kl
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
            vectors = asked_vectors(student, batch, recipe)  # (N, d)
        grouped = [tap.states[end] for end in self.ends] if tap is not None else []
        items = student.item_matrix()
        loss = vectors.new_zeros(())
        if weights.ce:
            part = catalogue_loss(vectors, items, batch.targets, recipe=recipe)
            loss = loss + weights.ce * part
        if self.teacher is not None:
            at = ask_last(batch) if compared(weights, recipe) == "last" else batch
            said = self.teacher.at(at)
            if said.states is not None:
                states = torch.stack([asked_states(student, s, at) for s in grouped]).float()
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

    def _follow_scores(self, vectors: Tensor, items: Tensor, said: Said) -> Tensor:
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
