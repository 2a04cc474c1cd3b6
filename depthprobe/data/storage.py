"""The prepared form: memory-mapped interactions, items and users in Parquet, a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from depthprobe.data.cleaning import Step
from depthprobe.errors import BadInput
from depthprobe.files import complete_folder

SCHEMA = 2
MANIFEST = "manifest.json"

Table = dict[str, list[str]]  # columns by name


@dataclass(frozen=True, eq=False)
class Sequences:
    """Interactions of U users with I items, N in all; a user's are adjacent and time-ordered.

    ``offsets`` int64 (U + 1,): user ``u`` has ``items[offsets[u]:offsets[u + 1]]``.
    ``items`` int32 (N,), values 1..I; 0 is padding and never an item.
    ``times`` int64 (N,), seconds, or None.
    ``given`` int64 (U, 2): where a log that came split ends each user's training and validation
    interactions, as places in ``items``; None for other logs.
    ``notes`` are what the reader had to decide; ``warnings`` hold them and what else a reader of
    the results should know. ``cleaning`` is what each step of the cleaning left. ``fingerprint``
    is a sha256 of arrays, ids and titles, the same on every machine.

    Ids and titles are read when first asked for: opening a log takes milliseconds.
    """

    name: str
    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    given: np.ndarray | None
    n_items: int
    read_items: Callable[[], Table]
    read_users: Callable[[], Table]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    statistics: dict[str, float | int | str]
    cleaning: tuple[Step, ...]
    fingerprint: str

    @property
    def n_users(self) -> int:
        """Users, U."""
        return len(self.offsets) - 1

    @property
    def n_interactions(self) -> int:
        """Interactions, N."""
        return len(self.items)

    @cached_property
    def item_ids(self) -> np.ndarray:
        """Raw ids, str (I,): item ``i`` has ``item_ids[i - 1]``."""
        return np.array(self._items["item_id"], dtype=np.str_)

    @cached_property
    def user_ids(self) -> np.ndarray:
        """Raw ids, str (U,)."""
        return np.array(self.read_users()["user_id"], dtype=np.str_)

    @property
    def titles(self) -> list[str] | None:
        """The title of each item, empty where unknown; None when no item has one."""
        return self._items.get("title")

    @cached_property
    def _items(self) -> Table:
        return self.read_items()

    def history(self, user: int) -> np.ndarray:
        """All items of user ``user`` (0-based), oldest first, int32."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]


def load_data(path: str | Path) -> Sequences:
    """Open a prepared folder; the interactions stay on disk, memory-mapped.

    Raises:
        BadInput: if the folder is missing, incomplete, or was written by another version. Ids and
            titles are looked at when they are first read.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise BadInput("data.source", folder, f"a prepared folder with a {MANIFEST} in it")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise BadInput("data.source", folder, f"schema {SCHEMA} (prepare the log again)")
        users, items, rows = (int(manifest[what]) for what in ("users", "items", "interactions"))
        sequences = Sequences(
            name=manifest["name"],
            offsets=_map(folder / "offsets.npy", np.int64, users + 1),
            items=_map(folder / "items.npy", np.int32, rows),
            times=_map(folder / "times.npy", np.int64, rows) if manifest["times"] else None,
            given=_map(folder / "given.npy", np.int64, users, 2) if manifest["given"] else None,
            n_items=items,
            read_items=lambda: _read_table(folder / "items.parquet"),
            read_users=lambda: _read_table(folder / "users.parquet"),
            notes=tuple(manifest["notes"]),
            warnings=tuple(manifest["warnings"]),
            statistics=manifest["statistics"],
            cleaning=tuple(Step(**step) for step in manifest["cleaning"]),
            fingerprint=manifest["fingerprint"],
        )
        if (sequences.offsets[0], sequences.offsets[-1]) != (0, rows):
            raise ValueError("the sizes disagree")
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    return sequences


def check_output(output: Path) -> None:
    """Refuse to write over anything but an empty folder or a prepared one."""
    if output.exists() and not (output / MANIFEST).is_file():
        if not output.is_dir():
            raise BadInput("output", output, "a folder")
        if any(output.iterdir()):
            raise BadInput("output", output, "a new or empty folder, or a prepared one to replace")


def write_data(sequences: Sequences, output: Path) -> None:
    """Write a prepared folder, complete or not at all.

    Raises:
        BadInput: if the folder can't be written, for want of room or of permission.
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns: Table = {"item_id": sequences.item_ids.tolist()}
    if sequences.titles is not None:
        columns["title"] = sequences.titles
    manifest = {
        "schema": SCHEMA,
        "name": sequences.name,
        "users": sequences.n_users,
        "items": sequences.n_items,
        "interactions": sequences.n_interactions,
        "times": sequences.times is not None,
        "given": sequences.given is not None,
        "fingerprint": sequences.fingerprint,
        "notes": list(sequences.notes),
        "warnings": list(sequences.warnings),
        "cleaning": [asdict(step) for step in sequences.cleaning],
        "statistics": sequences.statistics,
    }
    text = json.dumps(manifest, indent=2, allow_nan=False)
    try:
        with complete_folder(output) as folder:
            for name in ("offsets", "items", "times", "given"):
                if (array := getattr(sequences, name)) is not None:
                    np.save(folder / f"{name}.npy", array)
            parquet.write_table(pa.table(columns), folder / "items.parquet")
            users = {"user_id": sequences.user_ids.tolist()}
            parquet.write_table(pa.table(users), folder / "users.parquet")
            (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        allowed = f"a folder that can be written, with room for the log ({str(error)[:80]})"
        raise BadInput("output", output, allowed) from error


def _damaged(folder: Path, why: object) -> BadInput:
    return BadInput("data.source", folder, f"a complete prepared folder ({str(why)[:80]})")


def _read_table(path: Path) -> Table:
    from pyarrow import parquet

    try:
        table: Any = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, f"{path.name}: {error}") from error
    return {name: table[name].to_pylist() for name in table.column_names}


def _map(path: Path, dtype: type[np.generic], *shape: int) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, expected {shape}")
    return array
