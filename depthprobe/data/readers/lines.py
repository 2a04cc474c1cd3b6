"""Logs with a record a line: JSON lines (an interaction) and sequence files (a user)."""

from __future__ import annotations

import codecs
import io
import re
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa

from depthprobe.data.log import Ids, Log, encode_ids
from depthprobe.data.readers.arrow import log_of
from depthprobe.data.readers.columns import REQUIRED, find_columns, refuse_columns
from depthprobe.data.readers.streams import BLOCK, FIELD, filled_lines, open_bytes, stem
from depthprobe.errors import BadInput, short
from depthprobe.study import Columns

INT64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
ARROW = {str: pa.string(), INT64: pa.int64(), float: pa.float64()}
SAMPLE = 1000  # lines that tell the columns of JSON lines
JSON_LINES = "expected JSON lines, one object a line"
SEQUENCES = "a log has one user a line: 'user item item ...', ids without blanks, oldest item first"

# what ids don't hold, and prose, JSON, CSV, XML and markdown do
_FOREIGN = re.compile(r"[{}\[\]()<>\"'`,;\x00-\x08\x0a-\x1f\x7f]")


def read_json(path: Path, columns: Columns) -> Log:
    """Read the wanted columns of JSON lines, such as Amazon's reviews; ignore what else is there.

    The first lines tell the columns and whether each holds texts or numbers.
    """
    sample = list(islice(_objects(path, dict[str, Any]), SAMPLE))
    if not sample:
        raise BadInput(FIELD, path, f"it is empty; {JSON_LINES}", fault=True)
    names = list(dict.fromkeys(name for one in sample for name in one))
    wanted = {what: names[at] for what, at in find_columns(names, columns, source=path).items()}
    kinds = {what: _kind(what, [one.get(name) for one in sample]) for what, name in wanted.items()}
    # msgspec decodes and checks these keys alone: most of a review is its text
    fields = [(what, kind | None, None) for what, kind in kinds.items()]
    row = msgspec.defstruct("Row", fields, rename=wanted)
    decode = msgspec.json.Decoder(row).decode_lines
    chunks: dict[str, list[Any]] = {what: [] for what in wanted}
    with open_bytes(path) as stream:
        lines = io.BufferedReader(stream)
        while block := b"".join(lines.readlines(BLOCK)):  # much faster than line by line
            try:
                rows = decode(block.removeprefix(codecs.BOM_UTF8))
            except (msgspec.DecodeError, RecursionError):
                deque(_objects(path, row), maxlen=0)  # raises for the line at fault
                raise
            for what, kind in kinds.items():
                chunks[what].append(pa.array([getattr(one, what) for one in rows], ARROW[kind]))

    def where(at: int) -> str:
        return f"line {next(islice(filled_lines(path), at, None))[0]}"

    table = pa.table({what: pa.chunked_array(parts) for what, parts in chunks.items()})
    return log_of(table, source=path, where=where)


def _objects(path: Path, kind: Any) -> Iterator[Any]:
    """The object on each line that is not blank; a line that holds none is refused."""
    decode = msgspec.json.Decoder(kind).decode
    for number, line in filled_lines(path):
        try:
            yield decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            fault = f"line {number} is {short(line.strip(), 40)} ({error})"
            raise BadInput(FIELD, path, f"{fault}; {JSON_LINES}", fault=True) from error


def _kind(what: str, values: list[Any]) -> Any:
    """The type of a column, by the first value that is not null."""
    first = next((value for value in values if value is not None), "")
    if isinstance(first, str):
        return str
    return INT64 if what in REQUIRED and isinstance(first, int) else float


def is_sequences(start: str) -> bool:
    """Whether the first line that isn't blank has two words or more, most of them with a digit.

    So prose is none; a log whose ids are plain words is named by its format.
    """
    first = next((line for line in start.split("\n") if line.strip()), "").rstrip("\r")
    words = first.split()
    digits = sum(any(letter.isdecimal() for letter in word) for word in words)
    return len(words) > 1 and 2 * digits >= len(words) and not _FOREIGN.search(first)


def read_sequences(path: Path, columns: Columns) -> Log:
    """Read ``user item item ...``, one user a line, oldest item first.

    Refused, with its line, is a user without an item or with a second line, and what no id holds.
    """
    refuse_columns(columns, f"{path}: a sequence file has no columns")
    users: dict[str, int] = {}  # the line of each
    lengths: list[int] = []

    def items() -> Iterator[str]:
        for number, line in filled_lines(path):
            user, *own = line.split()
            earlier = users.setdefault(user, number)
            fault = None
            if foreign := _FOREIGN.search(line.rstrip("\r\n")):
                fault = f"has {foreign.group()!r}"
            elif not own:
                fault = f"has a single word, {short(user, 40)}"
            elif earlier != number:
                fault = f"is user {short(user, 40)} again, after line {earlier}"
            if fault:
                raise BadInput(FIELD, path, f"line {number} {fault}; {SEQUENCES}", fault=True)
            lengths.append(len(own))
            yield from own

    encoded = encode_ids(items())
    if not users:
        raise BadInput(FIELD, path, f"the file is empty; {SEQUENCES}", fault=True)
    codes = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Log(users=Ids(codes, list(users)), items=encoded, name=stem(path))
