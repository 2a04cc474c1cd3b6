"""Measured time, memory and energy of every depth, on models with random weights of its shape.

The depths share their weights while they are timed in turn, so that no more than the whole model
has to fit; memory is measured afterwards with each depth alone, from the deepest on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from depthprobe.cost.actions import (
    Action,
    answering,
    encoding,
    random_backbone,
    recommender,
    scoring,
    shared_copy,
    stepping,
)
from depthprobe.cost.energy import joules
from depthprobe.cost.memory import peak_memory
from depthprobe.cost.timing import interleaved_for, seconds
from depthprobe.cost.workload import Workload
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender

# what is timed at each depth, and what does not depend on it; "one": a batch of one user
PHASES = ("train_step", "encode", "answer", "encode_one", "answer_one")
COMMON = ("score", "score_one")
TRIES = 3  # of a batch size, of which the best counts


@dataclass(frozen=True)
class Measured:
    """Raw values: seconds by ``PHASE:DEPTH`` or common phase, bytes and joules by depth."""

    batch: int
    seconds: dict[str, list[float]]
    memory: dict[int, dict[str, float]]
    energy: dict[int, dict[str, float]]


def measure(
    config: PreTrainedConfig,
    depths: Sequence[int],
    workload: Workload,
    batch: int,
    device: torch.device,
) -> Measured:
    """Measure every depth for about ``workload.seconds``, memory and energy apart.

    Args:
        batch: users in a batch.
    """
    backbone = random_backbone(config, workload, device)
    times = interleaved_for(
        _actions(backbone, depths, workload, batch), workload.seconds, device=device
    )
    memory, energy = {}, {}
    for depth in sorted(depths, reverse=True):
        keep_blocks(backbone, range(depth))
        memory[depth], energy[depth] = _alone(backbone, workload, batch, device)
    return Measured(batch, times, memory, energy)


def measured_rate(
    config: PreTrainedConfig, workload: Workload, device: torch.device
) -> Callable[[int], float]:
    """A function that tells users a second at a batch size, end to end, at the whole depth."""
    model = recommender(random_backbone(config, workload, device), workload).eval()

    def rate(batch: int) -> float:
        action = answering(model, workload, batch)
        action()
        return batch / min(seconds(action, device) for _ in range(TRIES))

    return rate


def _actions(
    backbone: Any, depths: Sequence[int], workload: Workload, batch: int
) -> dict[str, Action]:
    actions: dict[str, Action] = {}
    state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
    for depth in depths:
        served, trained = (_cut(backbone, depth, workload) for _ in range(2))
        served.eval()
        actions[f"train_step:{depth}"] = stepping(trained.train(), workload, batch, state=state)
        for size, mark in ((batch, ""), (1, "_one")):
            actions[f"encode{mark}:{depth}"] = encoding(served, workload, size)
            actions[f"answer{mark}:{depth}"] = answering(served, workload, size)
    actions |= {"score": scoring(served, batch), "score_one": scoring(served, 1)}
    return actions


def _cut(backbone: Any, depth: int, workload: Workload) -> Recommender:
    return recommender(keep_blocks(shared_copy(backbone), range(depth)), workload)


def _alone(
    backbone: Any, workload: Workload, batch: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Peak memory and energy of an answer and of a step, with one depth alone on the device."""
    memory: dict[str, float] = {}
    energy: dict[str, float] = {}
    model = recommender(shared_copy(backbone), workload)
    made = (("serving", False, answering), ("training", True, stepping))
    for what, training, make in made:
        action = make(model.train(training), workload, batch)
        action()  # a first step makes AdamW's moments, which are part of every other
        peaks = peak_memory(action, device)
        memory |= {f"{what}_{kind}_bytes": value for kind, value in peaks.items()}
        drawn = joules(action, device)
        energy[f"{what}_joules_per_user"] = float("nan") if drawn is None else drawn / batch
        del action
    return memory, energy
