"""What the teacher says at the training windows: computed once for all students, or as they go.

The teacher does not change while students learn. So its states after some blocks, and its user
vectors or the items that it scores best, are kept on disk, memory-mapped, and shared by the
students of every depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from depthprobe.data.batches import length_buckets
from depthprobe.files import reserve
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.taps import tap_blocks
from depthprobe.training.objectives import Batch, Objective, asked, at_rows, make_batch

STATES, VECTORS, TOP, SCORES = "states.npy", "vectors.npy", "top.npy", "scores.npy"
WANTED = "features.json"
TOP_BYTES = 64 * 2**20  # of scores at once, when the best items are looked for


@dataclass(frozen=True)
class FeatureSpec:
    """Which features: where, after how many blocks, and what of the scores.

    Attributes:
        objective: where: at every position that a window asks, or at its last.
        ends: after how many blocks the state is wanted; empty for no states.
        vectors: whether user vectors are wanted, from which all scores follow.
        top: how many best items are wanted, with their scores; 0 for none.
    """

    objective: Objective
    ends: tuple[int, ...] = ()
    vectors: bool = False
    top: int = 0


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says at N positions of a batch; None is what was not wanted."""

    states: Tensor | None = None  # (G, N, D) float32
    vectors: Tensor | None = None  # (N, d)
    top: Tensor | None = None  # (N, K) items from the best on
    scores: Tensor | None = None  # (N, K)


class Teacher(Protocol):
    """What a student asks."""

    def at(self, batch: Batch) -> TeacherOutputs:
        """What the teacher says where the batch is asked."""
        ...


class CachedTeacher:
    """Features on disk."""

    def __init__(self, folder: Path, windows: list[np.ndarray], wanted: FeatureSpec) -> None:
        """Open what :func:`write_features` wrote for the windows, and hand on what is wanted.

        Raises:
            ValueError: if it is not in the folder.
        """
        kept = json.loads((folder / WANTED).read_text(encoding="utf-8"))
        known = {WANTED: kept["objective"] == wanted.objective}
        known |= {STATES: set(wanted.ends) <= set(kept["ends"])}
        known |= {VECTORS: kept["vectors"] or not wanted.vectors, TOP: kept["top"] >= wanted.top}
        if not all(known.values()):
            raise ValueError(f"{folder} does not hold {wanted}")
        self._wanted = wanted
        self._columns = [kept["ends"].index(end) for end in wanted.ends]
        self._offsets = np.concatenate([[0], np.cumsum(asked(windows, wanted.objective))])
        names = {STATES: wanted.ends, VECTORS: wanted.vectors, TOP: wanted.top, SCORES: wanted.top}
        self._parts = {
            name: np.load(folder / name, mmap_mode="r") for name, used in names.items() if used
        }

    def at(self, batch: Batch) -> TeacherOutputs:
        """What the teacher says where the batch is asked, on the batch's device."""
        device = batch.inputs.device
        rows = np.concatenate(
            [np.arange(self._offsets[i], self._offsets[i + 1]) for i in batch.chosen]
        )
        found = {
            name: torch.from_numpy(part[rows]).to(device) for name, part in self._parts.items()
        }
        states, best = found.get(STATES), slice(self._wanted.top)
        if states is not None:
            states = _unpacked(states[:, self._columns]).float().transpose(0, 1)
        top, scores = (None if (p := found.get(n)) is None else p[:, best] for n in (TOP, SCORES))
        return TeacherOutputs(states, found.get(VECTORS), top, scores)


class OnlineTeacher:
    """A teacher that runs at every step, as SLMRec's does: for features that fit no disk."""

    def __init__(self, model: Recommender, wanted: FeatureSpec) -> None:
        """Ask ``model``, in evaluation mode, for the wanted features."""
        self._model, self._wanted = model, wanted

    @torch.no_grad()
    def at(self, batch: Batch) -> TeacherOutputs:
        """What the teacher says where the batch is asked."""
        said = _ask(self._model, batch, self._wanted)
        if said.states is None:
            return said
        rounded = _unpacked(_packed(said.states)).float()  # as they would be on disk
        return TeacherOutputs(rounded, said.vectors, said.top, said.scores)


def write_features(
    teacher: Recommender,
    windows: list[np.ndarray],
    wanted: FeatureSpec,
    *,
    folder: Path,
    device: torch.device,
    batch_size: int = 256,
) -> None:
    """Run the teacher once over the training windows, into memory-mapped files.

    States are kept in float16, or in bfloat16 where one does not fit: N (G D) 2 bytes for N asked
    positions. User vectors and scores are float32.

    Args:
        teacher: in evaluation mode.
        folder: exists, and is empty.

    Raises:
        ValueError: if a state is infinite or NaN.
    """
    for dtype in (torch.float16, torch.bfloat16):
        if _write(teacher, windows, wanted, folder, device, batch_size, dtype):
            text = json.dumps(asdict(wanted))
            (folder / WANTED).write_text(text + "\n", encoding="utf-8")
            return
    raise ValueError("a state of the teacher is infinite or NaN")


def _write(
    teacher: Recommender,
    windows: list[np.ndarray],
    wanted: FeatureSpec,
    folder: Path,
    device: torch.device,
    batch_size: int,
    dtype: torch.dtype,
) -> bool:
    """Whether all states fit the dtype; then they are in the files."""
    lengths = np.array([len(window) - 1 for window in windows])
    counts = asked(windows, wanted.objective)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    files: dict[str, np.ndarray] = {}
    for chosen in length_buckets(lengths, batch_size):
        batch = make_batch(windows, chosen, device, wanted.objective)
        with torch.no_grad():
            said = _ask(teacher, batch, wanted)
        rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
        for name, values in _to_write(said, dtype):
            if values is None:
                return False
            if name not in files:
                shape = (int(offsets[-1]), *values.shape[1:])
                files[name] = np.lib.format.open_memmap(
                    folder / name, mode="w+", dtype=values.dtype, shape=shape
                )
                reserve(folder / name)
            files[name][rows] = values
    for file in files.values():
        file.flush()  # type: ignore[attr-defined]
    return True


def _to_write(said: TeacherOutputs, dtype: torch.dtype) -> Iterator[tuple[str, np.ndarray | None]]:
    """Arrays by file; None in place of states that don't fit the dtype."""
    if said.states is not None:
        packed = _packed(said.states, dtype).transpose(0, 1)  # (N, G, D)
        fits = bool(torch.isfinite(_unpacked(packed)).all())
        yield STATES, packed.contiguous().cpu().numpy() if fits else None
    if said.vectors is not None:
        yield VECTORS, said.vectors.cpu().numpy()
    if said.top is not None and said.scores is not None:
        yield TOP, said.top.cpu().numpy()
        yield SCORES, said.scores.cpu().numpy()


def _packed(states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """States in 16 bits; those of bfloat16 as whole numbers, since numpy has no such floats."""
    if dtype is None:
        half = states.half()
        dtype = torch.float16 if torch.isfinite(half).all() else torch.bfloat16
    small = states.to(dtype)
    return small.view(torch.int16) if dtype == torch.bfloat16 else small


def _unpacked(packed: Tensor) -> Tensor:
    return packed.view(torch.bfloat16) if packed.dtype == torch.int16 else packed


def _ask(teacher: Recommender, batch: Batch, wanted: FeatureSpec) -> TeacherOutputs:
    """Run the teacher on a batch; nothing is rounded yet."""
    with tap_blocks(teacher.backbone) as tap:
        normed = teacher.states(batch.inputs, batch.lengths)
        states = None
        if wanted.ends:
            after = [tap.states[end] for end in wanted.ends]
            states = torch.stack([target_states(teacher, state, batch) for state in after])
    if not (wanted.vectors or wanted.top):
        return TeacherOutputs(states)
    vectors = teacher.read_out(target_states(teacher, normed, batch))  # (N, d)
    kept = vectors.float() if wanted.vectors else None
    if not wanted.top:
        return TeacherOutputs(states, kept)
    catalogue = teacher.item_matrix()[1:].to(vectors.dtype)
    rows = max(1, TOP_BYTES // (4 * len(catalogue)))
    best = [(part @ catalogue.T).topk(wanted.top, dim=1) for part in vectors.split(rows)]
    top = torch.cat([each.indices for each in best]).int() + 1
    return TeacherOutputs(states, kept, top, torch.cat([each.values for each in best]).float())


def target_states(model: Recommender, states: Tensor, batch: Batch) -> Tensor:
    """A block's output (B, P, D) where the batch asks for the next item, (N, D)."""
    if batch.objective == "last":
        return states_at(states, model.last_place(batch.lengths))
    return at_rows(states[:, model.lead :], batch.rows)
