"""The prepared form: memory-mapped interactions, items and users in Parquet, a manifest."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthprobe.study import BadInput

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class Sequences:
    """Interactions of U users with I items, N in all; a user's are adjacent and time-ordered.

    ``offsets`` int64 (U + 1,): user ``u`` has ``items[offsets[u]:offsets[u + 1]]``.
    ``items`` int32 (N,), values 1..I; 0 is padding and never an item.
    ``times`` int64 (N,), seconds, or None.
    ``item_ids`` str (I,): item ``i`` has the raw id ``item_ids[i - 1]``. ``user_ids`` str (U,).
    ``titles`` str (I,), empty where unknown, or None when no item has one.
    ``fingerprint`` is a sha256 of all the above, the same on every machine.
    """

    name: str
    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    item_ids: np.ndarray
    user_ids: np.ndarray
    titles: np.ndarray | None
    warnings: tuple[str, ...]
    statistics: dict[str, float | int]
    fingerprint: str

    @property
    def n_users(self) -> int:
        """Users, U."""
        return len(self.offsets) - 1

    @property
    def n_items(self) -> int:
        """Items, I; they are numbered 1..I."""
        return len(self.item_ids)

    @property
    def n_interactions(self) -> int:
        """Interactions, N."""
        return len(self.items)

    def history(self, user: int) -> np.ndarray:
        """All items of user ``user`` (0-based), oldest first, int32."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]


def load_data(path: str | Path) -> Sequences:
    """Open a prepared folder; the interactions stay on disk, memory-mapped.

    Raises:
        BadInput: if the folder is missing, incomplete, or was written by another version.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise BadInput("data.source", folder, f"a prepared folder has a {MANIFEST}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise BadInput("data.source", folder, f"schema {SCHEMA}: prepare the log again")
        item_table = _read_table(folder / "items.parquet")
        sequences = Sequences(
            name=manifest["name"],
            offsets=_map(folder / "offsets.npy", np.int64),
            items=_map(folder / "items.npy", np.int32),
            times=_map(folder / "times.npy", np.int64) if manifest["times"] else None,
            item_ids=item_table["item_id"],
            user_ids=_read_table(folder / "users.parquet")["user_id"],
            titles=item_table.get("title"),
            warnings=tuple(manifest["warnings"]),
            statistics=manifest["statistics"],
            fingerprint=manifest["fingerprint"],
        )
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            "data.source", folder, f"a complete prepared folder (damaged: {str(error)[:80]})"
        ) from error
    n_users, n_interactions = len(sequences.user_ids), len(sequences.items)
    offsets, times = sequences.offsets, sequences.times
    if (
        len(offsets) != n_users + 1
        or (offsets[0], offsets[-1]) != (0, n_interactions)
        or (times is not None and len(times) != n_interactions)
        or manifest["statistics"]["interactions"] != n_interactions
    ):
        raise BadInput("data.source", folder, "a complete prepared folder (the sizes disagree)")
    return sequences


def check_output(output: Path) -> None:
    """Refuse to write over anything but an empty folder or a prepared one."""
    if output.exists() and not (output / MANIFEST).is_file():
        if not output.is_dir():
            raise BadInput("output", output, "a folder")
        if any(output.iterdir()):
            raise BadInput("output", output, "a new or empty folder, or a prepared one to replace")


def write_data(sequences: Sequences, output: Path) -> None:
    """Write beside ``output``, then rename: a reader never sees half a folder.

    Raises:
        BadInput: if the folder can't be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise BadInput("output", output, f"a folder that can be written ({error})") from error
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()  # under the user's umask, unlike mkdtemp's folder
        np.save(new / "offsets.npy", sequences.offsets)
        np.save(new / "items.npy", sequences.items)
        if sequences.times is not None:
            np.save(new / "times.npy", sequences.times)
        columns = {"item_id": sequences.item_ids}
        if sequences.titles is not None:
            columns["title"] = sequences.titles
        _write_table(new / "items.parquet", columns)
        _write_table(new / "users.parquet", {"user_id": sequences.user_ids})
        manifest = {
            "schema": SCHEMA,
            "name": sequences.name,
            "times": sequences.times is not None,
            "fingerprint": sequences.fingerprint,
            "warnings": list(sequences.warnings),
            "statistics": sequences.statistics,
        }
        text = json.dumps(manifest, indent=2, allow_nan=False)
        (new / MANIFEST).write_text(text + "\n", encoding="utf-8")
        if output.exists():
            output.rename(old)
        try:
            new.rename(output)
        except OSError:
            with contextlib.suppress(OSError):
                old.rename(output)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_table(path: Path, columns: dict[str, np.ndarray]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(
        pa.table({name: pa.array(values) for name, values in columns.items()}), path
    )


def _read_table(path: Path) -> dict[str, np.ndarray]:
    from pyarrow import parquet

    table: Any = parquet.read_table(path)
    return {name: np.array(table[name].to_pylist(), dtype=np.str_) for name in table.column_names}


def _map(path: Path, dtype: type[np.generic]) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}")
    return array
