"""SLMRec's distillation (arXiv 2405.17890): a student follows the teacher group by group.

Teacher and student are cut into the same number of groups of blocks. After each group the student's
state is pulled to the teacher's (D_cos, D_norm), and inner groups learn to recommend by themselves
through adapters of their own (L_ms). The paper compares the state of the last token; here every
position of a history is the last token of its beginning, so all of them are compared.
The teacher's states don't change while the student learns: they are computed once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.data.batches import length_buckets
from depthprobe.models.recommender import Recommender, last_positions
from depthprobe.models.tap import tap_blocks
from depthprobe.study import Distillation
from depthprobe.training.loop import Batch, make_batch
from depthprobe.training.losses import catalogue_cross_entropy, cosine_loss, norm_loss


def group_ends(depth: int, groups: int) -> tuple[int, ...]:
    """After how many blocks each group ends; the last one ends the model.

    >>> group_ends(12, 4), group_ends(6, 4), group_ends(1, 1)
    ((3, 6, 9, 12), (2, 3, 5, 6), (1,))
    """
    if not 1 <= groups <= depth:
        raise ValueError(f"{groups} groups of a model of {depth} blocks")
    return tuple((2 * (g + 1) * depth + groups) // (2 * groups) for g in range(groups))


class TeacherStates:
    """The teacher's states after some of its blocks, at every position of every training window."""

    def __init__(self, states: np.ndarray, lengths: np.ndarray, ends: tuple[int, ...]) -> None:
        """Wrap states (N, len(ends), D) of windows with ``lengths`` positions each, in order."""
        self.states, self.ends = states, ends
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])

    def at(self, batch: Batch, ends: tuple[int, ...]) -> Tensor:
        """The states after ``ends`` blocks at the batch's real positions, (len(ends), N, D)."""
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
    lengths = np.array([len(window) - 1 for window in windows])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    width = teacher.width
    shape = (int(offsets[-1]), len(ends), width)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    with tap_blocks(teacher.backbone) as tap:
        for chosen in length_buckets(lengths, batch_size):
            batch = make_batch(windows, chosen, device)
            teacher.states(batch.inputs)
            after = [tap.states[end][:, teacher.lead :] for end in ends]  # g of (B, T, D)
            states = torch.stack([state[batch.mask] for state in after], dim=1)  # (N, g, D)
            small = states.half()
            if not torch.isfinite(small).all():
                raise ValueError(
                    f"a teacher state of {states.abs().max():.3g} does not fit float16"
                )
            rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
            out[rows] = small.cpu().numpy()
    out.flush()
    return TeacherStates(out, lengths, ends)


class Distiller(nn.Module):
    """A student with the adapters that only its training needs."""

    def __init__(self, student: Recommender, settings: Distillation) -> None:
        super().__init__()
        self.student = student
        self.settings = settings
        self.ends = group_ends(student.depth, min(settings.groups, student.depth))
        d_item = student.item_matrix().shape[1]
        width = student.width
        self.adapters = nn.ModuleList(nn.Linear(width, d_item) for _ in self.ends[:-1])

    def forward(self, batch: Batch, teacher: Tensor) -> Tensor:
        """``CE + cosine * D_cos + norm * D_norm + supervision * L_ms``.

        Args:
            batch: training windows.
            teacher: the teacher's states at the batch's real positions, (groups, N, D).
        """
        student, weights = self.student, self.settings
        with tap_blocks(student.backbone) as tap:
            vectors = student(batch.inputs)[batch.mask]
            grouped = [tap.states[end][:, student.lead :] for end in self.ends]  # (B, T, D) each
        items = student.item_matrix()
        states = torch.stack([state[batch.mask] for state in grouped]).float()  # (groups, N, D)
        loss = catalogue_cross_entropy(vectors, items, batch.targets[batch.mask])
        loss = loss + weights.cosine * cosine_loss(states, teacher)
        loss = loss + weights.norm * norm_loss(states, teacher)
        if weights.supervision and len(self.adapters):
            lengths = batch.mask.sum(dim=1)
            rows = torch.arange(len(lengths), device=lengths.device)
            last = batch.targets[rows, lengths - 1]  # (B,) as in the paper: one target a user
            for adapter, state in zip(self.adapters, grouped[:-1], strict=True):
                guess = adapter(last_positions(state, lengths).float())
                loss = loss + weights.supervision * catalogue_cross_entropy(guess, items, last)
        return loss
