from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprobe.data.log import Ids, Log
from depthprobe.data.readers.json_lines import read_json
from depthprobe.errors import BadInput
from depthprobe.study import Columns


def write(folder: Path, text: str | bytes, name: str = "shop.json") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(folder: Path, *rows: Any, **named: str) -> Log:
    return read_json(write(folder, lines(*rows)), Columns(**named))


def raw(ids: Ids) -> list[str]:
    return [ids.names[code] for code in ids.codes]


def test_amazon_2018(tmp_path: Path) -> None:
    row = {
        "overall": 5.0,
        "verified": True,
        "reviewTime": "09 1, 2015",
        "reviewerID": "A3CIUOJXQ5VDQ2",
        "asin": "B0000530HU",
        "style": {"Size:": " 7.0 oz"},
        "reviewText": "As advertised \u00e9 \ud83d\ude00",
        "unixReviewTime": 1441065600,
    }
    # some reviews lack what nobody wants, and the keys come in any order
    other = {"asin": "B1", "unixReviewTime": 1, "reviewerID": "A2", "overall": 1, "image": ["x"]}
    path = write(tmp_path, gzip.compress(lines(row, other).encode()), "Beauty_5.json.gz")
    log = read_json(path, Columns())
    assert raw(log.users) == ["A3CIUOJXQ5VDQ2", "A2"]
    assert raw(log.items) == ["B0000530HU", "B1"]
    assert log.ratings is not None
    assert log.ratings.tolist() == [5.0, 1.0]
    assert log.times is not None
    assert log.times.tolist() == [1441065600, 1]
    assert log.times.dtype == np.int64
    assert (log.name, log.titles, log.notes) == ("Beauty_5", {}, ())


def test_amazon_2023(tmp_path: Path) -> None:
    row = {"rating": 4.0, "title": "Fine", "text": "It is", "asin": "B1", "parent_asin": "B0"}
    log = read(tmp_path, row | {"user_id": "U", "timestamp": 1588687728923})
    assert raw(log.items) == ["B0"]
    assert log.times is not None
    assert log.times.tolist() == [1588687728.923]
    assert "milliseconds" in log.notes[0]
    assert log.titles == {}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_line_ends(tmp_path: Path, end: str) -> None:
    text = "\ufeff" + '{"user": "a", "item": 1}' + end + '{"item": 2, "user": "b"}'
    log = read_json(write(tmp_path, text), Columns())
    assert raw(log.users) == ["a", "b"]
    assert raw(log.items) == ["1", "2"]


def test_ids_stay_as_they_are(tmp_path: Path) -> None:
    log = read(tmp_path, {"user": "007", "item": 7}, {"user": "7", "item": 2**53 + 1})
    assert raw(log.users) == ["007", "7"]
    assert raw(log.items) == ["7", "9007199254740993"]
    # pandas makes floats of integers beside missing values
    assert raw(read(tmp_path, {"user": 7.0, "item": "a"}).users) == ["7"]


def test_numbers_may_be_texts_and_differ_in_form(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        {"user": 1, "item": 2, "ts": 5, "score": "4"},
        {"user": 1, "item": 3, "ts": 5.5, "score": "4.5"},
    )
    assert log.times is not None
    assert log.times.tolist() == [5.0, 5.5]
    assert log.ratings is not None
    assert log.ratings.tolist() == [4.0, 4.5]


def test_named_columns_and_titles(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        {"who": "a", "what": "b", "label": " A  soap "},
        user="who",
        item="what",
        title="label",
    )
    assert log.titles == {"b": "A soap"}


GOOD = {"user": "a", "item": "b", "time": 1}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "it is empty"),
        ("\n \n", "it is empty"),
        ("[\n" + lines(GOOD) + "]", "it is a JSON array; expected JSON lines"),
        ("\ufeff [1]", "it is a JSON array; expected JSON lines"),
        (lines(GOOD) + "\nuser,item\n", "line 3 is not JSON"),
        (lines(GOOD)[:-3], "line 1 is not JSON"),
        (json.dumps(GOOD, indent=1), "line 1 is not JSON"),
        (lines(GOOD, 7), "line 2 is no object"),
        (lines({"who": "a", "item": "b"}), "its columns are who, item"),
        (lines(GOOD, {"item": "b", "time": 1}), "line 2 has no user"),
        (lines(GOOD, GOOD) + "\n" + lines(GOOD | {"item": None}), "line 4 has no item"),
        (lines(GOOD, GOOD | {"time": None}), "line 2 has no time"),
        (lines(GOOD, GOOD | {"user": 7}), "line 2 has 7 as 'user'; expected a text"),
        (lines(GOOD, GOOD | {"time": "soon"}), "line 2 has 'soon' as 'time'; expected a number"),
        (lines(GOOD, GOOD | {"time": True}), "line 2 has True as 'time'; expected a number"),
        (lines(GOOD | {"user": {"id": 1}}), "the user column has {'id': 1}"),
        (lines(GOOD | {"item": [1]}), "the item column has [1]"),
        (lines(GOOD | {"user": True}), "the user column has True"),
        (lines(GOOD | {"item": 1.5}), "line 1 has the item 1.5"),
        (lines(GOOD | {"item": 1}, GOOD | {"item": 1.5}), "line 2 has 1.5 as 'item'"),
        (lines(GOOD | {"item": 1}, GOOD | {"item": 2**70}), "it can't be read"),
        (lines(GOOD | {"item": "b\x00"}), "line 1 has a line break or a NUL"),
        (lines(GOOD) + "\x00", "line 2 has a NUL byte"),
        (lines(GOOD).encode() + b"\xff", "line 2 is not UTF-8"),
        ('{"user": "a", "user": "b", "item": "c"}\n', "it can't be read"),
        (gzip.compress(lines(*[GOOD] * 9999).encode())[:-9], "it is cut off"),
        ("x" * 2**23, "its first line is endless"),
    ],
)
def test_refused(tmp_path: Path, text: str | bytes, what: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_json(write(tmp_path, text), Columns())
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_fault_beyond_the_first_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthprobe.data.readers.json_lines.LOOKED_AT", 200)
    monkeypatch.setattr("depthprobe.data.readers.json_lines.BLOCK", 300)
    many = lines(*[GOOD] * 100)
    assert len(read_json(write(tmp_path, many), Columns())) == 100
    for bad, what in (
        ("{'user': 'a'}\n", "line 101 is not JSON"),
        (lines(GOOD | {"user": 7}), "line 101 has 7 as 'user'"),
        (lines({"user": "a"}), "line 101 has no item"),
    ):
        with pytest.raises(BadInput, match=what):
            read_json(write(tmp_path, many + bad + many), Columns())
