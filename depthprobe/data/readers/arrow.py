"""Ids, numbers and times out of Arrow columns; an unusable value is refused with its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from depthprobe.data.log import Ids, Log
from depthprobe.data.readers.streams import FIELD, stem
from depthprobe.errors import BadInput, short

# seconds of today have 10 digits; the bounds are the years 5138 (as s), 1973 (as ms, us, ns)
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
BOUNDS = (1e11, 1e14, 1e17)
LARGEST = 1e20  # a time
EXACT = 2**53  # whole numbers up to here are exact as float64

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_ZONE = r":\d\d(\.\d+)?(Z|[+-]\d\d(:?\d\d)?)$"
_ISO = "a number, or an ISO date or time such as 2024-05-31T18:30:00Z"
_TEXTS = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    *(pa.types.is_binary, pa.types.is_large_binary),
)

Where = Callable[[int], str]


def row_number(row: int) -> str:
    """What a message calls a row, of 0 and up, where it has no line of its own."""
    return f"row {row + 1}"


@dataclass(frozen=True)
class Column:
    """A chunked Arrow column of a file: what it holds, and how messages name its rows."""

    values: Any
    what: str
    source: Path
    where: Where = row_number

    def plain(self) -> Column:
        """Without a dictionary or blanks around texts, every row filled."""
        values = self.values
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if _is_text(values.type):
            values = pc.utf8_trim_whitespace(values.cast(pa.large_string()))
        column = replace(self, values=values)
        column.check_filled()
        return column

    def check_filled(self) -> None:
        """Refuse nulls, NaN and empty texts."""
        missing = self.values.is_null(nan_is_null=True)
        if self.values.type == pa.large_string():
            missing = pc.or_(missing, pc.fill_null(pc.equal(self.values, ""), True))
        row = pc.index(missing, True).as_py()
        if row >= 0:
            raise self.refusal(row, f"has no {self.what}; every row needs one")

    def check(self, wrong: np.ndarray, fault: str, values: Any) -> None:
        """Refuse the first row that is wrong, and show its value."""
        if wrong.any():
            row = int(np.argmax(wrong))
            raise self.refusal(row, f"has {fault}, {short(str(values[row]), 40)[1:-1]}")

    def refusal(self, row: int, fault: str) -> BadInput:
        """The error that names a row."""
        return BadInput(FIELD, self.source, f"{self.where(row)} {fault}")

    def wrong_type(self, expected: str) -> BadInput:
        """The error that names the column's type."""
        kind = " ".join(str(self.values.type).split())[:60]
        fault = f"the {self.what} column has the type {kind}; expected {expected}"
        return BadInput(FIELD, self.source, fault)


def log_of(columns: Mapping[str, Any], *, source: Path, where: Where = row_number) -> Log:
    """A log of Arrow columns: ``user`` and ``item``, maybe ``time``, ``rating`` and ``title``."""
    if not len(columns["user"]):
        raise BadInput(FIELD, source, "a log with at least one interaction; it has none")
    given = {what: Column(values, what, source, where) for what, values in columns.items()}
    users, items = to_ids(given["user"]), to_ids(given["item"])
    times, notes = to_seconds(given["time"]) if "time" in given else (None, ())
    ratings = None
    if "rating" in given:
        ratings = to_numbers(given["rating"]).astype(np.float64, copy=False)
    titles = _titles(given["title"], items) if "title" in given else {}
    return Log(users, items, times, ratings, titles=titles, name=stem(source), notes=notes)


def to_ids(column: Column) -> Ids:
    """Number ids by first appearance; texts stay exactly as they are.

    Floats are taken where all are whole: some tool made them of integers, as pandas does beside
    missing values. A dictionary's values must be distinct and in use, as a reader of text has it.
    """
    column.check_filled()
    if pa.types.is_dictionary(column.values.type):
        encoded = column.values.unify_dictionaries().combine_chunks()
    else:  # one chunk first: each would have a dictionary of all, and their union takes long
        encoded = _as_ids(column).combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()  # (N,), int32
    texts = encoded.dictionary.cast(pa.large_string())
    for form, fault in (
        (r"^\s*$", f"has no {column.what}; every row needs one"),
        (r"[\r\n\x00]", f"has a line break or a NUL in the {column.what}"),
    ):
        code = pc.index(pc.match_substring_regex(texts, form), True).as_py()
        if code >= 0:
            raise column.refusal(int(np.argmax(codes == code)), fault)
    return Ids(codes, texts.to_numpy(zero_copy_only=False).tolist())


def to_numbers(column: Column) -> np.ndarray:
    """The finite numbers of a column of numbers or their texts, int64 or float64 (N,)."""
    column = column.plain()
    kind = column.values.type
    whole = pa.types.is_integer(kind) or _is_text(kind)
    if not (whole or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise column.wrong_type("numbers")
    numbers = _cast(column.values, pa.int64()) if whole else None
    if numbers is None:
        numbers = _cast(column.values, pa.float64())
    if numbers is None:
        row = _first_failure(column.values, pa.float64())
        text = short(column.values[row].as_py(), 40)
        raise column.refusal(row, f"has the {column.what} {text}, which is no number")
    values: np.ndarray = numbers.to_numpy()
    column.check(~np.isfinite(values), f"no finite {column.what}", values)
    return values


def to_seconds(column: Column) -> tuple[np.ndarray, tuple[str, ...]]:
    """Seconds since 1970, (N,), and notes on what had to be decided.

    Numbers, and texts of numbers, are seconds, milliseconds, microseconds or nanoseconds, which
    their magnitude tells apart. Texts are ISO dates and times otherwise. A time without a zone is
    in UTC. Whole seconds come as int64, others as float64, so that order is kept down
    to the microsecond.
    """
    column = column.plain()
    kind = column.values.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _from_dates(column), ()
    if _is_text(kind) and not pc.match_substring_regex(column.values[:1], _NUMBER)[0].as_py():
        return _from_texts(column)
    numbers = to_numbers(column)
    column.check((numbers < 0) | (numbers > LARGEST), "a time before 1970 or too late", numbers)
    units = np.searchsorted(BOUNDS, numbers)  # (N,): places in UNITS
    if (units != units[0]).any():
        row = int(np.argmax(units != units[0]))
        first, other = (f"{column.where(at)} has {list(UNITS)[units[at]]}" for at in (0, row))
        fault = f"times of one unit: {first}, {other} ({numbers[0]} and {numbers[row]})"
        raise BadInput(FIELD, column.source, fault)
    unit, factor = list(UNITS.items())[units[0]]
    notes = () if factor == 1 else (f"timestamps look like {unit}: divided by {factor}",)
    return _divide(numbers, factor), notes


def _is_text(kind: Any) -> bool:
    return any(is_kind(kind) for is_kind in _TEXTS)


def _as_ids(column: Column) -> Any:
    """The column as integers or as texts in UTF-8."""
    kind = column.values.type
    if pa.types.is_floating(kind):
        values = column.values.to_numpy()
        wrong = (values != np.trunc(values)) | (np.abs(values) > EXACT)
        column.check(wrong, f"no text or whole number as the {column.what}", values)
        return pa.chunked_array([values.astype(np.int64)])
    if pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0):
        return column.values
    texts = _cast(column.values, pa.large_string()) if _is_text(kind) else None
    if texts is None:
        raise column.wrong_type("texts in UTF-8, or integers")
    return texts


def _titles(column: Column, items: Ids) -> dict[str, str]:
    """The first title that is not blank of each item that has one, its blanks collapsed."""
    texts = _cast(column.values, pa.large_string())
    if texts is None:
        raise column.wrong_type("texts")
    texts = texts.dictionary_encode().combine_chunks()
    titles = [" ".join(text.split()) for text in texts.dictionary.to_pylist()]
    usable = np.array([bool(title) for title in [*titles, ""]])  # the last one stands for null
    codes = texts.indices.fill_null(len(titles)).to_numpy()
    rows = np.flatnonzero(usable[codes])
    codes_of_items, first = np.unique(items.codes[rows], return_index=True)
    return {
        items.names[item]: titles[codes[row]]
        for item, row in zip(codes_of_items.tolist(), rows[first].tolist(), strict=True)
    }


def _from_dates(column: Column) -> np.ndarray:
    """Seconds of timestamps or dates; a timestamp with a zone is held in UTC."""
    kind = pa.timestamp("us", getattr(column.values.type, "tz", None))
    values = column.values.cast(kind, safe=False).cast(pa.int64()).to_numpy()
    column.check(values < 0, "a time before 1970", column.values)
    return _divide(values, 10**6)


def _from_texts(column: Column) -> tuple[np.ndarray, tuple[str, ...]]:
    # `2024-05-31 18:30:00 UTC`, as BigQuery writes it
    texts = pc.replace_substring_regex(column.values, r"\s*(UTC|GMT|z)$", "Z")
    zoned = pc.match_substring_regex(texts, _ZONE).to_numpy()
    times = np.empty(len(texts), dtype=np.int64)
    for part, kind in ((zoned, pa.timestamp("ns", "UTC")), (~zoned, pa.timestamp("ns"))):
        chosen = texts.filter(pa.array(part))
        parsed = _cast(chosen, kind)
        if parsed is None:
            row = int(np.flatnonzero(part)[_first_failure(chosen, kind)])
            fault = f"has the time {short(texts[row].as_py(), 40)}; expected {_ISO}"
            raise column.refusal(row, fault)
        times[part] = parsed.cast(pa.int64()).to_numpy()
    column.check(times < 0, "a time before 1970", texts)
    local = pc.any(pc.match_substring(texts.filter(pa.array(~zoned)), ":")).as_py()
    return _divide(times, 10**9), ("times without a zone are read as UTC",) if local else ()


def _divide(values: np.ndarray, factor: int) -> np.ndarray:
    """Seconds, int64 where all are whole."""
    whole, rest = np.divmod(values, factor)
    return whole + rest / factor if rest.any() else whole.astype(np.int64)


def _cast(values: Any, kind: Any) -> Any:
    """The values in another type, or None where some can't be."""
    try:
        return values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _first_failure(values: Any, kind: Any) -> int:
    """The first row that can't be cast, of a column that can't: bisection, O(N) in all."""
    start, stop = 0, len(values)
    while stop - start > 1:
        middle = (start + stop) // 2
        if _cast(values.slice(start, middle - start), kind) is None:
            stop = middle
        else:
            start = middle
    return start
