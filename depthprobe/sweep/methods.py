"""The methods: one function each, one entry each in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from depthprobe.cost.parameters import count_parameters, flops_per_user
from depthprobe.evaluation.evaluate import Encoder, evaluate
from depthprobe.files import complete_file
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.popularity import Popularity
from depthprobe.models.recommender import Recommender
from depthprobe.study import parse_layers
from depthprobe.sweep.context import STATES, Context
from depthprobe.sweep.plan import Task, Trial, whole_trial
from depthprobe.sweep.probes import PROBES
from depthprobe.sweep.results import Result, Scores
from depthprobe.training.distillation import (
    Distiller,
    TeacherStates,
    group_ends,
    teacher_states,
)
from depthprobe.training.loop import fit
from depthprobe.training.objectives import NextItem, asked


def popularity(context: Context, task: Task) -> Iterator[Result]:
    """Items by how often the training parts hold them."""
    split, sequences = context.split, context.sequences
    users = range(sequences.n_users)
    training = np.concatenate([split.train_history(user) for user in users])
    model = Popularity(training, sequences.n_items).to(context.device)
    ranks = evaluate(model, context.test, device=context.device)
    yield Result(task.trials[0], ranks, count_parameters(model))


def sasrec(context: Context, task: Task) -> Iterator[Result]:
    """The non-LLM baseline; its item embeddings are the recommenders' item table by default."""
    (trial,) = task.trials
    model = context.new_sasrec(trial.seed)
    recipe = context.study.sasrec.recipe
    done = fit(
        NextItem(model, recipe),
        context.windows,
        recipe=recipe,
        validate=lambda: context.validate(model),
        seed=trial.seed,
        device=context.device,
        log=context.log,
        checkpoint=context.checkpoint(trial),
    )
    ranks = evaluate(model, context.test, device=context.device)
    yield Result(trial, ranks, count_parameters(model), fit=done, model=model)


def fine_tuned(context: Context, task: Task) -> Iterator[Result]:
    """The teacher, a variant cut from the pretrained backbone, or one without pretraining."""
    (trial,) = task.trials
    yield _train(context, trial, context.new_recommender(trial))


def heal(context: Context, task: Task) -> Iterator[Result]:
    """Cut out of the trained teacher, then fine-tuned with the same recipe."""
    (trial,) = task.trials
    model = context.trained(whole_trial("full", trial.seed, trial.blocks))
    keep_blocks(model.backbone, trial.kept)
    yield _train(context, trial, model)


def distill(context: Context, task: Task) -> Iterator[Result]:
    """A variant trained to follow the teacher's states (SLMRec)."""
    (trial,) = task.trials
    states = _teacher_states(context, trial)
    student = context.new_recommender(trial)
    torch.manual_seed(trial.seed)
    study = context.study
    distiller = Distiller(student, study.distillation, study.recipe, states).to(context.device)
    yield _train(context, trial, student, objective=distiller)


METHODS: dict[str, Callable[[Context, Task], Iterator[Result | Scores]]] = {
    "popularity": popularity,
    "sasrec": sasrec,
    "full": fine_tuned,
    **PROBES,
    "finetune": fine_tuned,
    "heal": heal,
    "distill": distill,
    "random-init": fine_tuned,
}


def _train(
    context: Context,
    trial: Trial,
    model: Recommender,
    *,
    objective: nn.Module | None = None,
) -> Result:
    """Train a recommender on the next item, or on an objective that holds it."""
    encoder, recipe = _SharedPrompt(model), context.study.recipe
    done = fit(
        objective or NextItem(model, recipe),
        context.windows,
        recipe=recipe,
        validate=lambda: context.validate(encoder.refresh()),
        seed=trial.seed,
        device=context.device,
        log=context.log,
        checkpoint=context.checkpoint(trial),
    )
    ranks = evaluate(encoder.refresh(), context.test, device=context.device)
    length = int(np.median([len(history) for history in context.test.histories]))
    flops = flops_per_user(model, length)
    return Result(trial, ranks, count_parameters(model), flops=flops, fit=done, model=model)


class _SharedPrompt(Encoder):
    """A recommender whose prompt is run once for a whole evaluation."""

    def __init__(self, model: Recommender) -> None:
        self._model = model
        self._prompt: Cache | None = None

    def refresh(self) -> _SharedPrompt:
        """Run the prompt at the present weights."""
        with torch.inference_mode():
            self._prompt = self._model.prepare_prompt()
        return self

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """(B, T), (B,) -> (B, d_item)."""
        return self._model.encode(histories, lengths, self._prompt)

    def item_matrix(self) -> Tensor:
        """(I + 1, d_item)."""
        return self._model.item_matrix()


def _teacher_states(context: Context, trial: Trial) -> TeacherStates:
    """The teacher's states for students of every depth asked for, computed by whoever is first."""
    study = context.study
    depths = [d for d in parse_layers(study.layers, trial.blocks) if d < trial.blocks]
    groups = {min(study.distillation.groups, depth) for depth in depths}
    ends = tuple(sorted({end for g in groups for end in group_ends(trial.blocks, g)}))
    windows = context.windows
    path = context.shared / f"{STATES}-s{trial.seed}.npy"
    if not path.exists():
        teacher = context.teacher(trial.seed, trial.blocks)
        with complete_file(path) as temporary:
            teacher_states(
                teacher,
                windows,
                ends=ends,
                objective=study.recipe.objective,
                path=temporary,
                device=context.device,
            )
    counts = asked(windows, study.recipe.objective)
    return TeacherStates(np.load(path, mmap_mode="r"), counts, ends)
