"""Prepared sequences: interactions in time order, numbered items, in memory-mapped arrays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthprobe.data.readers import Log, read_log
from depthprobe.study import BadInput

SCHEMA = 1
MANIFEST = "manifest.json"
LONGEST_TITLE = 256  # characters; titles lie in a fixed-width array, one long one widens them all
PART = 2**20  # ids that are numbered at once
NO_TIMES = "no times: order is the file's"


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


def prepare_data(
    source: str | Path, output: str | Path | None = None, *, name: str | None = None
) -> Sequences:
    """Read a log, put it in order, number its items.

    Interactions are sorted by time within a user; ties, and logs without times, keep the order
    of the input. Items and users are numbered in the natural order of their raw ids (``i2``
    before ``i10``), so the numbers don't depend on the order of the file's lines.

    Args:
        source: ``"embedded"``, a log, a folder with a ``sequences.txt``, or a prepared folder.
        output: where to write the prepared folder; it appears complete or not at all. A prepared
            folder already there is replaced.
        name: the name of the dataset; by default the file's, or its folder's.

    Raises:
        BadInput: if the source is missing, empty or not a log, or the output can't be written.
    """
    target = None if output is None else Path(output)
    if target is not None:
        _check_output(target)
    if str(source) != "embedded" and (Path(source) / MANIFEST).is_file():
        sequences = load_data(source)
    else:
        sequences = order_log(read_log(source), name=name)
    if target is None or target.resolve() == Path(source).resolve():
        return sequences
    write_data(sequences, target)
    return load_data(target)


def order_log(log: Log, *, name: str | None = None) -> Sequences:
    """Sort and number a log; see :func:`prepare_data`."""
    if not len(log.users):
        raise BadInput("data.source", log.name, "a log with at least one interaction")
    users, user_ids = _number(log.users, "user")
    items, item_ids = _number(log.items, "item")
    # lexsort is stable: what has the same time keeps the order of the input
    order = np.lexsort((users,) if log.times is None else (log.times, users))
    counts = np.bincount(users, minlength=len(user_ids))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    items = (items[order] + 1).astype(np.int32)
    times = None if log.times is None else np.asarray(log.times)[order].astype(np.int64)
    titles, untitled = _titles(log.titles, item_ids)
    warnings = [] if times is not None else [NO_TIMES]
    short = int((counts < 3).sum())
    if short:
        warnings.append(f"{short} of {len(counts)} users train only: fewer than 3 interactions")
    if untitled:
        warnings.append(f"{untitled} of {len(item_ids)} items have no title")
    return Sequences(
        name=name or log.name,
        offsets=offsets,
        items=items,
        times=times,
        item_ids=item_ids,
        user_ids=user_ids,
        titles=titles,
        warnings=tuple(warnings),
        statistics=_statistics(offsets, items, len(item_ids)),
        fingerprint=_fingerprint(offsets, items, times, item_ids, user_ids, titles),
    )


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


def _number(raw: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0.. in the natural order of the stripped ids, int64 (N,), and the ids, str."""
    import pyarrow as pa

    # Lists of a part at a time: faster than the array itself, and memory stays bounded. Hashing is
    # far faster than sorting strings.
    parts = [pa.array(raw[at : at + PART].tolist()) for at in range(0, len(raw), PART)]
    encoded = pa.chunked_array(parts).dictionary_encode().combine_chunks()
    found = [text.strip() for text in encoded.dictionary.to_pylist()]
    ids = sorted(set(found), key=natural_order)
    if not ids[0]:
        raise BadInput(f"data.{what}", "", f"every interaction has {what} ids that are not blank")
    place = {text: code for code, text in enumerate(ids)}
    codes = np.array([place[text] for text in found], dtype=np.int64)
    return codes[encoded.indices.to_numpy()], np.array(ids, dtype=np.str_)


def natural_order(text: str) -> tuple[str, str]:
    """A sorting key under which ``i2`` comes before ``i10``; different texts never tie."""
    if text.isascii() and text.isdecimal():
        return _sized(text), text
    return re.sub(r"[0-9]+", lambda number: _sized(number.group()), text), text


def _sized(number: str) -> str:
    """With its number of digits in front, as text sorts by value; no limit on the value."""
    digits = number.lstrip("0")
    return f"{len(digits):06d}{digits}"


def _titles(titles: dict[str, str], item_ids: np.ndarray) -> tuple[np.ndarray | None, int]:
    if not titles:
        return None, 0
    found = [titles.get(item, "")[:LONGEST_TITLE] for item in item_ids.tolist()]
    return np.array(found, dtype=np.str_), sum(not title for title in found)


def _statistics(offsets: np.ndarray, items: np.ndarray, n_items: int) -> dict[str, float | int]:
    lengths = np.diff(offsets)
    pairs = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths) * (n_items + 1) + items
    pairs.sort()
    return {
        "users": len(lengths),
        "items": n_items,
        "interactions": len(items),
        "evaluated_users": int((lengths >= 3).sum()),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "max_length": int(lengths.max()),
        "density": len(items) / (len(lengths) * n_items),
        "repeats": int((np.diff(pairs) == 0).sum()) / len(items),
    }


def _fingerprint(*arrays: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        if array is None:
            digest.update(b"none;")
        elif array.dtype.kind == "U":
            text = json.dumps(array.tolist(), ensure_ascii=True)
            digest.update(f"text {len(text)};{text}".encode())
        else:
            digest.update(f"{array.dtype.kind}{array.dtype.itemsize} {len(array)};".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _check_output(output: Path) -> None:
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
