"""Numbers and times out of Arrow columns: what is missing or no number is refused with its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
LARGEST = 1e20

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_ZONE = r":\d\d(\.\d+)?(Z|[+-]\d\d(:?\d\d)?)$"
_ISO = "a number, or an ISO date or time such as 2024-05-31T18:30:00Z"

Where = Callable[[int], str]


def row_number(row: int) -> str:
    """What a message calls a row, of 0 and up, where it has no line of its own."""
    return f"row {row + 1}"


def to_seconds(
    column: Any, *, source: Path, where: Where = row_number
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Seconds since 1970, (N,), of an Arrow column, and notes on what had to be decided.

    Numbers, and texts of numbers, are seconds, milliseconds, microseconds or nanoseconds, which
    their magnitude tells apart. Texts are ISO dates and times otherwise. A time without a zone is
    in UTC. Whole seconds come as int64, others as float64, so that order is kept down
    to the microsecond.

    Raises:
        BadInput: if a time is missing, negative, infinite or no time, or of another magnitude than
            the others; the message names the row.
    """
    column = plain(column)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return _from_dates(column, source=source, where=where), ()
    if _is_text(column.type):
        column = filled(column, "time", source=source, where=where)
        if not pc.match_substring_regex(column[:1], _NUMBER)[0].as_py():
            return _from_texts(column, source=source, where=where)
    numbers = to_numbers(column, "time", source=source, where=where)
    _refuse_first(numbers < 0, numbers, "a negative time", source=source, where=where)
    _refuse_first(
        numbers > LARGEST, numbers, "a time too late to be one", source=source, where=where
    )
    units = np.searchsorted(BOUNDS, numbers)  # (N,): places in UNITS
    if (units != units[0]).any():
        row = int(np.argmax(units != units[0]))
        first, other = (list(UNITS)[units[at]] for at in (0, row))
        allowed = f"times of one unit: {where(0)} has {first}, {where(row)} has {other}"
        raise BadInput(FIELD, source, f"{allowed} ({numbers[0]} and {numbers[row]})")
    unit, factor = list(UNITS.items())[units[0]]
    notes = () if factor == 1 else (f"timestamps look like {unit}: divided by {factor}",)
    return _divide(numbers, factor), notes


def to_numbers(column: Any, what: str, *, source: Path, where: Where = row_number) -> np.ndarray:
    """The finite numbers of an Arrow column of numbers or their texts, int64 or float64 (N,).

    Raises:
        BadInput: if a value is missing, NaN, infinite or no number; the message names the row.
    """
    column = filled(plain(column), what, source=source, where=where)
    kind = column.type
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or _is_text(kind)
    ):
        raise BadInput(FIELD, source, f"the {what} column has the type {type_name(kind)}")
    numbers = None
    if pa.types.is_integer(kind) or _is_text(kind):
        numbers = _cast(column, pa.int64())
    if numbers is None:
        numbers = _cast(column, pa.float64())
    if numbers is None:
        row = _first_failure(column, pa.float64())
        text = short(column[row].as_py(), 40)
        raise BadInput(FIELD, source, f"{where(row)} has the {what} {text}, which is no number")
    values: np.ndarray = numbers.to_numpy()
    _refuse_first(~np.isfinite(values), values, f"no finite {what}", source=source, where=where)
    return values


def plain(column: Any) -> Any:
    """The column without a dictionary, its texts as ``large_string`` without blanks around."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_text(column.type):
        column = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    return column


def filled(column: Any, what: str, *, source: Path, where: Where) -> Any:
    """The column, if no value is null, NaN or an empty text.

    Raises:
        BadInput: otherwise; the message names the row.
    """
    missing = column.is_null(nan_is_null=True)
    if _is_text(column.type):
        missing = pc.or_(missing, pc.fill_null(pc.equal(column, ""), True))
    row = pc.index(missing, True).as_py()
    if row >= 0:
        raise BadInput(FIELD, source, f"{where(row)} has no {what}; every row needs one")
    return column


def type_name(kind: Any) -> str:
    """An Arrow type as a message shows it: in one line, cut where it is long."""
    return " ".join(str(kind).split())[:60]


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _from_dates(column: Any, *, source: Path, where: Where) -> np.ndarray:
    """Seconds of timestamps or dates; a timestamp with a zone is held in UTC."""
    column = filled(column, "time", source=source, where=where)
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s" if pa.types.is_date32(column.type) else "ms"))
    factor = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
    values = column.cast(pa.int64()).to_numpy()
    _refuse_first(values < 0, column, "a time before 1970", source=source, where=where)
    return _divide(values, factor)


def _from_texts(column: Any, *, source: Path, where: Where) -> tuple[np.ndarray, tuple[str, ...]]:
    # `2024-05-31 18:30:00 UTC`, as BigQuery writes it
    column = pc.replace_substring_regex(column, r"\s*(UTC|GMT|z)$", "Z")
    zoned = pc.match_substring_regex(column, _ZONE).to_numpy()
    times = np.empty(len(column), dtype=np.int64)
    for part, kind in ((zoned, pa.timestamp("ns", "UTC")), (~zoned, pa.timestamp("ns"))):
        texts = column.filter(pa.array(part))
        found = _cast(texts, kind)
        if found is None:
            row = int(np.flatnonzero(part)[_first_failure(texts, kind)])
            text = short(column[row].as_py(), 40)
            raise BadInput(FIELD, source, f"{where(row)} has the time {text}; expected {_ISO}")
        times[part] = found.cast(pa.int64()).to_numpy()
    _refuse_first(times < 0, column, "a time before 1970", source=source, where=where)
    local = pc.any(pc.match_substring(column.filter(pa.array(~zoned)), ":")).as_py()
    return _divide(times, 10**9), ("times without a zone are read as UTC",) if local else ()


def _divide(values: np.ndarray, factor: int) -> np.ndarray:
    """Seconds, int64 where all are whole."""
    whole, rest = np.divmod(values, factor)
    return whole + rest / factor if rest.any() else whole.astype(np.int64)


def _cast(column: Any, kind: Any) -> Any:
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        return None


def _first_failure(column: Any, kind: Any) -> int:
    """The first row that can't be cast, of a column that can't: bisection, O(N) in all."""
    start, stop = 0, len(column)
    while stop - start > 1:
        middle = (start + stop) // 2
        if _cast(column.slice(start, middle - start), kind) is None:
            stop = middle
        else:
            start = middle
    return start


def _refuse_first(wrong: np.ndarray, values: Any, what: str, *, source: Path, where: Where) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise BadInput(
            FIELD, source, f"{where(row)} has {what}, {short(str(values[row]), 40)[1:-1]}"
        )


# A log out of Arrow columns, however they were read; refuses what a log can't have, by its row.

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
