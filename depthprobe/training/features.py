"""The teacher's outputs at the training windows: computed once for all students, or at each step.

The teacher does not change while students learn. So its states after some blocks, and its user
vectors or best-scored items, are stored as memory-mapped files that students of all depths share.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from depthprobe.evaluation.ranks import Batches
from depthprobe.files import reserve
from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import tap_blocks
from depthprobe.models.words import POSITIONS
from depthprobe.training.objectives import (
    Batch,
    Objective,
    count_targets,
    make_batch,
    target_states,
)

SPEC = "features.json"  # what a folder of features holds
HALF = (torch.float16, torch.bfloat16)  # types for stored states; the first one that fits is used
TOP_BYTES = 64 * 2**20  # of scores at a time, in the search for the best items


@dataclass(frozen=True)
class FeatureSpec:
    """Which of the teacher's outputs are needed."""

    objective: Objective  # at every position of a window that has a target, or at the last one
    ends: tuple[int, ...] = ()  # the depths whose states are needed
    vectors: bool = False  # user vectors, from which the scores of all items follow
    top: int = 0  # how many best items are needed, with their scores


@dataclass(frozen=True)
class TeacherOutputs:
    """The teacher's outputs at the N target positions of a batch; None if not needed."""

    states: Tensor | None = None  # (G, N, D) float32, one group for each depth
    vectors: Tensor | None = None  # (N, d)
    top: Tensor | None = None  # (N, K) items, the best first
    scores: Tensor | None = None  # (N, K)


class Teacher(Protocol):
    """A source of the teacher's outputs."""

    def at(self, batch: Batch) -> TeacherOutputs:
        """The outputs at the batch's target positions, on its device."""
        ...


class CachedTeacher:
    """The teacher's outputs from the files of :func:`write_features`."""

    def __init__(self, folder: Path, windows: list[np.ndarray], spec: FeatureSpec) -> None:
        """Open the files of a folder; they may hold more than the spec needs, never less."""
        stored = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        if not (
            stored["objective"] == spec.objective
            and set(spec.ends) <= set(stored["ends"])
            and stored["vectors"] >= spec.vectors
            and stored["top"] >= spec.top
        ):
            raise ValueError(f"{folder} does not hold {spec}")
        self._top = spec.top
        self._columns = [stored["ends"].index(end) for end in spec.ends]
        self._starts = _starts(windows, spec)
        needed = {"states": spec.ends, "vectors": spec.vectors, "top": spec.top, "scores": spec.top}
        self._arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in needed if needed[name]
        }

    def at(self, batch: Batch) -> TeacherOutputs:
        """The outputs at the batch's target positions, on its device."""
        rows = _rows_of(batch.chosen, self._starts)
        tensors = {
            name: torch.from_numpy(array[rows]).to(batch.inputs.device)
            for name, array in self._arrays.items()
        }
        if "states" in tensors:
            states = tensors["states"][:, self._columns]  # (N, G, D) in 16 bits
            tensors["states"] = _unpack(states).float().transpose(0, 1)
        for name in tensors.keys() & {"top", "scores"}:
            tensors[name] = tensors[name][:, : self._top]
        return TeacherOutputs(**tensors)


class OnlineTeacher:
    """A teacher that runs at every step, as in SLMRec, for features that are too large to store."""

    def __init__(self, model: Recommender, spec: FeatureSpec) -> None:
        """Take the outputs of ``model``, which must be in evaluation mode."""
        self._model, self._spec = model, spec

    def at(self, batch: Batch) -> TeacherOutputs:
        """The outputs at the batch's target positions."""
        outputs = _run(self._model, batch, self._spec)
        if "states" in outputs:
            states = outputs["states"]
            fits = bool(torch.isfinite(states.half()).all())
            outputs["states"] = states.to(HALF[not fits]).float()  # rounded as on disk
        return TeacherOutputs(**outputs)


def write_features(
    teacher: Recommender,
    windows: list[np.ndarray],
    spec: FeatureSpec,
    *,
    folder: Path,
    device: torch.device,
    batch_size: int = 256,
) -> None:
    """Run the teacher, in evaluation mode, over the training windows, into memory-mapped files.

    States are stored in float16, or in bfloat16 where one does not fit: N (G D) 2 bytes for N
    target positions. User vectors and scores are float32. The folder exists, and is empty.
    """
    if not any(_write(teacher, windows, spec, folder, device, batch_size, dtype) for dtype in HALF):
        raise ValueError("a state of the teacher is infinite or NaN")
    (folder / SPEC).write_text(json.dumps(asdict(spec)) + "\n", encoding="utf-8")


def _write(
    teacher: Recommender,
    windows: list[np.ndarray],
    spec: FeatureSpec,
    folder: Path,
    device: torch.device,
    batch_size: int,
    dtype: torch.dtype,
) -> bool:
    """Whether all states fit the dtype; then the outputs are in the files."""
    starts, files = _starts(windows, spec), dict[str, np.ndarray]()
    lengths = teacher.positions([window[:-1] for window in windows])
    batches = Batches(
        lengths,
        batch_size,
        lambda chosen: make_batch(windows, chosen, device, spec.objective),
        positions=None if teacher.words is None else POSITIONS,
    )
    for batch in batches:
        with batches.retry():
            outputs = _run(teacher, batch, spec)
            if "states" in outputs:
                packed = _pack(outputs["states"], dtype).transpose(0, 1).contiguous()  # (N, G, D)
                if not torch.isfinite(_unpack(packed)).all():
                    return False
                outputs["states"] = packed
            for name, values in outputs.items():
                array, path = values.cpu().numpy(), folder / f"{name}.npy"
                if name not in files:
                    shape = (int(starts[-1]), *array.shape[1:])
                    files[name] = open_memmap(path, mode="w+", dtype=array.dtype, shape=shape)
                    reserve(path)
                files[name][_rows_of(batch.chosen, starts)] = array
    for file in files.values():
        file.flush()  # type: ignore[attr-defined]
    return True


def _starts(windows: list[np.ndarray], spec: FeatureSpec) -> np.ndarray:
    """The first row of each window in the files, then the number of rows, (windows + 1,)."""
    return np.concatenate([[0], np.cumsum(count_targets(windows, spec.objective))])


def _rows_of(chosen: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The rows of some windows in the files, one per target position, (N,)."""
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])


def _pack(states: Tensor, dtype: torch.dtype) -> Tensor:
    """States in 16 bits; those of bfloat16 as whole numbers, since numpy has no such floats."""
    small = states.to(dtype)
    return small.view(torch.int16) if dtype == torch.bfloat16 else small


def _unpack(packed: Tensor) -> Tensor:
    return packed.view(torch.bfloat16) if packed.dtype == torch.int16 else packed


@torch.no_grad()
def _run(teacher: Recommender, batch: Batch, spec: FeatureSpec) -> dict[str, Tensor]:
    """Fields of ``TeacherOutputs`` from one pass over a batch; nothing is rounded yet."""
    outputs: dict[str, Tensor] = {}
    with tap_blocks(teacher.backbone) as tap:
        normed = teacher.states(batch.inputs, batch.lengths)  # (B, P, D)
        if spec.ends:
            states = [target_states(teacher, tap.states[end], batch) for end in spec.ends]
            outputs["states"] = torch.stack(states)  # (G, N, D)
    if spec.vectors or spec.top:
        vectors = teacher.read_out(target_states(teacher, normed, batch))  # (N, d)
        if spec.vectors:
            outputs["vectors"] = vectors.float()
        if spec.top:
            catalogue = teacher.item_matrix()[1:].to(vectors.dtype)  # (I, d)
            rows = max(1, TOP_BYTES // (4 * len(catalogue)))  # positions whose scores fit
            top = min(spec.top, len(catalogue))
            best = [(part @ catalogue.T).topk(top, dim=1) for part in vectors.split(rows)]
            outputs["top"] = torch.cat([each.indices for each in best]).int() + 1
            outputs["scores"] = torch.cat([each.values for each in best]).float()
    return outputs
