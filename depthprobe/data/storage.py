"""The prepared form: memory-mapped interactions, items and users in Parquet, a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from depthprobe.data.cleaning import Step
from depthprobe.data.log import ColumnMap
from depthprobe.errors import BadInput
from depthprobe.files import complete_folder

MANIFEST = "manifest.json"
ARRAYS = ("offsets", "items", "times", "given")
ITEMS, USERS = "items.parquet", "users.parquet"
# of a log, in memory as in its manifest
FACTS = ("name", "fingerprint", "notes", "warnings", "cleaning", "statistics", "columns")
FILES = {MANIFEST, ITEMS, USERS, *(f"{name}.npy" for name in ARRAYS)}

Table = dict[str, list[str]]  # columns by name


@dataclass(frozen=True, eq=False)
class Sequences:
    """Interactions of U users with I items, N in all; a user's are adjacent and time-ordered.

    ``offsets`` int64 (U + 1,): user ``u`` has ``items[offsets[u]:offsets[u + 1]]``.
    ``items`` int32 (N,), values 1..I; 0 is padding and never an item.
    ``times`` int64 (N,), seconds, or None.
    ``given`` int64 (U, 2): where a log that came split ends each user's training and validation
    interactions, as places in ``items``; None for other logs.
    ``notes`` are the reader's decisions; ``warnings`` hold them and all else that a reader of the
    results should know. ``cleaning`` is what each step of the cleaning kept. ``fingerprint``
    is a sha256 of arrays, ids and titles, the same on every machine. ``columns`` are those of the
    table that the log came from.

    Ids and titles are read when first needed. Opening a log only checks the digests of its arrays,
    which takes a tenth of a second for 10 M interactions.
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
    columns: ColumnMap | None = None

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


class Manifest(msgspec.Struct, kw_only=True, frozen=True):
    """The content of ``manifest.json``. ``files`` has the other files' sha256, in newer ones."""

    schema: Literal[2] = 2
    name: str
    users: int
    items: int
    interactions: int
    times: bool
    given: bool
    fingerprint: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    cleaning: tuple[Step, ...]
    statistics: dict[str, float | int | str]
    files: dict[str, str] = {}
    columns: ColumnMap | None = None


def load_data(path: str | Path) -> Sequences:
    """Open a prepared folder; the interactions stay on disk, memory-mapped.

    Raises:
        BadInput: if the folder is missing, incomplete or changed, or was written by another
            version. Ids and titles are checked when they are first read.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise BadInput("data.source", folder, f"a prepared folder with a {MANIFEST} in it")
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = msgspec.json.decode(content, type=Manifest)
        users, items, rows = manifest.users, manifest.items, manifest.interactions
        shapes: dict[str, tuple[int, ...]] = {"offsets": (users + 1,), "items": (rows,)}
        shapes |= {"times": (rows,)} if manifest.times else {}
        shapes |= {"given": (users, 2)} if manifest.given else {}
        arrays = {name: _map(folder / f"{name}.npy", manifest, shapes[name]) for name in shapes}
        offsets = arrays["offsets"]
        if (offsets[0], offsets[-1]) != (0, rows) or (np.diff(offsets) < 1).any():
            raise ValueError("the sizes disagree")
        if arrays["items"].min() < 1 or arrays["items"].max() > items:
            raise ValueError(f"items.npy has items that are not among 1 to {items}")
    except (OSError, EOFError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _damaged(folder, error) from error
    return Sequences(
        offsets=offsets,
        items=arrays["items"],
        times=arrays.get("times"),
        given=arrays.get("given"),
        n_items=items,
        read_items=lambda: _read_table(folder / ITEMS, manifest, items),
        read_users=lambda: _read_table(folder / USERS, manifest, users),
        **{name: getattr(manifest, name) for name in FACTS},
    )


def check_output(output: Path, *, overwrite: bool = False) -> None:
    """Refuse to write over anything but an empty folder or, on demand, a prepared one.

    A folder is a prepared one if its manifest says so and it holds nothing else: other folders,
    such as a run's, have a manifest of that name too.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise BadInput("output", output, "a folder")
    names = {path.name for path in output.iterdir()}
    if not names:
        return
    prepared = MANIFEST in names and names <= FILES
    if prepared:
        try:
            msgspec.json.decode((output / MANIFEST).read_bytes(), type=Manifest)
        except (OSError, RecursionError, msgspec.MsgspecError):
            prepared = False
    if not prepared:
        raise BadInput("output", output, "a new or empty folder, or a prepared one to replace")
    if not overwrite:
        allowed = "a prepared folder already exists; --overwrite replaces it"
        raise BadInput("output", output, allowed, fault=True)


def write_data(sequences: Sequences, output: Path) -> None:
    """Write a prepared folder, complete or not at all; ``BadInput`` if it can't be written."""
    import pyarrow as pa
    from pyarrow import parquet

    columns: Table = {"item_id": sequences.item_ids.tolist()}
    if sequences.titles is not None:
        columns["title"] = sequences.titles
    users = {"user_id": sequences.user_ids.tolist()}
    try:
        with complete_folder(output) as folder:
            for name in ARRAYS:
                if (array := getattr(sequences, name)) is not None:
                    np.save(folder / f"{name}.npy", array)
            parquet.write_table(pa.table(columns), folder / ITEMS)
            parquet.write_table(pa.table(users), folder / USERS)
            manifest = Manifest(
                users=sequences.n_users,
                items=sequences.n_items,
                interactions=sequences.n_interactions,
                times=sequences.times is not None,
                given=sequences.given is not None,
                files={path.name: _digest(path) for path in sorted(folder.iterdir())},
                **{name: getattr(sequences, name) for name in FACTS},
            )
            text = json.dumps(msgspec.to_builtins(manifest), indent=2, allow_nan=False)
            (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        allowed = f"a folder that can be written, with room for the log ({str(error)[:80]})"
        raise BadInput("output", output, allowed) from error


def _damaged(folder: Path, why: object) -> BadInput:
    allowed = f"a whole prepared folder, as it was written ({str(why)[:120]}); prepare the log anew"
    return BadInput("data.source", folder, allowed)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path: Path, manifest: Manifest) -> None:
    """Refuse a path that is no plain file (a pipe would block), or a changed file."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if manifest.files.get(path.name) not in (None, _digest(path)):
        raise ValueError(f"{path.name} has changed since it was written")


def _read_table(path: Path, manifest: Manifest, rows: int) -> Table:
    from pyarrow import parquet

    try:
        _check_file(path, manifest)
        table: Any = parquet.read_table(path)
        if len(table) != rows:
            raise ValueError(f"{path.name} has {len(table)} rows, expected {rows}")
        return {name: table[name].to_pylist() for name in table.column_names}
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, f"{path.name}: {error}") from error


def _map(path: Path, manifest: Manifest, shape: tuple[int, ...]) -> np.ndarray:
    _check_file(path, manifest)
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    dtype = np.int32 if path.stem == "items" else np.int64
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, expected {shape}")
    return array
