"""A training on disk, from which it continues to the same numbers: one safetensors file.

The tensors are the trained weights, their best values so far and AdamW's moments; the file's header
holds the rest as JSON. Nothing in it can run code. No state of a random generator is needed: the
loop derives a step's random numbers from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from depthprobe.files import complete_file
from depthprobe.study import Recipe
from depthprobe.training.distributed import Engine

FORMAT = "depthprobe training 2"  # 2: weights of 16 bits are trained with float32 copies
SHARE = 20  # spend at most 1/20 of the time writing checkpoints


@dataclass
class Fit:
    """The outcome of a training: its epochs and steps, losses, scores and seconds."""

    epochs: int = 0
    steps: int = 0
    seconds: float = field(default=0.0, compare=False)
    best_epoch: int = 0
    best_score: float = float("nan")
    losses: list[float] = field(default_factory=list)  # mean a epoch
    scores: list[float] = field(default_factory=list)  # validation NDCG@10 a epoch
    processes: int = 1
    parts: int = field(default=1, compare=False)  # into which a batch is divided
    reused: bool = field(default=False, compare=False)  # it is cached, of an equal training
    resumed_at: list[int] = field(default_factory=list, compare=False)  # steps
    threads: list[int] = field(default_factory=list, compare=False)  # when begun, when resumed
    learning_rate: float = 0.0
    tried: dict[str, float | None] = field(default_factory=dict)  # best score by learning rate
    tuning_seconds: float = field(default=0.0, compare=False)  # of the rates not chosen


@dataclass
class Progress:
    """The progress of a training: ``fit`` has the complete epochs, the rest is the running one."""

    fit: Fit = field(default_factory=Fit)
    done: int = 0  # steps of the running epoch
    lost: float = 0.0  # the sum of their losses
    ended: bool = False  # nothing is left to train

    def end_epoch(self, score: float) -> None:
        """Close the running epoch with its validation score; NaN is the worst score."""
        fit = self.fit
        fit.epochs += 1
        fit.losses.append(self.lost / self.done)
        fit.scores.append(score)
        best = -math.inf if math.isnan(fit.best_score) else fit.best_score
        if score > best or not fit.best_epoch:
            fit.best_score, fit.best_epoch = score, fit.epochs
        self.done, self.lost = 0, 0.0


class Weights(dict[str, Tensor]):
    """Weights by name, in memory or mapped from a file."""

    pages: mmap.mmap | None = None

    def leave_memory(self) -> None:
        """Release the memory of weights mapped from a file; they are read again when needed."""
        if self.pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)


class SavedState(NamedTuple):
    """The content of a checkpoint."""

    progress: Progress
    best: Weights  # the best ones so far
    engine: dict[str, Tensor]  # the state of an engine, to continue from


class Checkpoint:
    """The file that a training is written to at intervals; without a path nothing is written."""

    def __init__(self, path: Path | None, origin: dict[str, Any], *, every: float = 0.0) -> None:
        """Write at most once in ``every`` seconds, and spend at most 1/``SHARE`` of the time."""
        self.path, self.origin, self.every = path, origin, every
        self._took, self._last = 0.0, time.perf_counter()

    def is_due(self) -> bool:
        """Whether it is time to write."""
        waited = time.perf_counter() - self._last
        return self.path is not None and waited >= max(self.every, SHARE * self._took)

    def write(self, engine: Engine, progress: Progress, best: dict[str, Tensor]) -> None:
        """Write everything that the rest of the training needs; every process must call this."""
        if self.path is None:
            return
        if self.path.exists() and not self.path.is_file():
            raise FileExistsError(f"{self.path} is no plain file")
        began = time.perf_counter()
        tensors = {f"best {name}": value for name, value in best.items()}
        if not progress.ended:  # an ended training needs only its best weights
            tensors |= engine.state()
        if engine.rank == 0:
            # safetensors refuses shared memory, so copy it
            own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            header = {"format": FORMAT, "origin": self.origin, "progress": asdict(progress)}
            header["digest"] = _digest(header, own)
            self.path.parent.mkdir(exist_ok=True)  # the run itself is not made again
            with complete_file(self.path, parents=False) as temporary:
                save_file(own, temporary, metadata={"depthprobe": json.dumps(header)})
        self._last = time.perf_counter()
        self._took = self._last - began

    def result(self) -> SavedState | None:
        """The state of a training that has ended; None if the file does not hold one."""
        try:
            saved = self.read()
        except ValueError:  # damaged, or of an older format: ignore it
            return None
        return saved if saved is not None and saved.progress.ended else None

    def read(self) -> SavedState | None:
        """The content of the file; None without a file, ``ValueError`` if it does not fit."""
        if self.path is None or not self.path.exists():
            return None
        if not self.path.is_file():
            raise ValueError(f"{self.path} is no plain file")
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads(file.metadata()["depthprobe"])
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is no checkpoint of a training ({error})") from error
        if header.get("format") != FORMAT:
            raise ValueError(f"{self.path}: format {header.get('format')!r}, expected {FORMAT!r}")
        digest = header.pop("digest", None)  # earlier versions wrote none
        if digest is not None and digest != _digest(header, tensors):
            raise ValueError(f"{self.path} was changed after it was written: delete it")
        before, now = header["origin"], self.origin
        if changed := [key for key in {**now, **before} if before.get(key) != now.get(key)]:
            listed = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed)
            raise ValueError(
                f"{self.path} is of another training ({listed}): delete it to begin anew"
            )
        stored = header["progress"]
        names = {name.removeprefix("best "): name for name in tensors if name.startswith("best ")}
        best = Weights({short: tensors.pop(name) for short, name in names.items()})
        return SavedState(Progress(Fit(**stored.pop("fit")), **stored), best, tensors)


def put_aside(weights: Mapping[str, Tensor], folder: Path | None) -> Weights:
    """Copy the present weights to disk, since they are rarely read again.

    The file has no name and vanishes with the tensors. Without a folder the copies stay in memory.
    """
    if folder is None:
        return Weights({n: weight.detach().to("cpu", copy=True) for n, weight in weights.items()})
    folder.mkdir(exist_ok=True)  # the run itself is not made again
    starts = {}
    with tempfile.TemporaryFile(dir=folder) as file:
        for name, weight in weights.items():
            # an offset that is aligned for every type
            starts[name] = file.seek(-(-file.tell() // 8) * 8)
            flat = weight.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        # copied when written to: torch has no tensors that can't be
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    stored = torch.frombuffer(pages, dtype=torch.uint8)
    aside = Weights(
        (name, stored[starts[name] :][: weight.nbytes].view(weight.dtype).view(weight.shape))
        for name, weight in weights.items()
    )
    aside.pages = pages
    return aside


def identity(
    objective: nn.Module, windows: list[np.ndarray], *, recipe: Recipe, seed: int, processes: int
) -> dict[str, Any]:
    """Everything visible from outside that decides a training's numbers, for comparison.

    Without the initial weights: they may differ in the last bit between machines.
    """
    trained = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    shapes = [(name, str(weight.dtype), *weight.shape) for name, weight in trained]
    return {
        "objective": type(objective).__name__,
        **{f"recipe.{name}": value for name, value in asdict(recipe).items()},
        "seed": seed,
        "processes": processes,
        "windows": windows_digest(windows),
        "weights": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
    }


def _digest(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps(header, sort_keys=True)
    return hashlib.sha256(f"{text} {tensors_digest(tensors)}".encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of tensors by name, type and shape."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        hashed.update(flat.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def windows_digest(windows: list[np.ndarray]) -> str:
    """Hash of the training windows, in their order."""
    sizes = np.array([len(window) for window in windows], dtype=np.int64)
    content = hashlib.sha256(sizes.tobytes())
    content.update(np.concatenate(windows).astype(np.int64).tobytes())
    return content.hexdigest()[:16]
