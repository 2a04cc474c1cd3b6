"""A step of training: the gradients of a batch, and a watch over losses that are no numbers."""

from __future__ import annotations

import logging
import math
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
from depthprobe.training.distributed import Trained, share, spread, start, whole
from depthprobe.training.objectives import asked, make_batch
from depthprobe.training.tracking import Track, nobody

logger = logging.getLogger(__name__)

# steps whose losses are read together on a GPU, which stands still while it is read
TOGETHER = 16


class DivergedError(RuntimeError):
    """The loss or its gradient is not a finite number."""


def within_memory(
    trained: Trained,
    windows: list[np.ndarray],
    chosen: np.ndarray,
    recipe: Recipe,
    *,
    seed: int,
    fit: Fit,
) -> Tensor:
    """As :func:`gradients`; in twice as many parts, from then on, where memory runs out.

    A step that ran out has changed no weights, so it is taken again, with the same random numbers.
    Of several processes one would go on alone: there it is an error as any other.

    Args:
        seed: of what is random in the step.
        fit: ``parts`` is how many parts a batch is computed in, and grows.
    """
    while True:
        torch.manual_seed(seed)
        try:
            return gradients(trained, windows, chosen, recipe, parts=fit.parts)
        except torch.OutOfMemoryError:
            if trained.processes > 1 or fit.parts >= len(chosen):
                raise
        # after the handler: the error's traceback holds on to what did not fit
        trained.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        fit.parts = min(2 * fit.parts, len(chosen))
        logger.warning(
            "out of memory at step %d: batches are computed in %d parts now",
            fit.steps + 1,
            fit.parts,
        )


def gradients(
    trained: Trained, windows: list[np.ndarray], chosen: np.ndarray, recipe: Recipe, *, parts: int
) -> Tensor:
    """Leave the gradients of a batch's loss; returns this process's part of the loss, a scalar.

    The batch is the same in all processes; each computes its share of it, in parts. A mean loss
    counts by how many of the batch's targets it is a mean of, so the gradients don't depend on how
    the batch is divided. DDP and FSDP average over the processes, which is undone.
    """
    own = share(chosen, trained.rank, trained.processes)
    total = asked([windows[index] for index in chosen], recipe.objective).sum()
    counts = len(own) > 0
    if not counts:  # nothing to do, but the others wait for gradients of this process too
        own = chosen[:1]
    pieces = np.array_split(own, min(parts, len(own)))
    losses, draw = [], _draw(chosen)
    for place, part in enumerate(pieces, start=1):
        batch = make_batch(windows, part, trained.accelerator.device, recipe.objective, draw=draw)
        fraction = counts * batch.count / total
        with trained.apart(place < len(pieces)):
            with trained.accelerator.autocast():
                loss = trained.called(batch)
            trained.accelerator.backward(loss * (fraction * trained.processes))
        losses.append(loss.detach() * fraction)
    return torch.stack(losses).sum()


def _draw(chosen: np.ndarray) -> int:
    """A number that is the same in all processes and parts of a step: they know its windows."""
    return int(np.random.SeedSequence(chosen.tolist()).generate_state(1)[0])


class Pace:
    """Says from time to time where a training is, and how long it may still take.

    Args:
        begun: steps that were done before this process began.
        every: seconds between two lines, at least.
    """

    def __init__(self, begun: int, *, every: float = 10.0) -> None:
        self._begun, self._every = begun, every
        self._start = self._told = time.perf_counter()

    def tell(self, steps: int, total: int, loss: float) -> None:
        """After so many steps, of at most ``total``; ``loss``: the running epoch's mean."""
        now = time.perf_counter()
        if now - self._told < self._every:
            return
        self._told = now
        left = (now - self._start) / (steps - self._begun) * (total - steps)
        logger.info("step %d/%d  loss %.4f  at most %.0f s left", steps, total, loss, left)


class Watch:
    """Looks for steps that are not finite: at each before its update, or at some together.

    A look makes a GPU wait for the host, and processes for each other. Between looks the device
    itself lets no update through from the first bad step on, by the way that loss scaling skips
    one; so the weights are those before that step when the look names it.
    """

    def __init__(self, trained: Trained, progress: Progress) -> None:
        self.trained, self.progress = trained, progress
        # shards know no such way, nor does AdamW but in its fused form
        alike = trained.inner is trained.objective
        on_gpu = trained.accelerator.device.type == "cuda"
        self.together = TOGETHER if alike and on_gpu else 1
        self._unseen: list[Tensor] = []  # (2,) a step: its loss, its gradient's norm
        self._bad: Tensor | None = None

    @property
    def is_full(self) -> bool:
        """Whether it is time to look."""
        return len(self._unseen) >= self.together

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Take a step's loss and the norm of its gradient, before its update."""
        numbers = torch.stack([loss, norm.to(loss.dtype)])
        self._unseen.append(numbers)
        if self.together > 1:
            bad = (~torch.isfinite(numbers).all()).float()
            self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
            self.trained.optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def look(self, due: bool) -> bool:
        """Add the losses to the epoch's; returns what the first process passed as ``due``.

        Raises:
            DivergedError: in all processes, for the first step that was not finite in one of them.
        """
        clock = self._unseen[0].new_tensor([float(due and self.trained.rank == 0), 0.0])
        table = self.trained.total(torch.stack([*self._unseen, clock]))
        *steps, (told, _) = table.tolist()
        for step, (loss, norm) in enumerate(steps, start=self.progress.fit.steps + 1 - len(steps)):
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} at step {step}")
            if not math.isfinite(norm):
                raise DivergedError(f"the loss is {loss}, its gradient {norm}, at step {step}")
            self.progress.lost += loss
        self._unseen.clear()
        return bool(told)


# One training loop for everything that is trained, on accelerate, in one process or several.
#
# AdamW, cosine schedule with warm-up, gradient clipping, early stopping on validation NDCG@10, best
# weights kept. A loss that is not a number stops the training and names the step. What is random at
# a step depends on the seed, the step and the process alone, so a training that was killed goes on
# from its checkpoint to the same numbers.

TOLD = 50  # steps whose mean loss is tracked together


def fit(
    objective: nn.Module,
    windows: list[np.ndarray],
    *,
    recipe: Recipe,
    validate: Callable[[], float],
    seed: int,
    device: torch.device,
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
        track: is told, in the first process, the loss and the score of each epoch, and the mean
            loss and the learning rate of every so many steps.
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
        logger.info("an equal training has ended before: its result is reused")
    elif store is not None and (saved := store.read()) is not None:
        saved.progress.fit.resumed_at.append(saved.progress.fit.steps)
        logger.info("resumed at step %d", saved.progress.fit.steps)
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

    pace = Pace(done.steps)
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
            logger.info(
                "epoch %d/%d  loss %.4f  ndcg@10 %.4f", done.epochs, recipe.epochs, loss, score
            )
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
            logger.warning("the result is not kept for other runs: %s", error)
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
        loss = within_memory(trained, windows, chosen, recipe, seed=drawn, fit=fit)
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
