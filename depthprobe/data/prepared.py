"""Raw logs to prepared sequences: in time order, cleaned, numbered, in memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from depthprobe.data.cleaning import clean
from depthprobe.data.log import Ids, Log, number_ids, used_only
from depthprobe.data.statistics import order_warnings, statistics, tied_neighbours
from depthprobe.data.storage import MANIFEST, Sequences, check_output, load_data, write_data
from depthprobe.errors import BadInput, short
from depthprobe.study import Cleaning, Columns, Data

Ties = Literal["random", "file", "item"]

LONGEST_TITLE = 256  # characters
FEW_SHARED = 0.01  # share of items with another one's title, up to which there is no warning


def prepare_data(
    source: str | Path,
    output: str | Path | None = None,
    *,
    name: str | None = None,
    format: str | None = None,
    items: str | Path | None = None,
    columns: Columns | None = None,
    cleaning: Cleaning | None = None,
    ties: Ties = "random",
    ties_seed: int = 0,
    overwrite: bool = False,
) -> Sequences:
    """Read a log, sort it, clean it, and number its users and items.

    Interactions are sorted by time within a user. A log without times keeps its order. Items and
    users are numbered in the natural order of their raw ids (``i2`` before ``i10``), so the numbers
    don't depend on the order of the file's lines.

    Args:
        source: ``"embedded"``, a log (a file or a folder), a prepared folder, or the name of a
            public set, which is fetched once.
        output: where to write the prepared folder; it appears complete or not at all.
        name: the name of the dataset; by default the file's, or its folder's.
        format: one of ``depthprobe data list``; by default recognised by the content.
        items: a file with the items' titles; by default looked for beside the log.
        columns: which columns of a table hold what; by default guessed.
        cleaning: what is dropped; by default nothing.
        ties: how to order a user's interactions at the same time: ``"random"``, independent of the
            file's order; as in the ``"file"``; by ``"item"`` id.
        ties_seed: of the random order.
        overwrite: replace a prepared folder that is at ``output`` already.

    Raises:
        BadInput: if the source is missing, empty or not a log, if the rules leave nothing, or if
            the output can't be written.
    """
    source = os.path.expanduser(source)
    target = None if output is None else Path(output)
    if target is not None:
        check_output(target, overwrite=overwrite)
    if str(source) != "embedded" and (Path(source) / MANIFEST).is_file():
        for field, value in (("format", format), ("items", items), ("columns", columns)):
            if value is not None and value != Columns():
                allowed = "none for a prepared folder (prepare the log itself again)"
                raise BadInput(f"data.{field}", value, allowed)
        sequences = _clean_further(load_data(source), name, cleaning or Cleaning())
        own, asked = sequences.statistics.get("ties"), _ties_name(ties, ties_seed)
        if own not in (None, asked) and (ties, ties_seed) != (Data.ties, Data.ties_seed):
            allowed = f"none for a prepared folder (its ties: {own}; prepare the log itself again)"
            raise BadInput("data.ties", asked, allowed)
    else:
        from depthprobe.data.readers.formats import read_log  # pyarrow is slow to import

        ratings = cleaning is not None and cleaning.min_rating is not None
        log = read_log(source, format=format, items=items, columns=columns, ratings=ratings)
        sequences = order_log(log, name=name, cleaning=cleaning, ties=ties, ties_seed=ties_seed)
    if target is None:
        return sequences
    write_data(sequences, target)
    return load_data(target)


def read_data(
    settings: Data,
    output: str | Path | None = None,
    *,
    name: str | None = None,
    overwrite: bool = False,
) -> Sequences:
    """The log of a study's settings; see :func:`prepare_data`."""
    return prepare_data(
        settings.source,
        output,
        name=name,
        format=settings.format,
        items=settings.items,
        columns=settings.columns,
        cleaning=settings.cleaning,
        ties=settings.ties,
        ties_seed=settings.ties_seed,
        overwrite=overwrite,
    )


def order_log(
    log: Log,
    *,
    name: str | None = None,
    cleaning: Cleaning | None = None,
    ties: Ties = "random",
    ties_seed: int = 0,
) -> Sequences:
    """Sort, clean and number a log; see :func:`prepare_data`."""
    if not len(log):
        raise BadInput("data.source", log.name, "a log with at least one interaction")
    users, user_ids = number_ids(log.users, "user")
    items, item_ids = number_ids(log.items, "item")
    # lexsort is stable: rows with the same time keep their order
    keys = [key for key in (log.times, log.parts, users) if key is not None]
    order = np.lexsort(keys)
    told = log.ties or _ties_name(ties, ties_seed)
    if log.times is not None and log.ties is None and ties != "file":
        order = _break_ties(order, keys, items, None if ties == "item" else ties_seed)
    users, items = users[order], items[order]
    ratings = None if log.ratings is None else log.ratings[order]
    keep, steps = clean(users, items, ratings, cleaning or Cleaning())
    order = order[keep]
    users, user_ids = used_only(users[keep], user_ids)
    items, item_ids = used_only(items[keep], item_ids)
    if len(user_ids) < 2:
        raise BadInput("data.source", log.name, "a log with two users or more")
    items += 1  # 0 is padding
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))]).astype(np.int64)
    times, tied, given = None, None, None
    if log.times is not None:
        tied = tied_neighbours(offsets, log.times[order])
        times = np.floor(log.times[order]).astype(np.int64)
    if log.parts is not None:  # where each user's training and validation interactions end, (U, 2)
        parts = log.parts[order]
        ends = [np.bincount(users[parts <= part], minlength=len(user_ids)) for part in (0, 1)]
        given = offsets[:-1, None] + np.stack(ends, axis=1).astype(np.int64)
    titles, warnings = None, [*log.notes, *order_warnings(offsets, items, tied, item_ids, told)]
    if log.titles:
        stripped = {item.strip(): title for item, title in log.titles.items()}
        titles = [stripped.get(item, "")[:LONGEST_TITLE] for item in item_ids]
        if untitled := titles.count(""):
            warnings.append(f"{untitled:,} of {len(item_ids):,} items have no title")
        common = [(title, n) for title, n in Counter(filter(None, titles)).most_common() if n > 1]
        shared = sum(n for _, n in common)
        if shared > FEW_SHARED * len(item_ids):
            warnings.append(
                f"{shared:,} of {len(item_ids):,} items share their title with another, such as "
                f"{short(common[0][0], 40)}: by their titles these are one item"
            )
    table = {"item_id": item_ids} | ({} if titles is None else {"title": titles})
    return Sequences(
        name=name or log.name,
        offsets=offsets,
        items=items,
        times=times,
        given=given,
        n_items=len(item_ids),
        read_items=lambda: table,
        read_users=lambda: {"user_id": user_ids},
        notes=log.notes,
        warnings=tuple(warnings),
        statistics=statistics(offsets, items, times, tied, len(item_ids), told),
        cleaning=steps,
        fingerprint=_fingerprint(offsets, items, times, given, item_ids, user_ids, titles),
        columns=log.columns,
    )


def _clean_further(sequences: Sequences, name: str | None, rules: Cleaning) -> Sequences:
    if rules == Cleaning():
        return replace(sequences, name=name or sequences.name)
    users = np.repeat(np.arange(sequences.n_users, dtype=np.int32), np.diff(sequences.offsets))
    parts, names = None, sequences.item_ids.tolist()
    if sequences.given is not None:
        rows = np.arange(sequences.n_interactions)
        parts = (rows[:, None] >= sequences.given[users]).sum(1).astype(np.int8)
    log = Log(
        users=Ids(users, sequences.user_ids.tolist()),
        items=Ids(np.asarray(sequences.items) - 1, names),
        times=None if sequences.times is None else np.asarray(sequences.times),
        parts=parts,
        titles={i: title for i, title in zip(names, sequences.titles or [], strict=False) if title},
        name=sequences.name,
        notes=sequences.notes,
        ties=str(sequences.statistics.get("ties")),
        columns=sequences.columns,
    )
    cleaned = order_log(log, name=name, cleaning=rules)
    return replace(cleaned, cleaning=(*sequences.cleaning, *cleaned.cleaning[1:]))


def _break_ties(
    order: np.ndarray, keys: list[np.ndarray], items: np.ndarray, seed: int | None
) -> np.ndarray:
    """Rows in ``order`` (N,) of the keys, those with equal keys by item, or at random by a seed.

    Always sorted by item first, so that the random order does not depend on the file's.
    """
    starts = np.zeros(len(order), dtype=bool)  # of each group of equal keys
    for key in keys:
        starts[1:] |= np.diff(key[order]) != 0
    starts[:1] = True
    groups = np.cumsum(starts)
    places = np.flatnonzero(np.bincount(groups)[groups] > 1)  # of rows that share their keys
    rows, groups = order[places], groups[places]
    by_item = np.lexsort((items[rows], groups))
    if seed is not None:
        by_item = by_item[np.lexsort((np.random.default_rng(seed).random(len(rows)), groups))]
    order[places] = rows[by_item]
    return order


def _ties_name(ties: Ties, seed: int) -> str:
    return {"random": f"random, seed {seed}", "file": "as in the file", "item": "by item"}[ties]


def _fingerprint(*contents: np.ndarray | list[str] | None) -> str:
    digest = hashlib.sha256()
    for content in contents:
        if content is None:
            digest.update(b"none;")
        elif isinstance(content, list):
            text = json.dumps(content, ensure_ascii=True)
            digest.update(f"text {len(text)};{text}".encode())
        else:
            digest.update(f"{content.dtype.kind}{content.dtype.itemsize} {content.shape};".encode())
            digest.update(content.astype(content.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
