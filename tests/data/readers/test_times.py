from __future__ import annotations

import datetime as dt
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.data.readers.arrow import to_numbers, to_seconds
from depthprobe.errors import BadInput

SOURCE = Path("log.csv")
UTC = dt.UTC
NOON = dt.datetime(2024, 5, 31, 12, 0, 0, tzinfo=UTC)
WORDS = {10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}


def seconds(values: list[Any], kind: Any = None) -> np.ndarray:
    return to_seconds(pa.chunked_array([pa.array(values, kind)]), source=SOURCE)[0]


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
    found, notes = to_seconds(column, source=SOURCE)
    expected = [value / factor for value in raw]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.dtype == (np.float64 if part and factor > 1 else np.int64)
    assert bool(notes) == (factor > 1)
    if notes:
        assert WORDS[factor] in notes[0]


def test_no_order_is_lost() -> None:
    start = 1_600_000_000_000_000
    assert (np.diff(seconds([start + n for n in range(50)])) > 0).all()
    assert (np.diff(seconds([f"2024-05-31T12:00:00.{n:06d}Z" for n in range(50)])) > 0).all()


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
    found = seconds([NOON], pa.timestamp(unit, zone))
    assert found.dtype == np.int64
    assert found.tolist() == [NOON.timestamp()]


def test_dates() -> None:
    day = dt.date(2024, 5, 31)
    for kind in (pa.date32(), pa.date64()):
        assert seconds([day], kind).tolist() == [NOON.timestamp() - 43200]


def test_zones_are_noted_where_there_are_none() -> None:
    def notes(text: str) -> tuple[str, ...]:
        return to_seconds(pa.chunked_array([[text]]), source=SOURCE)[1]

    assert "UTC" in notes("2024-05-31 12:00:00")[0]
    assert notes("2024-05-31 12:00:00Z") == notes("2024-05-31") == ()


@pytest.mark.parametrize(
    ("values", "kind", "what"),
    [
        ([1, 2, None], None, "row 3 has no time"),
        ([1.0, math.nan], None, "row 2 has no time"),
        (["1", " "], None, "row 2 has no time"),
        (["2024-05-31", None], None, "row 2 has no time"),
        ([NOON, None], pa.timestamp("us"), "row 2 has no time"),
        ([1, -1], None, "row 2 has a negative time, -1"),
        (["2", "-0.5"], None, "row 2 has a negative time, -0.5"),
        (["2024-05-31", "1969-05-31"], None, "row 2 has a time before 1970, 1969-05-31"),
        ([dt.date(1969, 1, 1)], pa.date32(), "row 1 has a time before 1970, 1969-01-01"),
        ([1.0, math.inf], None, "row 2 has no finite time"),
        (["1", "2", "3", "x", "5"], None, "row 4 has the time 'x'"),
        (["1", "2024-05-31"], None, "row 2 has the time '2024-05-31'"),
        (["2024-05-31T10:00:00Z", "2024-05-31", "31.05.2024"], None, "row 3 has the time '31.05"),
        (["2024-05-31", "7"], None, "row 2 has the time '7'"),
        (["09 1, 2015"], None, "row 1 has the time '09 1, 2015'"),
        (["a\nb" * 99], None, "row 1 has the time 'a"),
        ([1_600_000_000, 5, 1_600_000_000_000], None, "row 1 has seconds, row 3 has milliseconds"),
        ([1e21], None, "row 1 has a time too late"),
        ([True], None, "the time column has the type bool"),
        ([[1]], None, "the time column has the type list"),
        ([dt.time(1)], None, "the time column has the type time"),
    ],
)
def test_refused(values: list[Any], kind: Any, what: str) -> None:
    message = refusal(values, kind)
    assert message.startswith("data.source: 'log.csv' is not usable; ")
    assert what in message
    assert len(message) < 300


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1), st.booleans())
def test_numbers(values: list[float], as_text: bool) -> None:
    column = pa.chunked_array([pa.array([repr(v) for v in values] if as_text else values)])
    assert to_numbers(column, "rating", source=SOURCE).tolist() == values


@given(st.integers(1, 40), st.data())
def test_the_first_row_that_is_no_number(rows: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, rows - 1), min_size=1))
    column = pa.chunked_array([["4,5" if row in bad else "4.5" for row in range(rows)]])
    with pytest.raises(BadInput, match=rf"line {min(bad) + 2} has the rating '4,5'"):
        to_numbers(column, "rating", source=SOURCE, where=lambda row: f"line {row + 2}")
