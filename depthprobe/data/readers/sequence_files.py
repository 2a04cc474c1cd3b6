"""Sequence files: ``user item item ...``, one user a line, oldest item first; no times."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from depthprobe.data.log import Ids, Log, encode_ids
from depthprobe.data.readers.streams import FIELD, open_text, stem
from depthprobe.errors import BadInput
from depthprobe.study import Columns

EXPECTED = "a log has one user a line: 'user item item ...', ids without blanks, oldest item first"
LONGEST_ID = 128  # characters
SAMPLE = 1000  # lines that are looked at to tell a log from prose

# what ids don't hold, and prose, JSON, CSV, XML and markdown do
_FOREIGN = re.compile(r"[{}\[\]()<>\"'`,;\x00-\x08\x0a-\x1f\x7f]")
_PLAIN = re.compile(r"[\w:\-./]*\w")  # no full stop, question mark or colon at its end
_DECIMAL = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?", re.IGNORECASE)

Row = tuple[int, list[str]]  # a line's number from 1, and its words: the user, then items


def is_sequences(head: str) -> bool:
    """Whether the first line that isn't blank has two words or more, all of them like ids."""
    first = next((line for line in head.split("\n") if line.strip()), "").rstrip("\r")
    return len(first.split()) > 1 and not _FOREIGN.search(first)


def read_sequences(path: Path, columns: Columns) -> Log:
    """Read ``user item item ...``, one user a line, oldest item first.

    A file is refused, with the line's number, where a line has a user and no item, where a user
    has a second line, or where it is some other kind of file. Brackets, quotes, commas and
    semicolons tell JSON, CSV and most prose. Beyond that, ids nearly always hold digits; items
    that are words pass only if they have no punctuation at their ends, most of them recur on
    other lines, and no user's id is also an item's, which is not so in prose.

    Raises:
        BadInput: for all of these, and for named columns, which such a file does not have.
    """
    for what, name in columns.given().items():
        allowed = f"none for {path}: a sequence file has no columns; another --format may be meant"
        raise BadInput(f"data.columns.{what}", name, allowed)
    rows = _rows(path)
    sample = list(islice(rows, SAMPLE))
    if not sample:
        raise BadInput(FIELD, path, f"the file is empty; {EXPECTED}")
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


def _rows(path: Path) -> Iterator[Row]:
    """The lines that aren't blank, one at a time: what is read of a long log stays small."""
    with open_text(path) as stream:
        text = io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig", newline="\n")
        for number, line in enumerate(text, 1):
            row = line.split()
            foreign = _FOREIGN.search(line.rstrip("\r\n")) if row else None
            if foreign:
                raise _bad_line(path, number, f"has {foreign.group()!r}")
            if len(row) == 1:
                raise _bad_line(path, number, f"has a single word, {row[0][:40]!r}")
            if row:
                longest = max(map(len, row))
                if longest > LONGEST_ID:
                    raise _bad_line(path, number, f"has a word of {longest} characters")
                yield number, row


def _bad_line(path: Path, number: int, what: str) -> BadInput:
    return BadInput(FIELD, path, f"line {number} {what}; {EXPECTED}")


def _check_ids(path: Path, sample: list[Row]) -> None:
    """Tell ids from words and numbers; see :func:`read_sequences`."""
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
