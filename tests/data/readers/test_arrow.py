"""Ids, numbers and times out of Arrow columns, and what is refused there."""

from __future__ import annotations

import datetime as dt
import decimal
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.data.log import encode_ids
from depthprobe.data.readers.arrow import Column, log_of, to_ids, to_numbers, to_seconds
from depthprobe.errors import BadInput

SOURCE = Path("shop.csv")
UTC = dt.UTC
NOON = dt.datetime(2024, 5, 31, 12, 0, 0, tzinfo=UTC)
WORDS = {10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
TEXTS = st.text("ab01 é", min_size=1, max_size=2).filter(str.strip)


def ids(values: Any, kind: Any = None) -> list[str]:
    found = to_ids(Column(pa.chunked_array([pa.array(values, kind)]), "item", SOURCE))
    assert found.codes.dtype == np.int32
    return [found.names[code] for code in found.codes]


@given(
    st.lists(st.lists(TEXTS), min_size=1).filter(any),
    st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
)
def test_ids_of_any_chunks(chunks: list[list[str]], kind: Any) -> None:
    column = pa.chunked_array([pa.array(chunk, pa.string()).cast(kind) for chunk in chunks])
    expected = encode_ids(value for chunk in chunks for value in chunk)
    found = to_ids(Column(column, "item", SOURCE))
    assert found.names == expected.names
    assert found.codes.tolist() == expected.codes.tolist()


def test_ids_stay_as_they_are() -> None:
    assert ids(["007", "7", " 7", "1.0", "NA"]) == ["007", "7", " 7", "1.0", "NA"]
    assert ids([2**63, 7], pa.uint64()) == ["9223372036854775808", "7"]
    assert ids([b"a", b"b"], pa.binary()) == ["a", "b"]
    assert ids([decimal.Decimal(12)], pa.decimal128(38, 0)) == ["12"]


@pytest.mark.parametrize(
    ("kind", "limit"), [(pa.float16(), 2**11), (pa.float32(), 2**24), (pa.float64(), 2**53)]
)
def test_floats_become_whole_where_no_two_integers_are_one(kind: Any, limit: int) -> None:
    fine = np.array([3, limit - 1, 3], kind.to_pandas_dtype())
    assert ids(fine, kind) == ["3", str(limit - 1), "3"]
    for large in (limit, limit + 2, -limit):
        with pytest.raises(BadInput, match=f"row 2 has the item .*below {limit:,}, from where"):
            ids(np.array([3, large], kind.to_pandas_dtype()), kind)


@pytest.mark.parametrize(
    ("values", "kind", "what"),
    [
        (["a", None], None, "row 2 has no item"),
        (["a", "b", "  "], None, "row 3 has no item"),
        (["a", "a", ""], pa.dictionary(pa.int32(), pa.string()), "row 3 has no item"),
        (["a", None], pa.dictionary(pa.int32(), pa.string()), "row 2 has no item"),
        ([1.0, math.nan], None, "row 2 has no item"),
        ([1.0, 2.5], None, "row 2 has the item 2.5; expected texts in UTF-8, or integers"),
        ([1e17], None, "has the item 1e+17; expected"),
        ([math.inf], None, "has the item inf; expected"),
        (["a", "b\nc"], None, "row 2 has the item 'b\\nc'; expected one without a line break"),
        (["a", "b\x00c"], None, "row 2 has the item 'b\\x00c'; expected one without a line break"),
        ([b"\xff"], pa.binary(), "has the type binary; expected texts in UTF-8"),
        ([True], None, "the item column has the type bool"),
        ([decimal.Decimal("1.5")], None, "the item column has the type decimal"),
    ],
)
def test_refused_ids(values: list[Any], kind: Any, what: str) -> None:
    with pytest.raises(BadInput) as caught:
        ids(values, kind)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def columns(**values: list[Any]) -> pa.Table:
    return pa.table(values)


def test_log() -> None:
    times = [1_600_000_003, 1_600_000_002, 1_600_000_001]
    found = columns(user=[1, 1, 2], item=["b", "a", "b"], time=times, rating=["4", "5", "1"])
    log = log_of(found, source=SOURCE)
    assert log.users.names == ["1", "2"]
    assert log.items.codes.tolist() == [0, 1, 0]
    assert log.times is not None
    assert log.times.tolist() == times
    assert log.ratings is not None
    assert log.ratings.tolist() == [4.0, 5.0, 1.0]
    assert log.ratings.dtype == np.float64
    assert (log.name, log.notes, log.titles) == ("shop", (), {})


def test_titles_are_the_first_that_are_told() -> None:
    items = ["a", "b", "a", "c", "b", "c"]
    titles = [None, " Red\n soap ", "Blue", "", "Green", None]
    log = log_of(columns(user=items, item=items, title=titles), source=SOURCE)
    assert log.titles == {"a": "Blue", "b": "Red soap"}
    with pytest.raises(BadInput, match="the title column has the type list"):
        log_of(columns(user=["a"], item=["b"], title=[["c"]]), source=SOURCE)


def test_a_log_has_rows_and_finite_ratings() -> None:
    with pytest.raises(BadInput, match="it has none"):
        log_of(columns(user=[], item=[]), source=SOURCE)
    for rating, what in (
        (None, "no rating"),
        (math.inf, "the rating inf; expected a finite number"),
        (math.nan, "no rat"),
    ):
        found = columns(user=["a", "b"], item=["c", "d"], rating=[1.0, rating])
        with pytest.raises(BadInput, match=f"row 2 has {what}"):
            log_of(found, source=SOURCE)


def seconds(values: list[Any], kind: Any = None) -> np.ndarray:
    return to_seconds(Column(pa.chunked_array([pa.array(values, kind)]), "time", SOURCE))[0]


def refusal(values: list[Any], kind: Any = None) -> str:
    with pytest.raises(BadInput) as caught:
        seconds(values, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(
    st.lists(st.integers(10**9, 4 * 10**9), min_size=1),
    st.sampled_from([1, *WORDS]),
    st.sampled_from([int, float, str]),
    st.booleans(),
)
def test_units_are_told_by_magnitude(whole: list[int], factor: int, form: type, part: bool) -> None:
    raw = [value * factor + (factor // 2 if part else 0) for value in whole]
    column = pa.chunked_array([pa.array([form(value) for value in raw])])
    found, notes = to_seconds(Column(column, "time", SOURCE))
    expected = [value / factor for value in raw]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.dtype == (np.float64 if part and factor > 1 else np.int64)
    assert len(notes) == (factor > 1)
    if notes:
        assert WORDS[factor] in notes[0]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["5", " 7.0 ", "0"], [5, 7, 0]),
        (["5", "7.25", "1e9"], [5, 7.25, 1e9]),
        (["1970-01-01", "1970-01-02"], [0, 86400]),
        (["1970-01-02T00:00:01Z", "1970-01-02 00:00:01.5"], [86401, 86401.5]),
        (["1970-01-02T00:00:00+01:00", "1970-01-01 12:00:00-0130"], [82800, 48600]),
        (["1970-01-02 00:00:01 UTC", "1970-01-02 00:00"], [86401, 86400]),
    ],
)
def test_texts(texts: list[str], expected: list[float]) -> None:
    assert seconds(texts).tolist() == expected
    assert seconds(texts, pa.dictionary(pa.int32(), pa.string())).tolist() == expected
    assert seconds(texts, pa.large_string()).tolist() == expected


@given(st.lists(st.datetimes(dt.datetime(1971, 1, 1), dt.datetime(2200, 1, 1)), min_size=1))
def test_forms_of_a_time_agree(times: list[dt.datetime]) -> None:
    expected = [time.replace(tzinfo=UTC).timestamp() for time in times]
    zone = dt.timezone(dt.timedelta(hours=-5, minutes=-30))
    abroad = [time.replace(tzinfo=UTC).astimezone(zone).isoformat() for time in times]
    for values, kind in (
        (times, pa.timestamp("us")),
        (times, pa.timestamp("ns", "Europe/Berlin")),
        ([time.isoformat() for time in times], pa.string()),
        (abroad, pa.string()),
    ):
        assert seconds(values, kind).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_timestamps_of_any_unit_and_zone(unit: str, zone: str | None) -> None:
    day = dt.date(2024, 5, 31)
    for kind in (pa.date32(), pa.date64()):
        assert seconds([day], kind).tolist() == [NOON.timestamp() - 43200]
    found = seconds([NOON], pa.timestamp(unit, zone))
    assert found.dtype == np.int64
    assert found.tolist() == [NOON.timestamp()]


def test_zones_are_noted_where_there_are_none() -> None:
    def notes(text: str) -> tuple[str, ...]:
        return to_seconds(Column(pa.chunked_array([[text]]), "time", SOURCE))[1]

    assert "UTC" in notes("2024-05-31 12:00:00")[0]
    assert notes("2024-05-31 12:00:00Z") == notes("2024-05-31") == ()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC"])
def test_timestamps_without_a_zone_are_noted_as_texts_are(unit: str, zone: str | None) -> None:
    def notes(*moments: dt.datetime) -> tuple[str, ...]:
        values = pa.chunked_array([pa.array(moments, pa.timestamp(unit, zone))])
        return to_seconds(Column(values, "time", SOURCE))[1]

    midnight = NOON.replace(hour=0)
    assert notes(midnight, NOON) == (() if zone else ("times without a zone are read as UTC",))
    assert notes(midnight) == ()


# days and moments, and how one writes them as a number
MOMENTS = st.datetimes(dt.datetime(1971, 1, 1), dt.datetime(2199, 12, 31))
WRITTEN = {"%Y": "year", "%Y%m": "month", "%Y%m%d": "day", "%Y%m%d%H": "hour"}
WRITTEN |= {"%Y%m%d%H%M": "minute", "%Y%m%d%H%M%S": "second", "%Y%m%d%H%M%S%f": "ms"}


@given(
    st.lists(MOMENTS, min_size=1),
    st.sampled_from(list(WRITTEN)),
    st.sampled_from([int, str, np.float64]),
)
def test_dates_that_are_written_as_numbers(
    moments: list[dt.datetime], form: str, kind: Any
) -> None:
    numbers = [moment.strftime(form) for moment in moments]
    if form.endswith("%f"):
        numbers = [number[:-3] for number in numbers]
        kind = int if kind is np.float64 else kind  # which doesn't hold 17 digits
    expected = [
        dt.datetime.strptime(number, form).replace(tzinfo=UTC).timestamp() for number in numbers
    ]
    column = Column(pa.chunked_array([pa.array([kind(n) for n in numbers])]), "time", SOURCE)
    found, notes = to_seconds(column)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert any(f"look like dates, such as {numbers[0]}" in note for note in notes)


@pytest.mark.parametrize("wrong", [20240230, 99991231, 19000101, 0, 20240532, 202405])
def test_a_row_that_is_no_date_among_those_that_are(wrong: int) -> None:
    assert f"row 3 has the time {wrong}; expected" in refusal([20240531, 20240101, wrong])
    assert f"row 3 has the time '{wrong}'; expected" in refusal(
        ["20240531", "20240101", f"{wrong}"]
    )


@pytest.mark.parametrize(
    "numbers",
    [
        range(1, 4000),  # counts, of which some look like years
        range(19_990_000, 20_010_000),
        [2_024_053_199, 2_024_063_298, 2_024_999_900],  # seconds of 2034
        [20249931, 20241399],
    ],
)
def test_numbers_that_are_no_dates(numbers: Any) -> None:
    assert seconds(list(numbers)).tolist() == list(numbers)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ([45_000, 45_001.5], "all times are before 1973"),  # days, as a spreadsheet counts them
        ([0, 1_700_000_000], "1 of 2 times are before 1973, the first in row 1: 0"),
        (["2024-01-01", "1970-01-01"], "1 of 2 times are before 1973, the first in row 2: '1970"),
        ([1_700_000_000, 1_600_000_000], None),
    ],
)
def test_times_of_before_there_were_logs_are_told(values: list[Any], note: str | None) -> None:
    notes = to_seconds(Column(pa.chunked_array([values]), "time", SOURCE))[1]
    assert notes == () if note is None else note in notes[0]


@pytest.mark.parametrize("day", [dt.date(1900, 1, 1), dt.date(1969, 12, 31), dt.date(9999, 12, 31)])
def test_dates_out_of_range_are_alike_in_every_form(day: dt.date) -> None:
    moment = dt.datetime(day.year, day.month, day.day, tzinfo=UTC)
    number = int((moment - dt.datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    today = {str: "2024-01-01", int: 1_700_000_000, dt.date: dt.date(2024, 1, 1)}
    forms: list[tuple[Any, Any]] = [
        (str(day), None), (day, pa.date32()), (day, pa.date64()), (moment, pa.timestamp("s")),
        (moment, pa.timestamp("us", "Asia/Tokyo")), (number, None),
    ]  # fmt: skip
    for value, kind in forms:
        first = moment.replace(year=2024) if isinstance(value, dt.datetime) else today[type(value)]
        message = refusal([first, value], kind)
        assert "in the range of 1970 to 2199" in message or "times of one unit" in message


@pytest.mark.parametrize(
    ("values", "kind", "what"),
    [
        ([1, 2, None], None, "row 3 has no time"),
        (["2024-05-31", None], None, "row 2 has no time"),
        ([1, -1], None, "row 2 has the time -1; expected a number, or an ISO date"),
        (["2024-05-31", "1969-05-31"], None, "row 2 has the time '1969-05-31'; expected"),
        ([dt.date(1969, 1, 1)], pa.date32(), "row 1 has the time '1969-01-01'; expected"),
        ([1.0, math.inf], None, "row 2 has the time inf; expected a finite number"),
        (["1", "2", "3", "x", "5"], None, "row 4 has the time 'x'"),
        (["1", "2024-05-31"], None, "row 2 has the time '2024-05-31'"),
        (["2024-05-31T10:00:00Z", "2024-05-31", "31.05.2024"], None, "row 3 has the time '31.05"),
        (["a\nb" * 99], None, "row 1 has the time 'a"),
        ([1_600_000_000, 5, 1_600_000_000_000], None, "row 1 has seconds, row 3 has milliseconds"),
        ([1e21], None, "row 1 has the time 1e+21; expected"),
        ([True], None, "the time column has the type bool"),
        ([b"\xff"], pa.binary(), "the time column has the type binary"),
        ([2**62], pa.timestamp("ms"), "row 1 has the time '4611686018427387904 (timestamp[ms])'"),
        ([[1]], None, "the time column has the type list"),
    ],
)
def test_refused_times(values: list[Any], kind: Any, what: str) -> None:
    message = refusal(values, kind)
    assert message.startswith("data.source: ")
    assert "'shop.csv'" in message
    assert what in message
    assert len(message) < 300


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1), st.booleans())
def test_numbers(values: list[float], as_text: bool) -> None:
    column = pa.chunked_array([pa.array([repr(v) for v in values] if as_text else values)])
    assert to_numbers(Column(column, "rating", SOURCE)).tolist() == values


@given(st.integers(1, 40), st.data())
def test_the_first_row_that_is_no_number(rows: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, rows - 1), min_size=1))
    column = pa.chunked_array([["4,5" if row in bad else "4.5" for row in range(rows)]])
    with pytest.raises(BadInput, match=rf"line {min(bad) + 2} has the rating '4,5'"):
        to_numbers(Column(column, "rating", SOURCE, lambda row: f"line {row + 2}"))


def test_times_of_a_form() -> None:
    texts = pa.chunked_array([["31/05/2024 18:30", " 01/06/2024 00:00"]])
    found, notes = to_seconds(Column(texts, "time", SOURCE), "%d/%m/%Y %H:%M")
    assert found.tolist() == [1717180200, 1717200000]
    assert notes == ("times without a zone are read as UTC",)
    numbers = pa.chunked_array([[310524]])
    assert to_seconds(Column(numbers, "time", SOURCE), "%d%m%y")[0].tolist() == [1717113600]
    zoned = pa.chunked_array([["31/05/2024 18:30 +0200"]])
    found, notes = to_seconds(Column(zoned, "time", SOURCE), "%d/%m/%Y %H:%M %z")
    assert (found.tolist(), notes) == ([1717173000], ())
    with pytest.raises(BadInput, match="row 1 has the time '31/05/2024 18:30'; expected .* %m"):
        to_seconds(Column(texts, "time", SOURCE), "%m/%d/%Y %H:%M")
