"""SLMRec's distillation (arXiv 2405.17890): a student follows the teacher group by group.

Teacher and student are cut into the same number of groups of blocks. After each group the student's
state is pulled to the teacher's (D_cos, D_norm), and inner groups learn to recommend by themselves
through adapters of their own (L_ms). The paper compares the state of the last token. With the
objective ``every`` each position of a history is the last of its beginning, and all are compared.
The teacher's states don't change while the student learns: they are computed once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.data.batches import length_buckets
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.tap import tap_blocks
from depthprobe.study import Distillation, Recipe
from depthprobe.training.losses import catalogue_loss, cosine_loss, norm_loss
from depthprobe.training.objectives import Batch, Objective, asked, asked_vectors, make_batch


def group_ends(depth: int, groups: int) -> tuple[int, ...]:
    """After how many blocks each group ends; the last one ends the model.

    >>> group_ends(12, 4), group_ends(6, 4), group_ends(1, 1)
    ((3, 6, 9, 12), (2, 3, 5, 6), (1,))
    """
    if not 1 <= groups <= depth:
        raise ValueError(f"{groups} groups of a model of {depth} blocks")
    return tuple((2 * (g + 1) * depth + groups) // (2 * groups) for g in range(groups))


class TeacherStates:
    """The teacher's states after some of its blocks, wherever a training window is asked."""

    def __init__(self, states: np.ndarray, counts: np.ndarray, ends: tuple[int, ...]) -> None:
        """Wrap states (N, len(ends), D) of windows with ``counts`` asked positions, in order.

        The last of ``ends`` is the teacher's depth.
        """
        self.states, self.ends = states, ends
        self.offsets = np.concatenate([[0], np.cumsum(counts)])

    def at(self, batch: Batch, ends: tuple[int, ...]) -> Tensor:
        """The states after ``ends`` blocks at the batch's asked positions, (len(ends), N, D)."""
        rows = np.concatenate(
            [np.arange(self.offsets[i], self.offsets[i + 1]) for i in batch.chosen]
        )
        columns = [self.ends.index(end) for end in ends]
        states = torch.from_numpy(np.asarray(self.states[rows])[:, columns])
        return states.to(batch.inputs.device).float().transpose(0, 1)


@torch.inference_mode()
def teacher_states(
    teacher: Recommender,
    windows: list[np.ndarray],
    *,
    ends: tuple[int, ...],
    objective: Objective,
    path: Path,
    device: torch.device,
    batch_size: int = 256,
) -> TeacherStates:
    """Run the teacher once over the training windows, into a memory-mapped float16 file.

    Args:
        ends: after how many blocks to keep the state.

    Raises:
        ValueError: if a state does not fit float16.
    """
    teacher.eval()
    lengths, counts = np.array([len(window) - 1 for window in windows]), asked(windows, objective)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    width = teacher.width
    shape = (int(offsets[-1]), len(ends), width)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    with tap_blocks(teacher.backbone) as tap:
        for chosen in length_buckets(lengths, batch_size):
            batch = make_batch(windows, chosen, device, objective)
            teacher.states(batch.inputs, batch.lengths)
            after = [_asked_states(teacher, tap.states[end], batch, objective) for end in ends]
            states = torch.stack(after, dim=1)  # (N, g, D)
            small = states.half()
            if not torch.isfinite(small).all():
                raise ValueError(
                    f"a teacher state of {states.abs().max():.3g} does not fit float16"
                )
            rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
            out[rows] = small.cpu().numpy()
    out.flush()
    return TeacherStates(out, counts, ends)


def _asked_states(model: Recommender, states: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """A block's output where the batch asks for the next item, (N, D)."""
    if objective == "last":
        return states_at(states, model.last_place(batch.lengths))
    return states[:, model.lead :][batch.mask]


class Distiller(nn.Module):
    """A student with its losses, and the adapters that only its training needs."""

    def __init__(
        self, student: Recommender, settings: Distillation, recipe: Recipe, teacher: TeacherStates
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.settings, self.recipe = settings, recipe
        self.ends = group_ends(student.depth, min(settings.groups, student.depth))
        #: after which of the teacher's blocks its groups end
        self.teacher_ends = group_ends(teacher.ends[-1], len(self.ends))
        d_item = student.item_matrix().shape[1]
        width = student.width
        self.adapters = nn.ModuleList(nn.Linear(width, d_item) for _ in self.ends[:-1])

    def forward(self, batch: Batch) -> Tensor:
        """``CE + cosine * D_cos + norm * D_norm + supervision * L_ms`` of a batch, a scalar."""
        student, weights, recipe = self.student, self.settings, self.recipe
        with tap_blocks(student.backbone) as tap:
            vectors = asked_vectors(student, batch, recipe)
            grouped = [tap.states[end] for end in self.ends]  # (B, lead + T + S, D) each
        items, teacher = student.item_matrix(), self.teacher.at(batch, self.teacher_ends)
        states = torch.stack(
            [_asked_states(student, state, batch, recipe.objective) for state in grouped]
        ).float()  # (groups, N, D)
        loss = catalogue_loss(vectors, items, batch.targets[batch.mask], recipe=recipe)
        loss = loss + weights.cosine * cosine_loss(states, teacher)
        loss = loss + weights.norm * norm_loss(states, teacher)
        if weights.supervision and len(self.adapters):
            rows = torch.arange(len(batch.lengths), device=batch.lengths.device)
            last = batch.targets[rows, batch.lengths - 1]  # (B,) as in the paper: one target a user
            places = student.last_place(batch.lengths)
            for adapter, state in zip(self.adapters, grouped[:-1], strict=True):
                guess = adapter(states_at(state, places).float())
                part = catalogue_loss(guess, items, last, recipe=recipe)
                loss = loss + weights.supervision * part
        return loss
