from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from depthprobe.data.log import Ids
from depthprobe.data.readers.sequence_files import is_sequences, read_sequences
from depthprobe.errors import BadInput
from depthprobe.study import Columns


def write(folder: Path, text: str | bytes, name: str = "sequences.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def raw(ids: Ids) -> list[str]:
    return [ids.names[code] for code in ids.codes]


def test_reads_one_user_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffu2 i3 i1\r\n\n  u1\ti1   i1  \n", "shop.txt")
    log = read_sequences(path, Columns())
    assert raw(log.users) == ["u2", "u2", "u1", "u1"]
    assert raw(log.items) == ["i3", "i1", "i1", "i1"]
    assert log.users.names == ["u2", "u1"]
    assert log.times is None
    assert log.name == "shop"


def test_words_as_ids(tmp_path: Path) -> None:
    path = write(tmp_path, "ann dota_2 half-life portal\nbob portal dota_2\n")
    log = read_sequences(path, Columns())
    assert raw(log.items) == ["dota_2", "half-life", "portal", "portal", "dota_2"]


def test_hexadecimal_ids_without_recurrence(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [[draw.bytes(8).hex() for _ in range(5)] for _ in range(50)]
    log = read_sequences(write(tmp_path, "\n".join(map(" ".join, rows))), Columns())
    assert raw(log.items) == [item for row in rows for item in row[1:]]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_order_of_interactions_is_kept(tmp_path: Path, compress: type[bytes]) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(1, 50, size=draw.integers(1, 9)).tolist() for _ in range(2000)]
    text = "\n".join(" ".join(map(str, [user, *row])) for user, row in enumerate(rows))
    log = read_sequences(write(tmp_path, compress(text.encode())), Columns())
    assert raw(log.users) == [str(user) for user, row in enumerate(rows) for _ in row]
    assert raw(log.items) == [str(item) for row in rows for item in row]


PROSE = """It was the best of times, it was the worst of times, it was the age of wisdom,
it was the age of foolishness, it was the epoch of belief, it was the epoch of incredulity."""
BARE_PROSE = """it was the best of times it was the worst of times it was the age of wisdom
there was a time when it was the age of foolishness and of the times
belief was the best of it and the worst of it was the epoch of incredulity
the times of the age"""
LONG = "".join(f"u{user} i{user} i{user + 1}\n" for user in range(5000))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (" \n\t\n", "empty"),
        (b"1 2 3\n\x004 5", "line 2 has a NUL byte"),
        (b"1 2 3\n4 \xff\xfe 5\n", "line 2 is not UTF-8"),
        (gzip.compress(LONG.encode())[:-9], "cut off"),
        ("1 2 3\n4\n", "line 2 has a single word"),
        ("1 2 3\n\n4 5\n1 6\n", "line 4 is user '1' again, after line 1"),
        (LONG + "u9\n", "line 5001 has a single word"),
        (LONG + "u17 i1\n", "line 5001 is user 'u17' again, after line 18"),
        (LONG + "u9999 i1,i2\n", "line 5001 has ','"),
        ("1 2 3\r4 5 6\r", "line 1 has '\\r'"),
        (json.dumps({"u1": ["i1", "i2"]}), "line 1 has"),
        (json.dumps([[1, 2], [3, 4]], indent=1), "line 1 has '['"),
        ("user,item,time\n1,2,3\n", "line 1 has ','"),
        ("user;item\n1;2\n", "line 1 has ';'"),
        ("user item time\n1 2 3\n4 5 6\n7 8 9\n9 8 7\n", "line 1 looks like a header"),
        ("user_id:token\titem_id:token\n1\t2\n3\t4\n5\t6\n8\t9\n", "line 1 looks like a header"),
        ("196\t242\t3\t881250949\n196\t302\t3\t891717742\n", "line 2 is user '196' again"),
        ("0.25 0.5\n0.75 1.5\n", "decimal numbers"),
        (PROSE, "line 1 has ','"),
        (PROSE.replace(",", ""), "prose?"),
        (BARE_PROSE, "prose?"),
        ("the quick brown fox\njumps over the lazy dog\n", "prose?"),
        ("# Title\n\nSome text here\nwhich goes on\n", "line 1 has '#', and most"),
        ("<html>\n<body> x </body>", "line 1 has"),
        ("a1 " + "9" * 200, "a word of 200 characters"),
    ],
)
def test_refuses_what_is_no_log(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        read_sequences(path, Columns())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_named_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "1 2 3\n")
    with pytest.raises(BadInput, match=r"data\.columns\.item: '2' .* has no columns"):
        read_sequences(path, Columns(item="2"))


def test_recognises_by_the_first_line() -> None:
    assert is_sequences("\n\nu1 i1\r\nu2")
    assert is_sequences("1\t2\t3\n4\t5\n")
    assert not is_sequences("")
    assert not is_sequences("u1\nu2 i1\n")
    assert not is_sequences("1 2, 3\n")
