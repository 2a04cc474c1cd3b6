"""The training loop: AdamW, cosine schedule with warm-up, gradient clipping, early stopping.

One loop trains everything, in one process or several, and keeps the weights with the best
validation score. Randomness at a step depends only on seed, step and process, so a killed training
continues from its checkpoint to the same numbers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.cost.size import release_memory
from depthprobe.data.batches import length_buckets
from depthprobe.models.recommender import one_prompt
from depthprobe.study import Recipe
from depthprobe.training.checkpoint import (
    Checkpoint,
    Fit,
    Progress,
    Weights,
    identity,
    put_aside,
)
from depthprobe.training.distributed import Engine
from depthprobe.training.objectives import count_targets, make_batch
from depthprobe.training.tracking import Track

logger = logging.getLogger(__name__)

# a batch with more padding (share of its real positions; positions) is computed in parts
PADDING, FEW = 0.1, 256
TOGETHER = 16  # steps between two reads of losses on a GPU, since it is idle during a read
TRACKED = 50  # steps whose mean loss is tracked together
LOGGED = 10.0  # seconds between two log lines about steps, at least


Windows = list[np.ndarray]


class DivergedError(RuntimeError):
    """The loss or its gradient is not a finite number."""


def _ignore(step: int, values: Mapping[str, float]) -> None:
    """Track nothing."""


def fit(
    objective: nn.Module,
    windows: Windows,
    *,
    recipe: Recipe,
    validate: Callable[[], float],
    seed: int,
    device: torch.device,
    positions: Sequence[int] | None = None,
    track: Track = _ignore,
    checkpoint: Path | None = None,
    result: Path | None = None,
    every: float = 60.0,
) -> Fit:
    """Train in place and leave the best weights there, in eval mode.

    Under ``accelerate launch`` every process calls this with the same arguments. A step then takes
    ``batch_size`` windows a process, and equals a step of one process on all of them.

    Args:
        objective: the model with its loss: takes a batch, returns the mean over its targets.
        windows: one array of item ids per user, at least two items each.
        validate: the score to maximise. It is called after each epoch, with the objective in eval
            mode, in every process; the first process's score counts.
        positions: of each window, if its items are texts.
        track: receives, in the first process, each epoch's loss and score, and at intervals the
            mean loss and the learning rate.
        checkpoint: a file to continue from if it exists, written at most once in ``every`` seconds.
            It stays when the training has ended, in case the process dies before the result is
            saved.
        result: a file of the result. It is read if it belongs to an equal training, else written.
            Its name must stand for what is not checked here: initial weights, settings of the loss.

    Raises:
        DivergedError: if the loss or its gradient is not finite; that step changed no weights.
    """
    began = time.perf_counter()
    engine = Engine(objective, recipe, device)
    origin = identity(objective, windows, recipe=recipe, seed=seed, processes=engine.processes)
    own, shared = Checkpoint(checkpoint, origin, every=every), Checkpoint(result, origin)
    progress = Progress(Fit(processes=engine.processes))
    best = Weights()
    reused = shared.result()
    if (saved := reused or own.read()) is not None:
        progress, best = saved.progress, saved.best
        if not progress.ended:
            engine.load(saved.engine)
            saved.engine.clear()  # the weights are copied
    done = progress.fit
    if (first := engine.agree(done.steps)) != done.steps:
        steps = f"{done.steps} and {first:g}"
        raise ValueError(f"processes begin at steps {steps}: all must see the same checkpoint")
    if reused is not None:
        done.reused = True
        logger.info("reusing the result of the same training from the cache")
    elif saved is not None:
        done.resumed_at.append(done.steps)
        logger.info("resumed at step %d", done.steps)
    if reused is None:
        done.threads.append(torch.get_num_threads())
    before = done.seconds

    def save(file: Checkpoint) -> None:
        done.seconds = before + time.perf_counter() - began
        release_memory()  # return freed memory to the system before the best weights are copied
        file.write(engine, progress, best)
        best.leave_memory()

    monitor = LossMonitor(engine, progress, track if engine.rank == 0 else _ignore)
    with _compiled(engine.inner) if recipe.compile else nullcontext():
        while not progress.ended:
            for _ in _train_epoch(engine, windows, progress, monitor, seed, own.is_due, positions):
                save(own)
            engine.publish()
            objective.eval()
            # validation has lengths of all kinds, once per epoch: compiling does not pay
            with torch.compiler.set_stance("force_eager"), engine.autocast():
                score = engine.agree(validate())
            progress.end_epoch(score)
            monitor.log_epoch()
            release_memory()
            if done.best_epoch == done.epochs:
                best = put_aside(
                    trained(objective), None if checkpoint is None else checkpoint.parent
                )
            waited = done.epochs - done.best_epoch
            progress.ended = done.epochs == recipe.epochs or waited >= recipe.patience
    weights = trained(objective)
    for name, value in best.items():
        weights[name].copy_(value)
    objective.eval()
    if reused is None:
        if own.is_due():
            save(own)
        try:
            save(shared)
        except OSError as error:  # a cache that fails must not lose this training
            logger.warning("the result was not written to the cache: %s", error)
    return done


def _train_epoch(
    engine: Engine,
    windows: Windows,
    progress: Progress,
    monitor: LossMonitor,
    seed: int,
    due: Callable[[], bool],
    positions: Sequence[int] | None,
) -> Iterator[None]:
    """Take the epoch's remaining steps; yields after a step if a checkpoint is due."""
    recipe, fit = engine.recipe, progress.fit
    size = recipe.batch_size * engine.processes
    lengths = positions or [len(window) for window in windows]
    most = recipe.positions_on(engine.device.type) * engine.processes
    batches = length_buckets(lengths, size, seed=seed, epoch=fit.epochs, pool=recipe.pool)
    total = recipe.epochs * len(batches)
    engine.called.train()
    for chosen in batches[progress.done :]:
        rate = recipe.rates[0] * _cosine(fit.steps, total, recipe.warmup)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        loss = None
        while loss is None:
            # for dropout and negatives: different in each step and process
            torch.manual_seed(_random_number((seed, fit.steps, engine.rank)))
            parts = parts_of(np.array([lengths[i] for i in chosen]), fit.parts, most)
            try:
                loss = _gradients(engine, windows, chosen, parts)
            except torch.OutOfMemoryError:
                # one process must not retry without the others
                if engine.processes > 1 or parts == len(chosen):
                    raise
            if loss is None:  # outside the handler, whose traceback keeps the tensors alive
                # the step has changed no weights, so repeat it
                engine.zero_grad()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                fit.parts = min(2 * parts, len(chosen))
                message = "out of memory at step %d: batches are computed in %d parts now"
                logger.warning(message, fit.steps + 1, fit.parts)
        norm = engine.clip(recipe.clip)
        fit.steps += 1
        progress.done += 1
        write = False
        if monitor.add(loss, norm) or progress.done == len(batches):
            write = monitor.read(due=due(), rate=rate, total=total)
        engine.step()
        if write:
            yield


def parts_of(lengths: np.ndarray, least: int, most: int) -> int:
    """How many parts to divide a batch into, (B,) lengths in ascending order.

    The fewest with little padding, from ``least`` to four times that; more if a part would exceed
    ``most`` positions. Parts change a step's cost, and only the last bits of its result.
    """
    for parts in (least, 2 * least, 4 * least):
        computed = sum(len(part) * part[-1] for part in np.array_split(lengths, parts) if len(part))
        if computed - lengths.sum() <= max(FEW, PADDING * lengths.sum()):
            break
    return min(max(parts, -(-len(lengths) * int(lengths[-1]) // most)), len(lengths))


def _gradients(engine: Engine, windows: Windows, chosen: np.ndarray, parts: int) -> Tensor:
    """Compute the gradients of a batch's loss; returns this process's share of the loss, a scalar.

    All processes get the same batch, and each computes a share of it, in parts. A part's mean loss
    is weighted by its number of targets, so the gradients don't depend on the division. DDP and
    FSDP average over the processes; the weights undo that.
    """
    objective = engine.recipe.objective
    total = count_targets([windows[index] for index in chosen], objective).sum()
    # every n-th window of a batch sorted by length: all processes get similar lengths
    own = chosen[engine.rank :: engine.processes]
    weight = float(len(own) > 0)
    own = own if weight else chosen[:1]  # the other processes wait for this one's gradients
    pieces = np.array_split(own, min(parts, len(own)))
    # from the step's windows, so the same in all its processes and parts
    losses, draw = [], _random_number(chosen.tolist())
    once = len(pieces) > 1 and engine.processes == 1 and not engine.recipe.compile
    # around all parts: the prompt runs once, and each weight is cast once
    with one_prompt(engine.inner) if once else nullcontext(), engine.autocast():
        for place, part in enumerate(pieces, start=1):
            batch = make_batch(windows, part, engine.device, objective, draw=draw)
            fraction = weight * batch.count / total
            with engine.no_sync() if place < len(pieces) else nullcontext():
                loss = engine.called(batch)
                with engine.autocast(enabled=False):
                    (loss * (fraction * engine.processes)).backward()
            losses.append(loss.detach() * fraction)
    return torch.stack(losses).sum()


class LossMonitor:
    """Checks that losses are finite; logs and tracks them.

    Reading a loss makes a GPU wait for the host, so a GPU's losses are read several steps at a
    time. Until then the device itself skips all updates from the first bad step on, with the
    mechanism of loss scaling. So the error names that step, and the weights are those before it.
    """

    def __init__(self, engine: Engine, progress: Progress, track: Track) -> None:
        self._engine, self._progress, self._track = engine, progress, track
        # only the fused AdamW can skip steps, and only without shards
        together = engine.inner is engine.objective and engine.device.type == "cuda"
        self.together = TOGETHER if together else 1
        self._unread: list[Tensor] = []  # (2,) a step: its loss, its gradient's norm
        self._bad: Tensor | None = None
        self._start = self._logged = time.perf_counter()
        self._begun = progress.fit.steps
        self._tracked = progress.done, progress.lost

    def add(self, loss: Tensor, norm: Tensor) -> bool:
        """Take a step's loss and gradient norm before its update; returns whether to read now."""
        numbers = torch.stack([loss, norm.to(loss.dtype)])
        self._unread.append(numbers)
        if self.together > 1:
            bad = (~torch.isfinite(numbers).all()).float()
            self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
            self._engine.optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        return len(self._unread) >= self.together

    def read(self, *, due: bool, rate: float, total: int) -> bool:
        """Read the losses, add them to the epoch's; returns the ``due`` of the first process.

        Raises:
            DivergedError: in all processes, for the first step that was not finite in one of them.
        """
        engine, progress = self._engine, self._progress
        last = self._unread[0].new_tensor([float(due and engine.rank == 0), 0.0])
        *steps, (due_in_first, _) = engine.total(torch.stack([*self._unread, last])).tolist()
        for step, (loss, norm) in enumerate(steps, start=progress.fit.steps + 1 - len(steps)):
            if not math.isfinite(loss + norm):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise DivergedError(f"the {what} is no finite number at step {step}")
            progress.lost += loss
        self._unread.clear()
        self._log_steps(rate, total)
        return bool(due_in_first)

    def _log_steps(self, rate: float, total: int) -> None:
        progress, now = self._progress, time.perf_counter()
        steps = progress.fit.steps
        if now - self._logged >= LOGGED:
            self._logged = now
            left = (now - self._start) / (steps - self._begun) * (total - steps)
            loss = progress.lost / progress.done
            logger.info("step %d/%d  loss %.4f  at most %.0f s left", steps, total, loss, left)
        done, lost = self._tracked
        if progress.done - done >= TRACKED:
            mean = (progress.lost - lost) / (progress.done - done)
            self._track(steps, {"step loss": mean, "learning rate": rate})
            self._tracked = progress.done, progress.lost

    def log_epoch(self) -> None:
        """Log and track the epoch that has ended."""
        fit, epochs = self._progress.fit, self._engine.recipe.epochs
        loss, score = fit.losses[-1], fit.scores[-1]
        logger.info("epoch %d/%d  loss %.4f  ndcg@10 %.4f", fit.epochs, epochs, loss, score)
        self._track(fit.steps, {"epoch": fit.epochs, "loss": loss, "ndcg@10": score})
        self._tracked = 0, 0.0


@contextmanager
def _compiled(objective: nn.Module) -> Iterator[None]:
    """Compile the models in an objective; afterwards they are as before.

    The loss is not compiled: it would be compiled again for each number of targets. The models are
    compiled in place, so that the weights keep their names. A model whose states are tapped, such
    as a student, runs uncompiled (see ``tap_blocks``).
    """
    models = [m for m in objective.children() if not isinstance(m, nn.ModuleList)]
    try:
        for model in models:  # dynamic: a batch is as long as its longest history
            model.forward = torch.compile(model.forward, dynamic=True)
        yield
    finally:
        for model in models:
            vars(model).pop("forward", None)  # the class's method again
        torch.compiler.reset()  # torch's limit of recompilations counts all trainings of a process


def trained(objective: nn.Module) -> dict[str, Tensor]:
    """The values of the trained weights by name; they share the weights' memory."""
    return {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}


def _cosine(step: int, total: int, warmup: float) -> float:
    """Share of the learning rate: linear up over the warm-up, then half a cosine down to 0."""
    rising = max(1.0, warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    return float(0.5 * (1 + np.cos(np.pi * min(1.0, (step - rising) / max(1.0, total - rising)))))


def _random_number(entropy: Sequence[int]) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
