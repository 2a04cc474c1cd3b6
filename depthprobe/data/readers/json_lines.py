"""Logs as JSON lines: one object a line, such as Amazon's reviews of 2014, 2018 and 2023."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json

from depthprobe.data.log import Log
from depthprobe.data.readers.arrow import log_of, row_number
from depthprobe.data.readers.columns import REQUIRED, find_columns
from depthprobe.data.readers.streams import BLOCK, FIELD, open_bytes, open_text
from depthprobe.errors import BadInput, short
from depthprobe.study import Columns

BOM = b"\xef\xbb\xbf"
LOOKED_AT = 2**22  # bytes at a file's start that tell its columns and their types
EXPECTED = "expected JSON lines, one object a line"


def read_json(path: Path, columns: Columns) -> Log:
    """Read the wanted columns of JSON lines; what else a line holds is ignored.

    The first lines tell the columns and whether each holds texts or numbers.

    Raises:
        BadInput: if a line is no JSON object, lacks a value, or has one of another type; names the
            line.
    """
    sample = _first_objects(path)
    names = list(dict.fromkeys(name for one in sample for name in one))
    places = find_columns(names, columns, source=path)
    schema = {
        names[place]: _kind(what, [one.get(names[place]) for one in sample], source=path)
        for what, place in places.items()
    }
    try:
        with open_text(path) as stream:
            table = pa.json.read_json(
                stream,
                pa.json.ReadOptions(block_size=BLOCK),
                pa.json.ParseOptions(
                    explicit_schema=pa.schema(list(schema.items())),
                    unexpected_field_behavior="ignore",
                ),
            )
    except pa.ArrowInvalid as error:
        _find_fault(path, schema)
        text = " ".join(str(error).split())
        raise BadInput(FIELD, path, f"it can't be read ({text[:120]}); {EXPECTED}") from error

    def where(row: int) -> str:
        found = next(islice(_lines(path), row, None), None)
        return f"line {found[0]}" if found else row_number(row)

    found = {what: table[names[place]] for what, place in places.items()}
    return log_of(found, source=path, where=where)


def _first_objects(path: Path) -> list[dict[str, Any]]:
    with open_text(path) as stream:
        raw = stream.read(LOOKED_AT)
    raw = raw.removeprefix(BOM)
    if raw.lstrip().startswith(b"["):
        raise BadInput(FIELD, path, f"it is a JSON array; {EXPECTED}")
    complete, lines = len(raw) < LOOKED_AT - len(BOM), raw.split(b"\n")
    found = [
        _parsed(line, number, source=path)
        for number, line in enumerate(lines if complete else lines[:-1], 1)
        if line.strip()
    ]
    if not found:
        fault = "its first line is endless" if raw.strip() else "it is empty"
        raise BadInput(FIELD, path, f"{fault}; {EXPECTED}")
    return found


def _kind(what: str, values: list[Any], *, source: Path) -> Any:
    """The Arrow type of a column, by the first value that is not null."""
    first = next((value for value in values if value is not None), "")
    if isinstance(first, bool) or not isinstance(first, str | int | float):
        fault = f"the {what} column has {short(first, 40)}"
        raise BadInput(FIELD, source, f"{fault}; expected a text or a number at the top level")
    if isinstance(first, str):
        return pa.string()
    return pa.int64() if what in REQUIRED and isinstance(first, int) else pa.float64()


def _find_fault(path: Path, schema: dict[str, Any]) -> None:
    """Raise for the first line that is no JSON object, or has another type than the first ones."""
    allowed = {pa.string(): str, pa.int64(): int, pa.float64(): int | float}
    for number, line in _lines(path):
        found = _parsed(line, number, source=path)
        for name, kind in schema.items():
            value = found.get(name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, allowed[kind])
            ):
                fault = f"line {number} has {short(value, 40)} as {short(name, 40)}"
                expected = "a text" if kind == pa.string() else "a number"
                raise BadInput(FIELD, path, f"{fault}; expected {expected}, as in the first lines")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its number."""
    with open_bytes(path) as stream:
        for number, line in enumerate(io.BufferedReader(stream, BLOCK), 1):
            if line.removeprefix(BOM).strip():
                yield number, line.removeprefix(BOM)


def _parsed(line: bytes, number: int, *, source: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        text = short(line.decode(errors="replace").strip(), 40)
        raise BadInput(FIELD, source, f"line {number} is not JSON, {text}; {EXPECTED}") from error
    if not isinstance(found, dict):
        raise BadInput(FIELD, source, f"line {number} is no object; {EXPECTED}")
    return found
