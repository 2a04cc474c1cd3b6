"""A log out of Arrow columns, however they were read; refuses what a log can't have, by its row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from depthprobe.data.log import Ids, Log
from depthprobe.data.readers.streams import FIELD, stem
from depthprobe.data.readers.times import (
    Where,
    filled,
    row_number,
    to_numbers,
    to_seconds,
    type_name,
)
from depthprobe.study import BadInput

EXACT = 2**53  # whole numbers up to here are exact as float64


def log_of(found: Mapping[str, Any], *, source: Path, where: Where = row_number) -> Log:
    """A log of chunked columns named by what they hold; ``where`` is what a message calls a row.

    ``found`` has ``user`` and ``item``, and may have ``time``, ``rating`` and ``title``.

    Raises:
        BadInput: if there is no row, or a value is missing or of no use.
    """
    if not len(found["user"]):
        raise BadInput(FIELD, source, "a log with at least one interaction; it has none")
    users = to_ids(found["user"], "user", source=source, where=where)
    items = to_ids(found["item"], "item", source=source, where=where)
    times, ratings = None, None
    notes: tuple[str, ...] = ()
    if "time" in found:
        times, notes = to_seconds(found["time"], source=source, where=where)
    if "rating" in found:
        ratings = to_numbers(found["rating"], "rating", source=source, where=where)
        ratings = ratings.astype(np.float64, copy=False)
    titles = _titles(found["title"], items, source=source) if "title" in found else {}
    return Log(users, items, times, ratings, titles=titles, name=stem(source), notes=notes)


def to_ids(column: Any, what: str, *, source: Path, where: Where = row_number) -> Ids:
    """Number a chunked column of ids by first appearance; texts stay exactly as they are.

    Floats are taken where all are whole: some tool made them of integers, as pandas does beside
    missing values. A dictionary's values must be distinct and in use, as a reader of text has it.

    Raises:
        BadInput: if an id is missing, over more than one line, or of a type that no id has.
    """
    column = filled(column, what, source=source, where=where)
    if pa.types.is_dictionary(column.type):
        encoded = column.unify_dictionaries().combine_chunks()
    else:  # one chunk first: each would have a dictionary of all, and their union takes long
        column = _with_ids(column, what, source=source, where=where)
        encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()  # (N,), int32
    texts = encoded.dictionary.cast(pa.large_string())
    for at_fault, fault in (
        (r"^\s*$", f"no {what}; every row needs one"),
        (r"[\r\n\x00]", f"a line break or a NUL in the {what}"),
    ):
        code = pc.index(pc.match_substring_regex(texts, at_fault), True).as_py()
        if code >= 0:
            row = int(np.argmax(codes == code))
            raise BadInput(FIELD, source, f"{where(row)} has {fault}")
    return Ids(codes, texts.to_numpy(zero_copy_only=False).tolist())


def _with_ids(column: Any, what: str, *, source: Path, where: Where) -> Any:
    """The column as integers or as texts in UTF-8."""
    kind = column.type
    if pa.types.is_floating(kind):
        values = column.to_numpy()
        wrong = (values != np.trunc(values)) | (np.abs(values) > EXACT)
        if wrong.any():
            row = int(np.argmax(wrong))
            allowed = f"{where(row)} has the {what} {values[row]}; ids are texts or whole numbers"
            raise BadInput(FIELD, source, allowed)
        return pa.chunked_array([values.astype(np.int64)])
    if pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0):
        return column
    if any(is_kind(kind) for is_kind in _TEXTS):
        try:
            return column.cast(pa.large_string())
        except pa.ArrowInvalid as error:
            allowed = f"ids in UTF-8; a {what} in it is not"
            raise BadInput(FIELD, source, allowed) from error
    allowed = f"the {what} column has the type {type_name(kind)}; ids are texts or integers"
    raise BadInput(FIELD, source, allowed)


_TEXTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
)


def _titles(column: Any, items: Ids, *, source: Path) -> dict[str, str]:
    """The first title that is not blank of each item that has one, its blanks collapsed."""
    try:
        texts = column.cast(pa.large_string()).dictionary_encode().combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        allowed = f"the title column has the type {type_name(column.type)}; expected texts"
        raise BadInput(FIELD, source, allowed) from error
    titles = [" ".join(text.split()) for text in texts.dictionary.to_pylist()]
    told = np.array([bool(title) for title in [*titles, ""]])  # the last one stands for null
    codes = texts.indices.fill_null(len(titles)).to_numpy()
    rows = np.flatnonzero(told[codes])
    codes_of_items, first = np.unique(items.codes[rows], return_index=True)
    return {
        items.names[item]: titles[codes[row]]
        for item, row in zip(codes_of_items.tolist(), rows[first].tolist(), strict=True)
    }
