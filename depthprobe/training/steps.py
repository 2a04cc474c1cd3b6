"""A step of training: the gradients of a batch, and a watch over losses that are no numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from depthprobe.study import Recipe
from depthprobe.training.checkpoint import Fit, Progress
from depthprobe.training.distributed import Trained, share
from depthprobe.training.objectives import asked, make_batch

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
    say: Callable[[str], None],
) -> Tensor:
    """As :func:`gradients`; in twice as many parts, from then on, where memory runs out.

    A step that ran out has changed no weights, so it is taken again, with the same random numbers.
    Of several processes one would go on alone: there it is an error as any other.

    Args:
        seed: of what is random in the step.
        fit: ``parts`` is how many parts a batch is computed in, and grows.
        say: is told.
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
        say(f"out of memory at step {fit.steps + 1}: batches are computed in {fit.parts} parts now")


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
        say: takes a line.
        begun: steps that were done before this process began.
        every: seconds between two lines, at least.
    """

    def __init__(self, say: Callable[[str], None], begun: int, *, every: float = 10.0) -> None:
        self.say, self._begun, self._every = say, begun, every
        self._start = self._told = time.perf_counter()

    def tell(self, steps: int, total: int, loss: float) -> None:
        """After so many steps, of at most ``total``; ``loss``: the running epoch's mean."""
        now = time.perf_counter()
        if now - self._told < self._every:
            return
        self._told = now
        left = (now - self._start) / (steps - self._begun) * (total - steps)
        self.say(f"step {steps}/{total}  loss {loss:.4f}  at most {left:.0f} s left")


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
