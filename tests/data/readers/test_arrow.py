from __future__ import annotations

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
from depthprobe.data.readers.arrow import log_of, to_ids
from depthprobe.errors import BadInput

SOURCE = Path("shop.csv")
TEXTS = st.text("ab01 é", min_size=1, max_size=2).filter(str.strip)


def ids(values: list[Any], kind: Any = None) -> list[str]:
    found = to_ids(pa.chunked_array([pa.array(values, kind)]), "item", source=SOURCE)
    assert found.codes.dtype == np.int32
    return [found.names[code] for code in found.codes]


@given(
    st.lists(st.lists(TEXTS), min_size=1).filter(any),
    st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
)
def test_ids_of_any_chunks(chunks: list[list[str]], kind: Any) -> None:
    column = pa.chunked_array([pa.array(chunk, pa.string()).cast(kind) for chunk in chunks])
    expected = encode_ids(value for chunk in chunks for value in chunk)
    found = to_ids(column, "item", source=SOURCE)
    assert found.names == expected.names
    assert found.codes.tolist() == expected.codes.tolist()


def test_ids_stay_as_they_are() -> None:
    assert ids(["007", "7", " 7", "1.0", "NA"]) == ["007", "7", " 7", "1.0", "NA"]
    assert ids([2**63, 7], pa.uint64()) == ["9223372036854775808", "7"]
    assert ids([b"a", b"b"], pa.binary()) == ["a", "b"]
    assert ids([decimal.Decimal(12)], pa.decimal128(38, 0)) == ["12"]


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
def test_floats_become_whole(kind: Any) -> None:
    assert ids([3.0, 10.0, 3.0], kind) == ["3", "10", "3"]


@pytest.mark.parametrize(
    ("values", "kind", "what"),
    [
        (["a", None], None, "row 2 has no item"),
        (["a", "", "b"], None, "row 2 has no item"),
        (["a", "b", "  "], None, "row 3 has no item"),
        (["a", "a", ""], pa.dictionary(pa.int32(), pa.string()), "row 3 has no item"),
        (["a", None], pa.dictionary(pa.int32(), pa.string()), "row 2 has no item"),
        ([1.0, math.nan], None, "row 2 has no item"),
        ([1.0, 2.5], None, "row 2 has the item 2.5"),
        ([1e17], None, "row 1 has the item 1e+17"),
        ([math.inf], None, "row 1 has the item inf"),
        (["a", "b\nc"], None, "row 2 has a line break or a NUL in the item"),
        (["a", "b\x00c"], None, "row 2 has a line break or a NUL in the item"),
        ([b"\xff"], pa.binary(), "ids in UTF-8"),
        ([True], None, "the item column has the type bool"),
        ([["a"]], None, "the item column has the type list"),
        ([decimal.Decimal("1.5")], None, "the item column has the type decimal"),
    ],
)
def test_refused_ids(values: list[Any], kind: Any, what: str) -> None:
    with pytest.raises(BadInput) as caught:
        ids(values, kind)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def columns(**values: list[Any]) -> dict[str, Any]:
    return {what: pa.chunked_array([pa.array(column)]) for what, column in values.items()}


def test_log() -> None:
    found = columns(user=[1, 1, 2], item=["b", "a", "b"], time=[3, 2, 1], rating=["4", "5", "1"])
    log = log_of(found, source=SOURCE)
    assert log.users.names == ["1", "2"]
    assert log.items.codes.tolist() == [0, 1, 0]
    assert log.times is not None
    assert log.times.tolist() == [3, 2, 1]
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
    for rating, what in ((None, "no rating"), (math.inf, "no finite rating"), (math.nan, "no rat")):
        found = columns(user=["a", "b"], item=["c", "d"], rating=[1.0, rating])
        with pytest.raises(BadInput, match=f"row 2 has {what}"):
            log_of(found, source=SOURCE)
