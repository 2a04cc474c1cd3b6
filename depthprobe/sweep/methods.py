"""The methods: one function each, one entry each in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from depthprobe.cost.parameters import count_parameters
from depthprobe.evaluation.evaluate import evaluate
from depthprobe.models.popularity import Popularity
from depthprobe.sweep.cache import result_file
from depthprobe.sweep.context import Context
from depthprobe.sweep.plan import Task
from depthprobe.sweep.probes import PROBES
from depthprobe.sweep.results import Result, Scores
from depthprobe.sweep.variants import distill, elastic, fine_tuned, heal
from depthprobe.training.loop import fit
from depthprobe.training.objectives import NextItem


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
    model, recipe = context.new_sasrec(trial.seed), context.study.sasrec.recipe
    objective = NextItem(model, recipe)
    with context.tracked(trial) as track:
        done = fit(
            objective,
            context.windows,
            recipe=recipe,
            validate=lambda: context.validate(model),
            seed=trial.seed,
            device=context.device,
            log=context.log,
            track=track,
            checkpoint=context.checkpoint(trial),
            result=result_file(context, trial, objective, recipe),
        )
    ranks = evaluate(model, context.test, device=context.device)
    yield Result(trial, ranks, count_parameters(model), fit=done, model=model)


# by the method before the colon
METHODS: dict[str, Callable[[Context, Task], Iterator[Result | Scores]]] = {
    "popularity": popularity,
    "sasrec": sasrec,
    "full": fine_tuned,
    **PROBES,
    "finetune": fine_tuned,
    "heal": heal,
    "distill": distill,
    "elastic": elastic,
    "random-init": fine_tuned,
    "random-selection": fine_tuned,
}
