"""Logs with a record a line: JSON lines (an interaction) and sequence files (a user)."""

from __future__ import annotations

import codecs
import re
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from depthprobe.data.log import Ids, Log, encode_ids
from depthprobe.data.readers.arrow import log_of
from depthprobe.data.readers.columns import REQUIRED, find_columns
from depthprobe.data.readers.streams import BLOCK, FIELD, head, open_lines, open_text, stem
from depthprobe.errors import BadInput, short
from depthprobe.study import Columns

TYPES: dict[Any, set[type]] = {pa.string(): {str}, pa.int64(): {int}, pa.float64(): {int, float}}
SAMPLE = 1000  # lines that tell the columns of JSON lines, and ids from prose
JSON_LINES = "expected JSON lines, one object a line"
SEQUENCES = "a log has one user a line: 'user item item ...', ids without blanks, oldest item first"
LONGEST_ID = 128  # characters

# what ids don't hold, and prose, JSON, CSV, XML and markdown do
_FOREIGN = re.compile(r"[{}\[\]()<>\"'`,;\x00-\x08\x0a-\x1f\x7f]")
_PLAIN = re.compile(r"[\w:\-./]*\w")  # no full stop, question mark or colon at its end
_DECIMAL = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?", re.IGNORECASE)


def read_json(path: Path, columns: Columns) -> Log:
    """Read the wanted columns of JSON lines, such as Amazon's reviews; ignore what else is there.

    The first lines tell the columns and whether each holds texts or numbers.
    """
    if head(path).lstrip().startswith("["):
        raise BadInput(FIELD, path, f"it is a JSON array; {JSON_LINES}")
    sample = [record for _, record in islice(_objects(path, dict[str, Any]), SAMPLE)]
    if not sample:
        raise BadInput(FIELD, path, f"it is empty; {JSON_LINES}")
    names = list(dict.fromkeys(name for one in sample for name in one))
    wanted = {what: names[at] for what, at in find_columns(names, columns, source=path).items()}
    kinds = {
        what: _kind(what, [one.get(name) for one in sample], source=path)
        for what, name in wanted.items()
    }
    # msgspec decodes these keys alone: most of a review is its text
    row = msgspec.defstruct("Row", [(what, Any, None) for what in wanted], rename=wanted)

    def where(at: int) -> str:
        return f"line {next(islice(_objects(path, row), at, None))[0]}"

    chunks: dict[str, list[Any]] = {what: [] for what in wanted}
    rows = 0
    for part in _blocks(path, row):
        for what, kind in kinds.items():
            values = [getattr(one, what) for one in part]
            if wrong := set(map(type, values)) - TYPES[kind] - {type(None)}:
                at = next(at for at, value in enumerate(values) if type(value) in wrong)
                fault = f"{where(rows + at)} has {short(values[at], 40)} as the {what}"
                expected = "a text" if kind == pa.string() else "a number"
                raise BadInput(FIELD, path, f"{fault}; expected {expected}, as in the first lines")
            try:
                chunks[what].append(pa.array(values, kind))
            except OverflowError as error:
                fault = f"it can't be read: some {what} is a number of more than 64 bits"
                raise BadInput(FIELD, path, fault) from error
        rows += len(part)
    chosen = {what: pa.chunked_array(parts) for what, parts in chunks.items()}
    return log_of(chosen, source=path, where=where)


def _blocks(path: Path, kind: Any) -> Iterator[list[Any]]:
    """The objects of a block of lines at a time: much faster than line by line."""
    decode, rest = msgspec.json.Decoder(kind).decode_lines, b""
    try:
        with open_text(path) as stream:
            while block := stream.read(BLOCK):
                lines, end, rest = (rest + block).rpartition(b"\n")
                yield decode((lines + end).removeprefix(codecs.BOM_UTF8))
        yield decode(rest.removeprefix(codecs.BOM_UTF8))  # the last line need not end
    except (msgspec.DecodeError, RecursionError):
        deque(_objects(path, kind), maxlen=0)  # raises for the line at fault
        raise


def _objects(path: Path, kind: Any) -> Iterator[tuple[int, Any]]:
    """The objects on the lines that are not blank, each with its line's number."""
    decode = msgspec.json.Decoder(kind).decode
    with open_lines(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield number, decode(line)
            except (msgspec.DecodeError, RecursionError) as error:
                fault = f"line {number} is not JSON, {short(line.strip(), 40)}"
                if isinstance(error, msgspec.ValidationError):
                    fault = f"line {number} is no object"
                raise BadInput(FIELD, path, f"{fault}; {JSON_LINES}") from error


def _kind(what: str, values: list[Any], *, source: Path) -> Any:
    """The Arrow type of a column, by the first value that is not null."""
    first = next((value for value in values if value is not None), "")
    if isinstance(first, bool) or not isinstance(first, str | int | float):
        fault = f"the {what} column has {short(first, 40)}"
        raise BadInput(FIELD, source, f"{fault}; expected a text or a number at the top level")
    if isinstance(first, str):
        return pa.string()
    return pa.int64() if what in REQUIRED and isinstance(first, int) else pa.float64()


def is_sequences(start: str) -> bool:
    """Whether the first line that isn't blank has two words or more, all of them like ids."""
    first = next((line for line in start.split("\n") if line.strip()), "").rstrip("\r")
    return len(first.split()) > 1 and not _FOREIGN.search(first)


def read_sequences(path: Path, columns: Columns) -> Log:
    """Read ``user item item ...``, one user a line, oldest item first.

    A file is refused, with the line's number, where a line has a user and no item, where a user
    has a second line, or where it is some other kind of file; see :func:`_check_ids`.
    """
    for what, name in columns.given().items():
        allowed = f"none for {path}: a sequence file has no columns; another --format may be meant"
        raise BadInput(f"data.columns.{what}", name, allowed)
    rows = _rows(path)
    sample = list(islice(rows, SAMPLE))
    if not sample:
        raise BadInput(FIELD, path, f"the file is empty; {SEQUENCES}")
    _check_ids(path, sample)
    lines: dict[str, int] = {}  # by user
    lengths: list[int] = []

    def items() -> Iterator[str]:
        for number, (user, *own) in chain(sample, rows):
            earlier = lines.setdefault(user, number)
            if earlier != number:
                what = f"is user {user[:40]!r} again, after line {earlier}"
                raise _bad_line(path, number, what)
            lengths.append(len(own))
            yield from own

    encoded = encode_ids(items())
    users = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Log(users=Ids(users, list(lines)), items=encoded, name=stem(path))


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines that aren't blank: number and words, the user first."""
    with open_lines(path) as lines:
        for number, line in enumerate(lines, 1):
            row = line.split()
            foreign = _FOREIGN.search(line.rstrip("\r\n")) if row else None
            if foreign:
                raise _bad_line(path, number, f"has {foreign.group()!r}")
            if len(row) == 1:
                raise _bad_line(path, number, f"has a single word, {row[0][:40]!r}")
            if row and (longest := max(map(len, row))) > LONGEST_ID:
                raise _bad_line(path, number, f"has a word of {longest} characters")
            if row:
                yield number, row


def _check_ids(path: Path, sample: list[tuple[int, list[str]]]) -> None:
    """Tell ids from words and numbers.

    Brackets, quotes, commas and semicolons tell JSON, CSV and most prose. Beyond that, ids nearly
    always hold digits; items that are words pass only if they have no punctuation at their ends,
    most of them recur on other lines, and no user's id is also an item's, which is not so in prose.
    """
    first, start = sample[0]
    # without the first line, which may be a header
    items = [item for _, row in sample[1:] or sample for item in row[1:]]
    with_digit = sum(any(c.isdigit() for c in item) for item in items) / len(items)
    if with_digit >= 0.9:
        if not any(c.isdigit() for word in start for c in word):
            raise _bad_line(path, first, "looks like a header: no id in it has a digit")
        if sum(_DECIMAL.fullmatch(item) is not None for item in items) > len(items) / 2:
            raise _bad_line(path, first, "and those after it hold decimal numbers, not ids")
        return
    for number, row in sample:
        odd = next((word for word in row if not _PLAIN.fullmatch(word)), None)
        if odd is not None:
            raise _bad_line(path, number, f"has {odd[:40]!r}, and most ids hold no digit: prose?")
    items = [item for _, row in sample for item in row[1:]]
    lines_with = Counter(item for _, row in sample for item in set(row[1:]))
    recurring = sum(lines_with[item] > 1 for item in items) / len(items)
    if recurring < 0.5 or any(row[0] in lines_with for _, row in sample):
        raise _bad_line(path, first, "and those after it hold words, not ids: prose?")


def _bad_line(path: Path, number: int, what: str) -> BadInput:
    return BadInput(FIELD, path, f"line {number} {what}; {SEQUENCES}")
