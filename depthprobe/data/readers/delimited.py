"""How a delimited text is laid out, and where its records lie: what messages name lines with."""

from __future__ import annotations

import csv
import io
from codecs import getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthprobe.data.readers.columns import REQUIRED, find_columns, guess_column, listed
from depthprobe.data.readers.streams import BLOCK, FIELD, open_bytes, open_text
from depthprobe.study import BadInput, Columns

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
LOOKED_AT = 2**18  # bytes at a file's start that tell its delimiter and header


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The form of a delimited text.

    Records have ``width`` columns; the first ``skipped``, blank ones and the header, hold no data.
    ``places`` are the wanted columns' places by what they hold.
    """

    delimiter: str
    quoted: bool
    width: int
    skipped: int
    places: dict[str, int]


def layout_of(path: Path, wanted: Columns, *, delimiter: str | None, quoted: bool) -> Layout:
    """Look at a text's first lines; ``delimiter`` None tells it by what splits them alike.

    Raises:
        BadInput: if the file is empty or no text, nothing splits it, or a column isn't found.
    """
    with open_text(path) as stream:
        raw = stream.read(LOOKED_AT)
    text = getincrementaldecoder("utf-8-sig")().decode(raw)
    if not text.strip():
        raise BadInput(FIELD, path, "a table with a header and rows; it is empty")
    split = {
        candidate: _split(text, candidate, quoted=quoted, complete=len(raw) < LOOKED_AT)
        for candidate in ([delimiter] if delimiter else DELIMITERS)
    }
    delimiter = _best(split, source=path)
    rows = split[delimiter]
    skipped = next(at for at, row in enumerate(rows, 1) if row)
    first = [cell.strip() for cell in rows[skipped - 1]]
    header = first
    if _by_number(wanted):
        if all(guess_column(first, what, source=path) is not None for what in REQUIRED):
            allowed = f"its first line is a header ({listed(first)}); name the columns as it does"
            raise BadInput(FIELD, path, allowed)
        header, skipped = [str(at) for at in range(1, len(first) + 1)], 0
    places = find_columns(header, wanted, source=path)
    return Layout(
        delimiter=delimiter, quoted=quoted, width=len(first), skipped=skipped, places=places
    )


def records(path: Path, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """The records after the skipped ones, each with the number of its first line; slow.

    Raises:
        BadInput: if a record has another number of columns or a quote that isn't closed.
    """
    with open_bytes(path) as stream:
        text = io.TextIOWrapper(io.BufferedReader(stream, BLOCK), "utf-8-sig", newline="")
        rows = _reader(text, layout.delimiter, quoted=layout.quoted, strict=True)
        line = 1
        try:
            for at, row in enumerate(rows):
                if row and len(row) != layout.width:
                    expected = f"{layout.width} columns, as the first line has"
                    raise BadInput(FIELD, path, f"line {line} has {len(row)}; expected {expected}")
                if row and at >= layout.skipped:
                    yield line, row
                line = rows.line_num + 1
        except csv.Error as error:
            allowed = f"in the row of line {line} a quote isn't closed, or not at a column's end"
            raise BadInput(FIELD, path, f"{allowed} ({error})") from error


def _reader(text: Any, delimiter: str, *, quoted: bool, strict: bool) -> Any:
    return csv.reader(
        text,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=strict,
    )


def _split(text: str, delimiter: str, *, quoted: bool, complete: bool) -> list[list[str]]:
    rows = []
    try:
        for row in _reader(io.StringIO(text, newline=""), delimiter, quoted=quoted, strict=False):
            rows.append(row)
    except csv.Error:  # a cell larger than any is: a quote that isn't closed
        return rows
    return rows if complete else rows[:-1]


def _best(split: dict[str, list[list[str]]], *, source: Path) -> str:
    """The delimiter that splits the most lines as it does the first, and these the furthest."""
    scores = {}
    for delimiter, rows in split.items():
        widths = [len(row) for row in rows if row]
        if widths and widths[0] > 1:
            scores[delimiter] = (widths.count(widths[0]) / len(widths), widths[0])
    best = [delimiter for delimiter, score in scores.items() if score == max(scores.values())]
    if len(best) == 1:
        return best[0]
    names = " or ".join(DELIMITERS.get(one, repr(one)) for one in best or split)
    fault = "its lines split alike at each" if best else "its first line has none"
    raise BadInput(FIELD, source, f"a table with columns split by {names}; {fault}")


def _by_number(wanted: Columns) -> bool:
    """Whether columns are named by numbers from 1, so that there is no header.

    Never mind what the first row holds: numbers there may be ids, and a row taken for a header
    would be lost without a word. With a 0 among them they are names, as pandas gives them.
    """
    given = wanted.given().values()
    return bool(given) and all(name.isdecimal() and int(name) > 0 for name in given)
