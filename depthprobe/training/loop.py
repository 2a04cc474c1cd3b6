"""One training loop for everything that is trained, on accelerate, in one process or several.

AdamW, cosine schedule with warm-up, gradient clipping, early stopping on validation NDCG@10, best
weights kept. A loss that is not a number stops the training and names the step. What is random at
a step depends on the seed, the step and the process alone, so a training that was killed goes on
from its checkpoint to the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.data.batches import length_buckets
from depthprobe.study import Recipe
from depthprobe.training.checkpoint import (
    Checkpoint,
    Fit,
    Progress,
    identity,
    restore_moments,
    restore_weights,
)
from depthprobe.training.distributed import Trained, spread, start, whole
from depthprobe.training.steps import DivergedError, Pace, Watch, within_memory
from depthprobe.training.tracking import Track, nobody

__all__ = ["DivergedError", "Fit", "fit"]

TOLD = 50  # steps whose mean loss is tracked together


def fit(
    objective: nn.Module,
    windows: list[np.ndarray],
    *,
    recipe: Recipe,
    validate: Callable[[], float],
    seed: int,
    device: torch.device,
    log: Callable[[str], None] = lambda line: None,
    track: Track = nobody,
    checkpoint: Path | None = None,
    result: Path | None = None,
    every: float = 60.0,
) -> Fit:
    """Train in place and leave the best weights there, in eval mode.

    Under ``accelerate launch`` every process calls this with the same arguments. A step then takes
    ``batch_size`` windows a process, and equals a step of one process on all of them.

    Args:
        objective: the model with its loss: batches in, the mean over their targets out.
        windows: one array of item ids a user, at least two items each.
        validate: the score to maximise, called after each epoch with the objective in eval mode;
            in every process, and the first one's score counts.
        seed: decides batch order and dropout.
        log: is told of each epoch, in the first process.
        track: is told, there too, the loss and the score of each epoch, and the mean loss and the
            learning rate of every so many steps.
        checkpoint: a file to go on from if it exists, written at most once in ``every`` seconds.
            It stays when the training ends, as one that has ended, until the caller deletes it:
            so nothing is lost if the process dies before its result is saved.
        result: a file of the result. If it holds that of an equal training, that is taken and
            nothing is trained, else it is written in the end. It must be named by what decides the
            result: the checks here know neither the first weights nor the settings of the loss.

    Raises:
        DivergedError: if the loss or its gradient is not finite; the message names the step, and
            the weights are those before it.
        ValueError: if the checkpoint is of another training.
        BadInput: for a way of sharding that would train wrongly.
    """
    sizes = np.array([len(window) for window in windows])
    if not len(windows) or sizes.min() < 2:
        raise ValueError("every training window needs at least two items")
    began = time.perf_counter()
    accelerator = start(recipe, device)
    processes = int(accelerator.num_processes)
    say = log if accelerator.is_main_process else lambda line: None
    tell = track if accelerator.is_main_process else nobody
    progress = Progress(Fit(processes=processes, parts=recipe.accumulation))
    best: dict[str, Tensor] = {}
    origin = identity(objective, windows, recipe=recipe, seed=seed, processes=processes)
    store, kept = (
        None if path is None else Checkpoint(path, origin, every=every)
        for path in (checkpoint, result)
    )
    saved = None if kept is None else kept.result()
    if reused := saved is not None:
        saved.progress.fit.reused = True
        say("an equal training has ended before: its result is taken")
    elif store is not None and (saved := store.read()) is not None:
        saved.progress.fit.resumed_at.append(saved.progress.fit.steps)
        say(f"going on from step {saved.progress.fit.steps}")
    if saved is not None:
        progress, best = saved.progress, saved.part("best")
        restore_weights(objective, saved.part("weights"))
    done, before = progress.fit, progress.fit.seconds
    trained = spread(accelerator, objective, recipe)
    trained.check_together(done.steps)
    if saved is not None:
        restore_moments(trained, saved)

    def save() -> None:
        done.seconds = before + time.perf_counter() - began
        if store is not None:
            store.write(trained, progress, best)

    pace = Pace(say, done.steps)
    with _compiled(trained.inner, recipe.compile):
        while not progress.ended:
            _train_epoch(
                trained,
                windows,
                progress,
                recipe,
                seed=seed,
                store=store,
                save=save,
                pace=pace,
                tell=tell,
            )
            trained.publish()
            objective.eval()
            with torch.compiler.set_stance("force_eager"):  # lengths of all kinds, once an epoch
                score = trained.agree(validate())
            progress.end_epoch(score)
            loss = done.losses[-1]
            say(f"epoch {done.epochs}/{recipe.epochs}  loss {loss:.4f}  ndcg@10 {score:.4f}")
            tell(done.steps, {"epoch": done.epochs, "loss": loss, "ndcg@10": score})
            if done.best_epoch == done.epochs:
                best = _on_cpu(objective)
            waited = done.epochs - done.best_epoch
            progress.ended = done.epochs == recipe.epochs or waited >= recipe.patience
    restore_weights(objective, best)
    objective.eval()
    if reused:
        return done
    if store is not None and store.is_due():
        save()
    done.seconds = before + time.perf_counter() - began
    if kept is not None:
        try:
            kept.write(trained, progress, best)
        except OSError as error:  # others' gain is no reason to lose this training
            say(f"its result is not kept for others: {error}")
    return done


def _train_epoch(
    trained: Trained,
    windows: list[np.ndarray],
    progress: Progress,
    recipe: Recipe,
    *,
    seed: int,
    store: Checkpoint | None,
    save: Callable[[], None],
    pace: Pace,
    tell: Track,
) -> None:
    """What is left of the running epoch, with a checkpoint where one is due."""
    fit, optimizer = progress.fit, trained.optimizer
    weights = list(trained.weights.values())
    size = recipe.batch_size * trained.processes
    sizes = [len(window) for window in windows]
    batches = length_buckets(sizes, size, seed=seed, epoch=fit.epochs)
    watch = Watch(trained, progress)
    done, lost = progress.done, progress.lost  # what has been told
    trained.called.train()
    for chosen in batches[progress.done :]:
        rate = recipe.learning_rate * _cosine(
            fit.steps, recipe.epochs * len(batches), recipe.warmup
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        drawn = _seed_of(seed, fit.steps, trained.rank)
        loss = within_memory(trained, windows, chosen, recipe, seed=drawn, fit=fit, say=pace.say)
        norm = whole(torch.nn.utils.clip_grad_norm_(weights, recipe.clip))
        fit.steps += 1
        progress.done += 1
        watch.add(loss, norm)
        due = False
        if watch.is_full or progress.done == len(batches):
            due = watch.look(store is not None and store.is_due())
            pace.tell(fit.steps, recipe.epochs * len(batches), progress.lost / progress.done)
            if progress.done - done >= TOLD:
                mean = (progress.lost - lost) / (progress.done - done)
                tell(fit.steps, {"step loss": mean, "learning rate": rate})
                done, lost = progress.done, progress.lost
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if due:
            save()


def _seed_of(seed: int, step: int, rank: int) -> int:
    """What a step's dropout and negatives are drawn from, in one of the processes."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def _on_cpu(objective: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained weights, where a GPU has better use for its memory."""
    return {
        name: weight.detach().to("cpu", copy=True)
        for name, weight in objective.named_parameters()
        if weight.requires_grad
    }


@contextmanager
def _compiled(objective: nn.Module, wanted: bool) -> Iterator[None]:
    """The models in an objective compiled inside, and as they were after.

    Not the loss: each batch has another number of targets, and it would be compiled for each. In
    place, so that the weights keep their names. A model whose states are tapped, as a student's
    are, runs uncompiled (see ``tap_blocks``).
    """
    models = [m for m in objective.children() if not isinstance(m, nn.ModuleList)]
    if not wanted:
        yield
        return
    try:
        for model in models:
            model.compile(dynamic=True)  # a batch is as long as its longest history
        yield
    finally:
        for model in models:
            model._compiled_call_impl = None
        torch.compiler.reset()  # its limit of recompilations holds for all trainings of a process


def _cosine(step: int, total: int, warmup: float) -> float:
    """Share of the learning rate: linear up over the warm-up, then half a cosine down to 0."""
    rising = max(1.0, warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    return float(0.5 * (1 + np.cos(np.pi * min(1.0, (step - rising) / max(1.0, total - rising)))))
