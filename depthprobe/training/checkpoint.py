"""A training on disk, from which it goes on to the same numbers: one safetensors file.

The tensors are the trained weights, their best values so far and AdamW's moments; the file's header
holds the rest as JSON. Nothing in it can run code. No state of a random generator is needed: the
loop derives a step's random numbers from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from depthprobe.files import complete_file
from depthprobe.study import Recipe
from depthprobe.training.distributed import Trained, shard_like, whole

FORMAT = "depthprobe training 1"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
SHARE = 20  # of the time, one part at most goes into writing checkpoints


@dataclass
class Fit:
    """What a training left: where it stopped, how it went, how long it took."""

    epochs: int = 0
    steps: int = 0
    seconds: float = field(default=0.0, compare=False)
    best_epoch: int = 0
    best_score: float = float("nan")
    losses: list[float] = field(default_factory=list)  # mean a epoch
    scores: list[float] = field(default_factory=list)  # validation NDCG@10 a epoch
    processes: int = 1
    parts: int = field(default=1, compare=False)  # that a batch is computed in
    reused: bool = field(default=False, compare=False)  # the result of an equal training before
    resumed_at: list[int] = field(default_factory=list, compare=False)  # steps


@dataclass
class Progress:
    """Where a training stands: whole epochs are in the fit, this is the running one."""

    fit: Fit = field(default_factory=Fit)
    done: int = 0  # steps of the running epoch
    lost: float = 0.0  # the sum of their losses
    ended: bool = False  # nothing is left to train

    def end_epoch(self, score: float) -> None:
        """Close the running epoch with its validation score."""
        fit = self.fit
        fit.epochs += 1
        fit.losses.append(self.lost / self.done)
        fit.scores.append(score)
        if not score <= fit.best_score:  # also true for the first score
            fit.best_score, fit.best_epoch = score, fit.epochs
        self.done, self.lost = 0, 0.0


@dataclass(frozen=True)
class Saved:
    """What a checkpoint held."""

    progress: Progress
    tensors: Mapping[str, Tensor]  # "weights NAME", "best NAME", "exp_avg NAME", ...

    def part(self, kind: str) -> dict[str, Tensor]:
        """The tensors of one kind, by name."""
        start = f"{kind} "
        found = {name: value for name, value in self.tensors.items() if name.startswith(start)}
        return {name.removeprefix(start): value for name, value in found.items()}


def identity(
    objective: nn.Module,
    windows: list[np.ndarray],
    *,
    recipe: Recipe,
    seed: int,
    processes: int,
) -> dict[str, Any]:
    """All that decides a training's numbers and can be told from outside, for comparison.

    The weights that it begins with are not in it: they may differ in the last bit from one machine
    to the next.
    """
    shapes = [
        (name, str(weight.dtype), *weight.shape)
        for name, weight in objective.named_parameters()
        if weight.requires_grad
    ]
    return {
        "objective": type(objective).__name__,
        **{f"recipe.{name}": value for name, value in asdict(recipe).items()},
        "seed": seed,
        "processes": processes,
        "windows": windows_digest(windows),
        "weights": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
    }


def windows_digest(windows: list[np.ndarray]) -> str:
    """Hash of the training windows, in their order."""
    sizes = np.array([len(window) for window in windows], dtype=np.int64)
    found = hashlib.sha256(sizes.tobytes())
    found.update(np.concatenate(windows).astype(np.int64).tobytes())
    return found.hexdigest()[:16]


class Checkpoint:
    """Writes a training to a file from time to time."""

    def __init__(self, path: Path, origin: dict[str, Any], *, every: float) -> None:
        """Write at most once in ``every`` seconds, and seldom enough to cost little."""
        self.path, self.origin, self.every = path, origin, every
        self._took, self._last = 0.0, time.perf_counter()

    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.perf_counter() - self._last >= max(self.every, SHARE * self._took)

    def write(self, trained: Trained, progress: Progress, best: dict[str, Tensor]) -> None:
        """Write all that the rest of the training needs; every process must call it.

        A training that has ended needs its best weights alone.
        """
        began = time.perf_counter()
        tensors = {f"best {name}": value for name, value in best.items()}
        if not progress.ended:
            tensors |= {f"weights {name}": whole(w) for name, w in trained.weights.items()}
            for name, weight in trained.weights.items():
                state = trained.optimizer.state.get(weight, {})  # empty before its first gradient
                tensors |= {f"{kind} {name}": whole(value) for kind, value in state.items()}
        if trained.accelerator.is_main_process:
            # a copy where memory is shared, which safetensors refuses
            own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            header = {"format": FORMAT, "origin": self.origin, "progress": asdict(progress)}
            text = json.dumps(_strict(header), allow_nan=False)
            with complete_file(self.path) as temporary:
                save_file(own, temporary, metadata={"depthprobe": text})
        self._last = time.perf_counter()
        self._took = self._last - began

    def result(self) -> Saved | None:
        """What a training left in the file that has ended; None where there is no such thing."""
        try:
            saved = self.read()
        except ValueError:  # damaged, or of an older format: as good as none
            return None
        return saved if saved is not None and saved.progress.ended else None

    def read(self) -> Saved | None:
        """What the file holds; None where there is none.

        Raises:
            ValueError: if it is damaged, or of another training.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads(file.metadata()["depthprobe"])
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is no checkpoint of a training ({error})") from error
        if header.get("format") != FORMAT:
            raise ValueError(f"{self.path}: format {header.get('format')!r}, expected {FORMAT!r}")
        changed = _changes(header["origin"], self.origin)
        if changed:
            raise ValueError(
                f"{self.path} is of another training ({'; '.join(changed)}):"
                " delete it to begin anew"
            )
        told = header["progress"]
        return Saved(Progress(Fit(**_lenient(told.pop("fit"))), **told), tensors)


def restore_weights(objective: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put values into an objective's weights of those names."""
    weights = dict(objective.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            weights[name].copy_(value)


def restore_moments(trained: Trained, saved: Saved) -> None:
    """Give the optimiser the moments it had."""
    parts = {kind: saved.part(kind) for kind in MOMENTS}
    for name, weight in trained.weights.items():
        if name not in parts["step"]:
            continue  # it had no gradient yet
        fused = bool(trained.optimizer.defaults["fused"])
        trained.optimizer.state[weight] = {
            "step": parts["step"][name].to(weight.device if fused else "cpu"),
            "exp_avg": shard_like(parts["exp_avg"][name], weight),
            "exp_avg_sq": shard_like(parts["exp_avg_sq"][name], weight),
        }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, a phrase each."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names]


def _strict(value: Any) -> Any:
    """The same with None for what JSON can't say."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lenient(value: Any) -> Any:
    """What was strict, as it was: NaN for None."""
    if isinstance(value, dict):
        return {key: _lenient(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_lenient(part) for part in value]
    return math.nan if value is None else value
