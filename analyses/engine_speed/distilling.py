"""What a step of distillation costs beside one of plain fine-tuning at the same depth.

    python analyses/engine_speed/distilling.py [--histories sequences.txt] [--backbone FOLDER]

All ways take the same batches in one process, in turn, and which begins moves on with each batch.
A step is forward, losses, backward, clipping and AdamW. "teacher in the step" runs the teacher for
each batch, as SLMRec's code does, but with a shared prompt as everything here; "in the padded
layout" does so in SLMRec's own layout, 99 slots a user. A ratio is that of the sums over a round's
batches; medians over rounds.
"""

from __future__ import annotations

import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import CATALOGUE, D_ITEM, PROMPT, Padded, _backbone, _options, _users
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from depthprobe.data.batches import length_buckets
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import tap_blocks
from depthprobe.study import Distillation, Recipe
from depthprobe.training.distillation import Distiller, feature_spec, group_ends, state_loss
from depthprobe.training.features import CachedTeacher, OnlineTeacher, write_features
from depthprobe.training.losses import catalogue_loss
from depthprobe.training.objectives import Batch, NextItem, make_batch

CPU = torch.device("cpu")
SLMREC = Distillation()
OTHERS = {
    "states of the last position": Distillation(positions="last"),
    "states, no L_ms": Distillation(supervision=0),
    "scores of all items": Distillation(cosine=0, norm=0, supervision=0, logits=1),
    "scores of 100 items": Distillation(cosine=0, norm=0, supervision=0, logits=1, top=100),
}


def main() -> None:
    options = _options()
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    backbone = _backbone(options.backbone)
    users = [user[:-1] for user in _users(options.histories, options.users)]
    teacher = _recommender(backbone).eval()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"teacher of {teacher.depth} blocks, {len(users)} users, batches of {options.batch}")
    print("| objective | blocks | what | s | of fine-tuning | range |\n|---|---|---|---|---|---|")
    for objective in ("every", "last"):
        recipe = Recipe(objective=objective, batch_size=options.batch)
        buckets = length_buckets([len(user) for user in users], options.batch, seed=0)
        batches = [make_batch(users, chosen, CPU, objective) for chosen in buckets]
        for depth in (1, 2, 4, 6):
            with tempfile.TemporaryDirectory() as folder:
                steps = _steps(backbone, teacher, users, depth, recipe, Path(folder))
                _race(steps, batches, options.rounds, f"| {objective} | {depth}")


def _recommender(backbone: nn.Module, depth: int | None = None) -> Recommender:
    torch.manual_seed(0)
    own, table = copy.deepcopy(backbone), torch.randn(CATALOGUE + 1, D_ITEM) * D_ITEM**-0.5
    if depth is not None:
        keep_blocks(own, range(depth))
    model = Recommender(own, table, range(3, 3 + PROMPT))
    model.token_embeddings.requires_grad_(False)
    return model


def _steps(
    backbone: nn.Module,
    teacher: Recommender,
    users: list[np.ndarray],
    depth: int,
    recipe: Recipe,
    folder: Path,
) -> dict[str, Callable[[Batch], None]]:
    """Each way of training a student of this depth; the first one is plain fine-tuning."""

    def student(losses: Distillation, name: str, *, online: bool = False) -> Distiller:
        wanted = feature_spec(losses, recipe, depth=depth, teacher_depth=teacher.depth)
        goal = teacher.item_matrix() if wanted.vectors else None
        if online:
            source = OnlineTeacher(teacher, wanted)
            return Distiller(_recommender(backbone, depth), losses, recipe, source, goal_items=goal)
        place = folder / name.replace(" ", "-")
        place.mkdir()
        write_features(teacher, users, wanted, folder=place, device=CPU)
        source = CachedTeacher(place, users, wanted)
        return Distiller(_recommender(backbone, depth), losses, recipe, source, goal_items=goal)

    ways: dict[str, nn.Module] = {
        "fine-tuning": NextItem(_recommender(backbone, depth), recipe),
        "SLMRec's losses": student(SLMREC, "slmrec"),
        "the same, teacher in the step": student(SLMREC, "online", online=True),
        **{name: student(losses, name) for name, losses in OTHERS.items()},
    }
    if recipe.objective == "last":
        ways["the same, in the padded layout"] = PaddedDistiller(
            _recommender(backbone, depth), teacher, recipe
        )
    return {name: _step(way.train()) for name, way in ways.items()}


class PaddedDistiller(nn.Module):
    """SLMRec's step: every slot of every user, student and teacher, and the same losses."""

    def __init__(self, student: Recommender, teacher: Recommender, recipe: Recipe) -> None:
        super().__init__()
        self.student, self.recipe = student, recipe
        self._padded, self._theirs = Padded(student), [Padded(teacher)]
        groups = min(SLMREC.groups, student.depth)
        self.ends, self.goals = group_ends(student.depth, groups), group_ends(teacher.depth, groups)
        self.adapters = nn.ModuleList(nn.Linear(student.width, D_ITEM) for _ in self.ends[:-1])

    def forward(self, batch: Batch) -> Tensor:
        """The same sum of losses as the distiller's."""
        (theirs,) = self._theirs
        with torch.no_grad(), tap_blocks(theirs.model.backbone) as tap:
            theirs.encode(batch.inputs, batch.lengths)
        goal = torch.stack([tap.states[end][:, -1] for end in self.goals])
        with tap_blocks(self.student.backbone) as tap:
            vectors = self._padded.encode(batch.inputs, batch.lengths)
        states = torch.stack([tap.states[end][:, -1] for end in self.ends])
        items, targets = self.student.item_matrix(), batch.last
        loss = catalogue_loss(vectors, items, targets, recipe=self.recipe)
        loss = loss + state_loss(states, goal, cosine=SLMREC.cosine, norm=SLMREC.norm)
        for adapter, state in zip(self.adapters, states, strict=False):
            part = catalogue_loss(adapter(state), items, targets, recipe=self.recipe)
            loss = loss + SLMREC.supervision * part
        return loss


def _step(objective: nn.Module) -> Callable[[Batch], None]:
    weights = [weight for weight in objective.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)

    def step(batch: Batch) -> None:
        objective(batch).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _race(
    steps: dict[str, Callable[[Batch], None]], batches: list[Batch], rounds: int, where: str
) -> None:
    for step in steps.values():
        step(batches[0])
    found: list[dict[str, float]] = []
    order = list(steps)
    for _ in range(rounds):
        seconds = dict.fromkeys(steps, 0.0)
        for place, batch in enumerate(batches):
            for name in order[place % len(order) :] + order[: place % len(order)]:
                began = time.perf_counter()
                steps[name](batch)
                seconds[name] += time.perf_counter() - began
        found.append(seconds)
    for name in steps:
        ratios = [seconds[name] / seconds["fine-tuning"] for seconds in found]
        middle, taken = statistics.median(ratios), statistics.median(s[name] for s in found)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"{where} | {name} | {taken:.2f} | {middle:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
