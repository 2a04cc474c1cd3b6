"""Ids, numbers and times from Arrow columns; an unusable value is refused with its row."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from depthprobe.data.log import Ids, Log
from depthprobe.data.readers.columns import DATED, date_formats
from depthprobe.data.readers.streams import FIELD, stem
from depthprobe.errors import BadInput, shell_line, short

# seconds of today have 10 digits; the bounds are the years 5138 (as s), 1973 (as ms, us, ns)
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
BOUNDS = (1e11, 1e14, 1e17)
EARLY, LAST = (
    10**8,
    7_258_118_400,
)  # seconds: March 1973 and the year 2200; logs are in between
# dates as numbers, by their digits: 2024, 202405, 20240531, 2024053118, ..., 20240531183000123
COMPACT = {digits: "%Y%m%d%H%M%S"[: digits - 2] for digits in (4, 6, 8, 10, 12, 14)}
COMPACT[17] = "%Y%m%d%H%M%S%f"

DAY, NO_ZONE = 86_400, "times without a zone are read as UTC"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_LIST = re.compile(r"\[.*\]|\([^,]*,.*\)|[0-9]+([\s,|]+[0-9]+)+")  # several items in a cell
SAMPLE = 1000  # ids to check for lists
_LOCAL = r":\d\d(\.\d+)?$"
_TIME = (
    "a number, or an ISO date or time such as 2024-05-31T18:30:00Z, in the range of 1970 to 2199"
)

Where = Callable[[int], str]


def row_number(row: int) -> str:
    """A row's name in a message (0 is the first), if it has no line number."""
    return f"row {row + 1}"


@dataclass(frozen=True)
class Column:
    """A chunked Arrow column of a file: what it holds, and how messages name its rows."""

    values: Any
    what: str
    source: Path
    where: Where = row_number

    @property
    def is_text(self) -> bool:
        """Whether it holds texts, or bytes that may be texts."""
        kind = str(self.values.type)
        return kind.endswith(("string", "binary", "string_view"))

    def plain(self) -> Column:
        """The column without a dictionary or surrounding blanks; every row must be filled."""
        column = self
        if pa.types.is_dictionary(self.values.type):
            column = replace(self, values=self.values.cast(self.values.type.value_type))
        if column.is_text:
            try:
                texts = pc.utf8_trim_whitespace(column.values.cast(pa.large_string()))
            except pa.ArrowInvalid as error:
                raise self.wrong_type("numbers, or texts in UTF-8") from error
            column = replace(column, values=texts)
            column.check(pc.equal(texts, "").fill_null(True), "one in every row")
        column.check(column.values.is_null(nan_is_null=True), "one in every row")
        return column

    def check(self, wrong: Any, expected: str) -> None:
        """Refuse the first row that is ``wrong``, bool (N,), and show its value."""
        row = int(np.argmax(wrong))
        if not len(wrong) or not bool(wrong[row]):
            return
        try:
            value = self.values[row].as_py()
        except (OverflowError, ValueError):  # a time that Python's datetime can't hold
            value = f"{self.values[row].value} ({self.values.type})"
        shown = short(value if isinstance(value, str | int | float) else str(value), 40)
        blank = value is None or value != value or not str(value).strip()  # NaN differs from itself
        fault = f"has no {self.what}" if blank else f"has the {self.what} {shown}"
        raise BadInput(
            FIELD, self.source, f"{self.where(row)} {fault}; expected {expected}", fault=True
        )

    def wrong_type(self, expected: str) -> BadInput:
        """The error that names the column's type."""
        kind = " ".join(str(self.values.type).split())[:60]
        fault = f"the {self.what} column has the type {kind}; expected {expected}"
        return BadInput(FIELD, self.source, fault, fault=True)


def log_of(
    table: pa.Table, *, source: Path, where: Where = row_number, time_format: str | None = None
) -> Log:
    """A log of the columns ``user`` and ``item``, maybe ``time``, ``rating`` and ``title``."""
    if not len(table):
        raise BadInput(FIELD, source, "a log with at least one interaction (it has none)")
    given = {what: Column(table[what], what, source, where) for what in table.column_names}
    users, items = to_ids(given["user"]), to_ids(given["item"])
    times, notes = to_seconds(given["time"], time_format) if "time" in given else (None, ())
    ratings = to_numbers(given["rating"]).astype(np.float64) if "rating" in given else None
    titles = _titles(given["title"], items) if "title" in given else {}
    return Log(users, items, times, ratings, titles=titles, name=stem(source), notes=notes)


def to_ids(column: Column) -> Ids:
    """Number ids by first appearance; texts stay exactly as they are.

    Floats are accepted if all are whole (pandas makes them of integers with missing values) and
    below the power of two from which several integers share one float. A dictionary's values must
    be distinct and in use.
    """
    column.check(column.values.is_null(nan_is_null=True), "one in every row")
    expected = "texts in UTF-8, or integers"
    values, kind = column.values, column.values.type
    if pa.types.is_dictionary(kind):
        encoded = values.unify_dictionaries().combine_chunks()
    else:  # combine chunks first: otherwise each has its own dictionary, and their union is slow
        if pa.types.is_floating(kind):
            floats = values.to_numpy()
            column.check(floats != np.trunc(floats), expected)
            bits = np.finfo(floats.dtype).nmant + 1
            several = f"below {2**bits:,}, from where several ids are one {floats.dtype}"
            column.check(np.abs(floats.astype(np.float64)) >= 2**bits, f"{expected} {several}")
            values = pa.chunked_array([floats.astype(np.int64)])
        elif column.is_text:
            with suppress(pa.ArrowInvalid):
                values = values.cast(pa.large_string())
        whole = pa.types.is_integer(values.type) or getattr(values.type, "scale", 1) == 0  # decimal
        if not (whole or pa.types.is_large_string(values.type)):
            raise column.wrong_type(expected)
        encoded = values.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()  # (N,), int32
    texts = encoded.dictionary.cast(pa.large_string())
    for unusable, expected in (
        (r"^\s*$", "one in every row"),
        (r"[\r\n\x00]", "one without a line break or a NUL"),
    ):
        wrong = pc.match_substring_regex(texts, unusable).to_numpy(zero_copy_only=False)
        column.check(wrong[codes], expected)
    names: list[str] = texts.to_numpy(zero_copy_only=False).tolist()
    if column.what == "item":
        _refuse_lists(column, names[:SAMPLE])
    return Ids(codes, names)


def _refuse_lists(column: Column, names: list[str]) -> None:
    """Refuse ids that are mostly lists: in brackets, or of several numbers."""
    lists = [name for name in names if _LIST.fullmatch(name.strip())]
    sizes = {len(re.split(r"[\s,|]+", name.strip())) for name in lists}
    if 2 * len(lists) > len(names) and (len(sizes) > 1 or lists[0].lstrip()[0] in "[("):
        fault = (
            f"most of its items are lists, such as {short(lists[0], 40)}; expected one a row, or "
        )
        raise BadInput(FIELD, column.source, f"{fault}lines of 'user item item ...'", fault=True)


def to_numbers(column: Column) -> np.ndarray:
    """The finite numbers of a column of numbers or their texts, int64 or float64 (N,)."""
    column = column.plain()
    kind = column.values.type
    known = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    if not column.is_text and not any(is_kind(kind) for is_kind in known):
        raise column.wrong_type("numbers")
    with suppress(pa.ArrowInvalid):
        whole: np.ndarray = column.values.cast(pa.int64()).to_numpy()
        return whole
    try:
        values = column.values.cast(pa.float64(), safe=False).to_numpy()
    except pa.ArrowInvalid:  # pandas is slower, but tells the bad row
        values = pd.to_numeric(column.values.to_pandas(), errors="coerce").to_numpy()
    column.check(~np.isfinite(values), "a finite number")
    return np.asarray(values)


def to_seconds(
    column: Column, time_format: str | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Seconds since 1970, (N,), and notes on decisions.

    Numbers, and texts of numbers, are seconds, milliseconds, microseconds or nanoseconds, which
    their magnitude tells apart, or dates such as 20240531, if most rows are. Texts are ISO dates
    and times otherwise. With a ``time_format`` all are texts of that form. A time without a zone is
    in UTC. Whole seconds come as int64, others as float64, so that order is kept down to the
    microsecond.
    """
    column = column.plain()
    values, notes, stamps = column.values, [], None
    numbers = np.empty(0)
    if time_format is not None:
        if not column.is_text and not pa.types.is_integer(values.type):
            raise column.wrong_type(f"texts of the form {time_format}")
        texts = values.cast(pa.large_string()).to_pandas()
        try:
            stamps = pd.to_datetime(texts, format=time_format, utc=True, errors="coerce")
        except ValueError as error:  # a code that only Python's strptime knows
            allowed = f"codes that pandas reads, too ({error})"
            raise BadInput("data.columns.time_format", time_format, allowed) from None
        if re.search("%[HI]", time_format) and "%z" not in time_format.lower():
            notes = [NO_ZONE]
    elif column.is_text and not pc.match_substring_regex(values[:1], _NUMBER)[0].as_py():
        # `2024-05-31 18:30:00 UTC`, as BigQuery writes it
        texts = pc.replace_substring_regex(values, r"\s*(UTC|GMT|z)$", "Z")
        if pc.any(pc.match_substring_regex(texts, _LOCAL)).as_py():
            notes = [NO_ZONE]
        stamps = pd.to_datetime(texts.to_pandas(), format="ISO8601", utc=True, errors="coerce")
    elif pa.types.is_date(values.type):
        values = values.cast(pa.date32()).cast(pa.timestamp("s"))
    elif not pa.types.is_timestamp(values.type):
        numbers = to_numbers(column)
        stamps = _compact(numbers)
        if stamps is not None:
            notes = [f"times look like dates, such as {numbers[0]}: read as such, in UTC"]
    if stamps is not None:
        column.check(stamps.isna().to_numpy(), _expected_time(column, time_format))
        values = pa.chunked_array([pa.array(stamps)])
    if pa.types.is_timestamp(values.type):  # a time with a zone is stored in UTC
        factor = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[values.type.unit]
        numbers = values.cast(pa.int64()).to_numpy()
        if not notes and values.type.tz is None and (numbers % (DAY * factor)).any():
            notes = [NO_ZONE]
    else:
        units = np.searchsorted(BOUNDS, numbers)  # (N,): places in UNITS
        if (units != units[0]).any():
            row = int(np.argmax(units != units[0]))
            first, other = (f"{column.where(at)} has {list(UNITS)[units[at]]}" for at in (0, row))
            fault = f"times of one unit: {first}, {other} ({numbers[0]} and {numbers[row]})"
            raise BadInput(FIELD, column.source, fault)
        unit, factor = list(UNITS.items())[units[0]]
        notes = [] if factor == 1 else [f"timestamps look like {unit}: divided by {factor}"]
    whole, rest = np.divmod(numbers, factor)
    column.check((whole < 0) | (whole > LAST), _TIME)
    early = whole < EARLY
    if early.all():
        notes.append("all times are before 1973: if they are not seconds, only their order holds")
    elif early.any():
        row = int(np.argmax(early))
        shown = short(column.values[row].as_py(), 40)
        few = f"{early.sum():,} of {len(early):,} times are before 1973"
        notes.append(f"{few}, the first in {column.where(row)}: {shown}")
    seconds = whole + rest / factor if rest.any() else whole.astype(np.int64)
    return seconds, tuple(notes)


def _expected_time(column: Column, time_format: str | None) -> str:
    if time_format is not None:
        return f"a time of the form {time_format}, in the range of 1970 to 2199"
    forms = date_formats(column.values[:DATED].to_pylist())
    which = f" {' or '.join(map(shell_line, zip(forms, strict=True)))}" if forms else ""
    return f"{_TIME}; for another form say --time-format{which}"


def _compact(numbers: np.ndarray) -> pd.Series | None:
    """The times of a column of mostly dates such as 20240531; NaT for other values.

    Numbers are rarely dates by chance: of those with eight digits that begin with a year, one in
    27.
    """
    digits = len(f"{np.median(numbers):.0f}")
    form, unit = COMPACT.get(digits), 10 ** max(digits - 4, 0)
    years = numbers // unit
    fitting = (years >= 1970) & (years < 2200)
    if form is None or fitting.mean() <= 0.5:
        return None
    texts = pd.Series(numbers).where(fitting, 0).astype(np.int64).astype(str)
    stamps = pd.to_datetime(texts, format=form, errors="coerce")
    return stamps if stamps.notna().mean() > 0.5 else None


def _titles(column: Column, items: Ids) -> dict[str, str]:
    """The first non-blank title of each item that has one, with blanks collapsed."""
    try:
        texts = pc.utf8_trim_whitespace(column.values.cast(pa.large_string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise column.wrong_type("texts") from error
    titles = pa.table({"item": items.codes, "title": texts}).filter(pc.not_equal(texts, ""))
    first = titles.group_by("item", use_threads=False).aggregate([("title", "first")])
    rows = zip(first["item"].to_pylist(), first["title_first"].to_pylist(), strict=True)
    return {items.names[item]: " ".join(title.split()) for item, title in rows}
