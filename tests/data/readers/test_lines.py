"""JSON lines and sequence files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprobe.data.log import Ids, Log
from depthprobe.data.readers.formats import read_log
from depthprobe.data.readers.lines import is_sequences, read_json, read_sequences
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


def refusal(reader: Any, path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        reader(path, Columns())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


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
    other = {
        "asin": "B1",
        "unixReviewTime": 10**9,
        "reviewerID": "A2",
        "overall": 1,
        "image": ["x"],
    }
    path = write(tmp_path, gzip.compress(lines(row, other).encode()), "Beauty_5.json.gz")
    log = read_json(path, Columns())
    assert raw(log.users) == ["A3CIUOJXQ5VDQ2", "A2"]
    assert raw(log.items) == ["B0000530HU", "B1"]
    assert log.ratings is not None
    assert log.ratings.tolist() == [5.0, 1.0]
    assert log.times is not None
    assert log.times.tolist() == [1441065600, 10**9]
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
    assert (raw(log.users), raw(log.items)) == (["a", "b"], ["1", "2"])


def test_values_of_several_forms(tmp_path: Path) -> None:
    log = read(tmp_path, {"user": "007", "item": 7}, {"user": "7", "item": 2**53 + 1})
    assert raw(log.users) == ["007", "7"]
    assert raw(log.items) == ["7", "9007199254740993"]
    # pandas makes floats of integers beside missing values
    assert raw(read(tmp_path, {"user": 7.0, "item": "a"}).users) == ["7"]
    rows = [{"user": 1, "item": 2, "ts": 5, "score": "4"}]
    log = read(tmp_path, *rows, {"user": 1, "item": 3, "ts": 5.5, "score": "4.5"})
    assert log.times is not None
    assert log.times.tolist() == [5.0, 5.5]
    assert log.ratings is not None
    assert log.ratings.tolist() == [4.0, 4.5]


def test_named_columns_and_titles(tmp_path: Path) -> None:
    rows = [{"who": "a", "what": "b", "label": " A  soap "}, {"who": "a", "what": "c"}]
    log = read(tmp_path, *rows, user="who", item="what", title="label")
    assert log.titles == {"b": "A soap"}


GOOD = {"user": "a", "item": "b", "time": 1}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("\n \n", "it is empty"),
        ("[\n" + lines(GOOD) + "]", "line 1 is '['"),
        (lines(GOOD) + "\nuser,item\n", "line 3 is 'user,item' (JSON is malformed"),
        (lines(GOOD)[:-3], "(Input data was truncated)"),
        (lines(GOOD, 7), "line 2 is '7' (Expected `object`, got `int`)"),
        (lines({"who": "a", "item": "b"}), "its columns are who, item"),
        (lines(GOOD, {"item": "b", "time": 1}), "line 2 has no user"),
        (lines(GOOD, GOOD) + "\n" + lines(GOOD | {"item": None}), "line 4 has no item"),
        (lines(GOOD, GOOD | {"time": None}), "line 2 has no time"),
        (lines(GOOD, GOOD | {"user": 7}), "(Expected `str | null`, got `int` - at `$.user`)"),
        (lines(GOOD, GOOD | {"time": "soon"}), "(Expected `float | null`, got `str` - at `$.time`"),
        (lines(GOOD | {"user": {"id": 1}}), "got `object` - at `$.user`"),
        (lines(GOOD | {"item": ["b"]}), "(Expected `str | null`, got `array` - at `$.item`)"),
        (lines(GOOD | {"item": 1.5}), "line 1 has the item 1.5; expected texts"),
        (lines(GOOD | {"item": 1}, GOOD | {"item": 1.5}), "got `float` - at `$.item`"),
        (lines(GOOD | {"item": 1}, GOOD | {"item": 2**70}), "line 2 is"),
        (lines(GOOD | {"item": "b\x00"}), "line 1 has the item 'b"),
        (lines(GOOD).encode() + b"\xff", "line 2 is not UTF-8"),
        (gzip.compress(lines(*[GOOD] * 9999).encode())[:-9], "cut off"),
        ("x" * 2**23, "line 1 is 'xxx"),
    ],
)
def test_refused_json(tmp_path: Path, text: str | bytes, fault: str) -> None:
    assert fault in refusal(read_json, write(tmp_path, text))


def test_a_fault_beyond_the_first_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthprobe.data.readers.lines.SAMPLE", 5)
    monkeypatch.setattr("depthprobe.data.readers.lines.BLOCK", 300)
    many = lines(*[GOOD] * 100)
    for size in (len(many), len(many) - 1, 300):  # a block may end with the last line, or in it
        monkeypatch.setattr("depthprobe.data.readers.lines.BLOCK", size)
        for text in (many, many.rstrip("\n")):
            assert len(read_json(write(tmp_path, text), Columns())) == 100
    for bad, fault in (
        ("{'user': 'a'}\n", "line 101 is"),
        (lines(GOOD | {"user": 7}), "line 101 is"),
        (lines({"user": "a"}), "line 101 has no item"),
    ):
        assert fault in refusal(read_json, write(tmp_path, many + bad + many))


def test_one_user_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffu2 i3 i1\r\n\n  u1\ti1   i1  \n", "shop.txt")
    log = read_sequences(path, Columns())
    assert raw(log.users) == ["u2", "u2", "u1", "u1"]
    assert raw(log.items) == ["i3", "i1", "i1", "i1"]
    assert log.users.names == ["u2", "u1"]
    assert (log.times, log.name) == (None, "shop")


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_order_of_interactions_is_kept(tmp_path: Path, compress: type[bytes]) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(1, 50, size=draw.integers(1, 9)).tolist() for _ in range(2000)]
    text = "\n".join(" ".join(map(str, [user, *row])) for user, row in enumerate(rows))
    log = read_sequences(write(tmp_path, compress(text.encode())), Columns())
    assert raw(log.users) == [str(user) for user, row in enumerate(rows) for _ in row]
    assert raw(log.items) == [str(item) for row in rows for item in row]


LONG = "".join(f"u{user} i{user} i{user + 1}\n" for user in range(5000))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        (b"1 2 3\n\x004 5", "line 2 has '\\x00'"),
        (b"1 2 3\n4 \xff\xfe 5\n", "line 2 is not UTF-8"),
        (gzip.compress(LONG.encode())[:-9], "cut off"),
        ("1 2 3\n4\n", "line 2 has a single word"),
        ("1 2 3\n\n4 5\n1 6\n", "line 4 is user '1' again, after line 1"),
        (LONG + "u17 i1\n", "line 5001 is user 'u17' again, after line 18"),
        (LONG + "u9999 i1,i2\n", "line 5001 has ','"),
        ("1 2 3\r4 5 6\r", "line 1 has '\\r'"),
        (json.dumps([[1, 2], [3, 4]], indent=1), "line 1 has '['"),
        ("196\t242\t3\t881250949\n196\t302\t3\t891717742\n", "line 2 is user '196' again"),
    ],
)
def test_refused_sequences(tmp_path: Path, text: str | bytes, fault: str) -> None:
    assert fault in refusal(read_sequences, write(tmp_path, text))


def test_sequences_have_no_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "1 2 3\n")
    with pytest.raises(BadInput, match=r"data\.columns\.item: expected .* has no columns.*'2'"):
        read_sequences(path, Columns(item="2"))


def test_sequences_are_recognised_by_the_first_line() -> None:
    assert is_sequences("\n\nu1 i1\r\nu2")
    assert is_sequences("1\t2\t3\n4\t5\n")
    assert not is_sequences("")
    assert not is_sequences("u1\nu2 i1\n")
    assert not is_sequences("1 2, 3\n")


HALVES = [r"\ud83d", r"\uDE00", r"\ud83d\ud83d", r"\ud83dx\ude00", r"\\\ud83d"]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("key", ["review", "title"])
def test_half_a_surrogate_pair_is_no_reason_to_refuse(tmp_path: Path, half: str, key: str) -> None:
    rows = [{"user": "a", "item": f"i{n}", key: f"t{n}"} for n in range(3)]
    text = lines(*rows).replace('"t1"', f'"t1 {half} \\ud83d\\ude00 \\\\ud83d"')
    log = read_json(write(tmp_path, text), Columns())
    assert raw(log.items) == ["i0", "i1", "i2"]
    if key == "title":
        whole = json.loads(f'"t1 {half} 😀 \\\\ud83d"')
        assert log.titles["i1"] == re.sub("[\ud800-\udfff]", "\ufffd", whole)


def test_ids_that_could_not_be_read_are_told(tmp_path: Path) -> None:
    text = lines({"user": "a", "item": "Caf"}, {"user": "a", "item": "b"}).replace(
        "Caf", r"Caf\ud83d"
    )
    log = read_log(write(tmp_path, text))
    assert raw(log.items) == ["Caf\ufffd", "b"]
    assert "1 item ids hold" in log.notes[-1]


def test_sequences_whose_ids_hold_blanks(tmp_path: Path) -> None:
    path = write(tmp_path, "ann\tThe Wire\tLost 1\nbob lee\tLost 1\n")
    log = read_sequences(path, Columns())
    assert raw(log.items) == ["The Wire", "Lost 1", "Lost 1"]
    assert log.users.names == ["ann", "bob lee"]
    assert "split at tabs: 'The Wire' is one item" in log.notes[0]
    mixed = read_sequences(write(tmp_path, "u1\ti1 i2\nu2 \t i1\nu3 i1  i2\n"), Columns())
    assert (raw(mixed.items), mixed.notes) == (["i1", "i2", "i1", "i1", "i2"], ())
    for line, fault in (("bob Lost 1", "a single word"), ("bob\t\tLost 1", "no item between")):
        with pytest.raises(BadInput, match=f"line 2 has .*{fault}"):
            read_sequences(write(tmp_path, f"ann\tThe Wire\tLost 1\n{line}\n"), Columns())


@pytest.mark.parametrize("item", ["{}:1", "{}:0.5", "i{}:1600000000", "i{}@1600000000.5"])
def test_items_that_look_like_pairs_are_told(tmp_path: Path, item: str) -> None:
    names = [item.format(n) for n in range(4)]
    log = read_sequences(write(tmp_path, f"u1 {' '.join(names)}\n"), Columns())
    assert raw(log.items) == names
    (note,) = log.notes
    assert note.startswith(f"items such as {names[0]} look like an item and a value")


@pytest.mark.parametrize("item", ["movie:{}", "isbn:97801234567{}", "{}", "a{}:b", "{}-1"])
def test_ids_with_a_colon_are_ids(tmp_path: Path, item: str) -> None:
    names = " ".join(item.format(n) for n in range(10, 14))
    assert read_sequences(write(tmp_path, f"u1 {names}\n"), Columns()).notes == ()
