"""The timing rig: seconds of each action at each depth, on one model in memory.

A sweep, its ``--dry-run`` and ``depthprobe cost`` all measure with it:

- ``encode:K``: a batch of users to vectors, with K blocks; the prompt has run before.
- ``latency:K``: one user from history to the best ten items.
- ``train:K``: a training step, its prompt included; other steps by the name of their method.
- ``score``: the best ten of the catalogue for a batch of user vectors; no depth changes it.

Each depth is a separate model around the same weights, and one AdamW serves all of them, so only
the full model has to fit in memory. Depths take turns (A B A B), so that a machine that slows down
slows all of them: round i of one pairs with round i of another.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from scipy.stats import binom
from torch import Tensor, nn

from depthprobe.cost.size import peak_memory
from depthprobe.models.recommender import Recommender, score

logger = logging.getLogger(__name__)

TOP = 10  # items of an answer
PATIENCE = 2  # an action is left out if one call is expected to take this many budgets
LEAST = 5.0  # seconds that a call may always take
SMALL = 8  # windows of a step, which are not reduced further to save time
REPORT = 10.0  # seconds between lines of the log


class Action(NamedTuple):
    """Something to time.

    ``work`` is blocks x positions x passes: a call's time is predicted from smaller ones by its
    work. 0: it is always timed.
    """

    call: Callable[[], object]
    work: float = 0.0


class TooLongError(Exception):
    """A call would take longer than it may, by this factor."""

    def __init__(self, seconds: float, times: float) -> None:
        super().__init__(f"a call would take about {seconds:.0f} s")
        self.times = times


class Timing(NamedTuple):
    """What the rig measured."""

    seconds: dict[str, list[float]]  # seconds of every round, by action
    warmup: int  # rounds that were not counted
    rounds: int
    left_out: tuple[str, ...]  # actions that would have taken too long
    batch: int = 0  # of the training steps, possibly smaller than at the beginning
    peak: Mapping[str, float] = MappingProxyType({})  # bytes of memory by kind


def measure(
    make: Callable[[int], Mapping[str, Action]],
    *,
    batch: int,
    seconds: float,
    warmup: int,
    rounds: int,
    device: torch.device,
) -> Timing:
    """Time actions in turn for about ``seconds`` seconds; every action is called at least once.

    If memory runs out, or a call would take a quarter of the budget, the training steps get a
    smaller batch, and the measurement begins again.

    Args:
        make: returns the actions for a number of windows per step.
        seconds: the budget, of all attempts. One round is always taken, so it may be exceeded.
        warmup: most rounds that do not count; the first counts if there is no time for another,
            but no action's first call does.
        rounds: most rounds that count.
    """
    began = time.perf_counter()
    while True:
        try:
            with peak_memory(device) as peak:
                longest = max(LEAST, seconds / 4) if batch > 2 * SMALL else math.inf
                timing = _rounds(make(batch), began, seconds, warmup, rounds, device, longest)
            return timing._replace(batch=batch, peak=peak)
        except TooLongError as error:  # half of the estimate, since the next one may be worse
            batch, why = max(SMALL, int(batch / error.times / 2)), str(error)
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if batch == 1 or not (out_of_memory or should_reduce_batch_size(error)):
                raise
            batch, why = batch // 2, "out of memory"
        # after the handlers: the error's traceback keeps tensors alive
        logger.warning("timing: %s; trying steps of %d windows", why, batch)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _rounds(
    actions: Mapping[str, Action],
    began: float,
    budget: float,
    warmup: int,
    rounds: int,
    device: torch.device,
    longest: float,
) -> Timing:
    logger.info("timing %d actions for about %.0f s", len(actions), budget)
    reported = time.perf_counter()
    times: dict[str, list[float]] = {}
    left_out: list[str] = []
    pace = math.inf  # seconds per unit of work, the lowest so far
    # the first round shows how long a round takes; its smallest actions come first
    for name, action in sorted(actions.items(), key=lambda each: each[1].work):
        expected = pace * action.work if action.work and pace < math.inf else 0.0
        if expected > longest:
            worst = pace * max(each.work for each in actions.values())
            raise TooLongError(worst, worst / longest)
        if expected > max(LEAST, PATIENCE * budget):
            left_out.append(name)
            logger.warning("timing: %s left out, a call would take about %.0f s", name, expected)
            continue
        seconds_of(action.call, device)  # loads libraries, makes gradients and moments: not counted
        took = seconds_of(action.call, device)
        if action.work:
            pace = min(pace, took / action.work)
        times[name] = [took]
        reported = _report(f"first round, {name}", began, reported)
    a_round = sum(values[0] for values in times.values())
    left = budget - (time.perf_counter() - began)
    more = max(0, int(min(warmup + rounds - 1, left / a_round))) if a_round else 0
    # the first rounds; fewer if there is time for few
    skipped = warmup if more == warmup + rounds - 1 else min(warmup, more // 4 + (more > 0))
    for done in range(more):
        for name in times:
            times[name].append(seconds_of(actions[name].call, device))
        reported = _report(f"round {done + 2} of {more + 1}", began, reported)
        if time.perf_counter() - began > budget and done + 2 > skipped:
            break
    ordered = {name: times[name][skipped:] for name in actions if name in times}
    counted = max((len(values) for values in ordered.values()), default=0)
    return Timing(ordered, skipped, counted, tuple(left_out))


def _report(what: str, began: float, reported: float) -> float:
    """Log the progress if the last line is some seconds old; returns the time of the last line."""
    now = time.perf_counter()
    if now - reported < REPORT:
        return reported
    logger.info("timing: %s, %.0f s so far", what, now - began)
    return now


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including all of its work on the device."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    wait = torch.mps.synchronize if device.type == "mps" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


# --- actions ---------------------------------------------------------------------------------


def encode_actions(
    models: Mapping[str, Any], histories: Tensor, lengths: Tensor, *, items: Tensor
) -> dict[str, Action]:
    """``encode``, ``latency`` of each model, and ``score``.

    Args:
        models: by the name in the actions: depths; ``sasrec``, which has no latency.
        histories: (B, T) item ids, right-padded.
        lengths: (B,).
        items: of the catalogue that ``score`` scores, (I + 1, d).
    """
    actions = {"score": score_action(items, len(histories))}
    for name, model in models.items():
        prompt = []  # it runs once, before
        if isinstance(model, Recommender):
            with torch.inference_mode():
                prompt = [model.eval().prepare_prompt()]
        encode = partial(_encode, model, prompt, histories, lengths)
        # other models do not tell how long a block takes
        work = 0
        if isinstance(model, Recommender):
            work = model.depth * len(histories) * max(model.positions([*histories.cpu().numpy()]))
        actions[f"encode:{name}"] = Action(encode, work)
        if isinstance(model, Recommender):
            # one user takes longer per unit of work, which would raise all predictions
            alone = partial(_encode, model, prompt, histories[:1], lengths[:1], answers=True)
            actions[f"latency:{name}"] = Action(alone)
    return actions


def score_action(items: Tensor, users: int) -> Action:
    """Find the best items of a catalogue (I + 1, d) for a batch of user vectors."""
    vectors = torch.randn(users, items.shape[1], device=items.device)
    return Action(lambda: _best(vectors, items))


@torch.inference_mode()
def _encode(
    model: Any, prompt: Sequence[Any], histories: Tensor, lengths: Tensor, *, answers: bool = False
) -> Tensor:
    """Users to vectors, (B, d), or to their best items."""
    vectors: Tensor = model.eval().encode(histories, lengths, *prompt)
    return _best(vectors, model.item_matrix()) if answers else vectors


@torch.inference_mode()
def _best(vectors: Tensor, items: Tensor) -> Tensor:
    return score(vectors, items).topk(min(TOP, len(items))).indices


def optimizer_of(*models: nn.Module) -> torch.optim.Optimizer:
    """AdamW over all trained weights; those without a gradient do not change."""
    weights = {id(p): p for model in models for p in model.parameters() if p.requires_grad}
    fused = next(iter(weights.values())).device.type in ("cpu", "cuda")
    # a step's cost does not depend on the rate; with this one weights stay finite
    return torch.optim.AdamW(weights.values(), lr=1e-6, fused=fused or None)


def step(
    losses: Sequence[Callable[[], Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    bfloat16: bool = False,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[], None]:
    """A training step: the losses of a batch's parts, backward, clipping, AdamW.

    The losses and their backward passes run inside the context that ``around`` makes.
    """
    weights: list[Tensor] = optimizer.param_groups[0]["params"]

    def call() -> None:
        kind = weights[0].device.type
        half = torch.autocast(kind, torch.bfloat16, enabled=bfloat16)  # casts weights once
        with around(), half:
            for loss in losses:
                value = loss()
                with torch.autocast(kind, enabled=False):
                    value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


# --- summaries and conditions ----------------------------------------------------------------


class Summary(NamedTuple):
    """Of n values: the median, its 95 % interval (NaN below 6 values), the 90th percentile."""

    p50: float
    p90: float
    low: float
    high: float
    n: int


def summarize(values: Sequence[float]) -> Summary:
    """Median, its interval and p90 of repeated measurements.

    The interval is the distribution-free one between two order statistics: the k-th value from
    below and from above, where k is the largest with ``P(Bin(n, 1/2) < k) <= 2.5 %``. It assumes
    independent rounds and no shape of their distribution, which for times is far from normal.
    """
    ordered, n = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    k = int(binom.ppf(0.025, n, 0.5))  # P(Bin < k) <= 2.5 % < P(Bin < k + 1)
    low, high = (ordered[k - 1], ordered[n - k]) if k else (math.nan, math.nan)
    p50, p90 = np.quantile(ordered, [0.5, 0.9])
    return Summary(float(p50), float(p90), float(low), float(high), n)


def times_faster(slow: Sequence[float], fast: Sequence[float]) -> Summary:
    """How many times faster one action is: the ratios within each round, summarized."""
    return summarize([a / b for a, b in zip(slow, fast, strict=True)])


def machine(device: torch.device) -> dict[str, Any]:
    """The conditions of a time: the device, its name, threads and versions.

    ``busy``: processes that wanted a core in the last minute, by core.
    """
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else processor_name(),
        "threads": torch.get_num_threads(),
        "busy": psutil.getloadavg()[0] / (os.cpu_count() or 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor_name() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
