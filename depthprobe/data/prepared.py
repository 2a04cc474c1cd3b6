"""Prepared sequences: interactions in time order, numbered items, in memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from depthprobe.data.log import Log
from depthprobe.data.readers import read_log
from depthprobe.data.storage import MANIFEST, Sequences, check_output, load_data, write_data
from depthprobe.study import BadInput

LONGEST_TITLE = 256  # characters; titles lie in a fixed-width array, one long one widens them all
PART = 2**20  # ids that are numbered at once
NO_TIMES = "no times: order is the file's"


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
        check_output(target)
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
