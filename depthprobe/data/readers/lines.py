"""Logs with one record per line: JSON lines (an interaction) and sequence files (a user)."""

from __future__ import annotations

import codecs
import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa

from depthprobe.data.log import Ids, Log, encode_ids
from depthprobe.data.readers.arrow import log_of
from depthprobe.data.readers.columns import (
    REQUIRED,
    WANTED,
    Wanted,
    column_map,
    find_columns,
    label_notes,
    refuse_columns,
)
from depthprobe.data.readers.streams import (
    BLOCK,
    FIELD,
    filled_lines,
    head,
    open_bytes,
    split_words,
    stem,
)
from depthprobe.errors import BadInput, short
from depthprobe.study import Columns

INT64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
ARROW = {str: pa.string(), INT64: pa.int64(), float: pa.float64()}
SAMPLE = 1000  # lines to find the columns of JSON lines from
JSON_LINES = "expected JSON lines, one object a line"
SEQUENCES = "a log has one user a line: 'user item item ...', oldest item first"
# half of a surrogate pair, from an emoji cut in two; whole pairs are not matched
_HALF = re.compile(
    rb"(?<!\\)((?:\\\\)*)(?:(\\u[dD][89abAB]..\\u[dD][c-fC-F]..)|\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)

# characters of prose, JSON, CSV, XML and Markdown that ids do not hold
_FOREIGN = re.compile(r"[{}\[\]()<>\"'`,;\x00-\x08\x0a-\x1f\x7f]")

# an item followed by a weight, as in LibSVM files, or by a time
_PAIR = re.compile(r"[0-9]+:-?[0-9]+(\.[0-9]+)?|.+[:@]1[0-9]{9}(\.[0-9]+)?")


def read_json(path: Path, columns: Columns, wanted: Wanted = WANTED) -> Log:
    """Read the wanted columns of JSON lines, such as Amazon's reviews; ignore all others.

    The first lines decide the columns, and whether each holds texts or numbers.
    """
    sample = list(islice(_objects(path, dict[str, Any]), SAMPLE))
    if not sample:
        raise BadInput(FIELD, path, f"it is empty; {JSON_LINES}", fault=True)
    names = list(dict.fromkeys(name for one in sample for name in one))
    places = find_columns(names, columns, source=path, wanted=wanted)
    keys = {what: names[at] for what, at in places.items()}
    kinds = {what: _kind(what, [one.get(name) for one in sample]) for what, name in keys.items()}
    # msgspec decodes only these keys; most of a review is its text
    fields = [(what, kind | None, None) for what, kind in kinds.items()]
    row = msgspec.defstruct("Row", fields, rename=keys)
    decode = msgspec.json.Decoder(row).decode_lines
    chunks: dict[str, list[Any]] = {what: [] for what in keys}
    with open_bytes(path) as stream:
        lines = io.BufferedReader(stream)
        while block := b"".join(lines.readlines(BLOCK)):  # much faster than line by line
            try:
                rows = _whole(decode, block.removeprefix(codecs.BOM_UTF8))
            except (msgspec.DecodeError, RecursionError):
                deque(_objects(path, row), maxlen=0)  # raises for the bad line
                raise
            for what, kind in kinds.items():
                chunks[what].append(pa.array([getattr(one, what) for one in rows], ARROW[kind]))

    def where(at: int) -> str:
        return f"line {next(islice(filled_lines(path), at, None))[0]}"

    table = pa.table({what: pa.chunked_array(parts) for what, parts in chunks.items()})
    log = log_of(table, source=path, where=where, time_format=columns.time_format)
    taken = column_map(names, places, lambda at: (one.get(names[at]) for one in sample))
    return replace(log, notes=(*log.notes, *label_notes(names, columns)), columns=taken)


def _objects(path: Path, kind: Any) -> Iterator[Any]:
    """The object on each non-blank line; a line without one is refused."""
    decode = msgspec.json.Decoder(kind).decode
    for number, line in filled_lines(path):
        try:
            yield _whole(decode, line.encode())
        except (msgspec.DecodeError, RecursionError) as error:
            fault = f"line {number} is {short(line.strip(), 40)} ({error})"
            raise BadInput(FIELD, path, f"{fault}; {JSON_LINES}", fault=True) from error


def _whole(decode: Callable[[bytes], Any], raw: bytes) -> Any:
    """The JSON text with half surrogate pairs as U+FFFD, since msgspec refuses them."""
    try:
        return decode(raw)
    except msgspec.DecodeError:
        return decode(_HALF.sub(lambda m: m[0] if m[2] else m[1] + rb"\ufffd", raw))


def _kind(what: str, values: list[Any]) -> Any:
    """The type of a column, by the first value that is not null."""
    first = next((value for value in values if value is not None), "")
    if not isinstance(first, int | float):  # lists and objects are refused with their line
        return str
    return INT64 if what in REQUIRED and isinstance(first, int) else float


def is_sequences(start: str) -> bool:
    """Whether the first line that isn't blank has two words or more, most of them with a digit.

    This excludes prose; a log whose ids are plain words must name its format.
    """
    first = next((line for line in start.split("\n") if line.strip()), "").rstrip("\r")
    words = first.split()
    digits = sum(any(letter.isdecimal() for letter in word) for word in words)
    return len(words) > 1 and 2 * digits >= len(words) and not _FOREIGN.search(first)


def read_sequences(path: Path, columns: Columns, wanted: Wanted = WANTED) -> Log:
    """Read ``user item item ...``, one user per line, oldest item first.

    Lines are split only at tabs if one of the first has two or more. Refused, with the line: a user
    without an item or with a second line, and characters that no id holds.
    """
    refuse_columns(columns, f"{path}: a sequence file has no columns")
    tabs = any(line.strip().count("\t") > 1 for line in head(path).split("\n"))
    users: dict[str, int] = {}  # the line of each
    lengths: list[int] = []

    def items() -> Iterator[str]:
        for number, line in filled_lines(path):
            user, *own = split_words(line, tabs=tabs)
            earlier = users.setdefault(user, number)
            fault, expected = None, SEQUENCES
            if foreign := _FOREIGN.search(line.rstrip("\r\n")):
                fault = f"has {foreign.group()!r}"
            elif not own:
                fault = f"has a single word, {short(user, 40)}"
            elif "" in own:
                fault = "has two tabs with no item between"
            elif earlier != number:
                fault = f"is user {short(user, 40)} again, after line {earlier}"
                expected += "; --format csv has an interaction a line"
            if fault:
                raise BadInput(FIELD, path, f"line {number} {fault}; {expected}", fault=True)
            lengths.append(len(own))
            yield from own

    encoded = encode_ids(items())
    if not users:
        raise BadInput(FIELD, path, f"the file is empty; {SEQUENCES}", fault=True)
    blanks = next((name for name in encoded.names if " " in name), None)
    notes = [] if blanks is None else [f"lines are split at tabs: {short(blanks, 40)} is one item"]
    pairs = [name for name in encoded.names[:SAMPLE] if _PAIR.fullmatch(name)]
    if 2 * len(pairs) > len(encoded.names[:SAMPLE]):
        notes.append(f"items such as {pairs[0]} look like an item and a value: all of it is the id")
    codes = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Log(Ids(codes, list(users)), encoded, name=stem(path), notes=tuple(notes))
