from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from depthprobe.data.readers import FORMATS, read_log, read_sequences
from depthprobe.study import BadInput


def write(folder: Path, text: str | bytes, name: str = "sequences.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_one_user_a_line(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, "\ufeffu2 i3 i1\r\n\n  u1\ti1   i1  \n", "shop.txt"))
    assert log.users.tolist() == ["u2", "u2", "u1", "u1"]
    assert log.items.tolist() == ["i3", "i1", "i1", "i1"]
    assert log.times is None
    assert log.titles == {}
    assert log.name == "shop"


def test_folder_gives_its_name_and_titles(tmp_path: Path) -> None:
    folder = tmp_path / "beauty"
    folder.mkdir()
    write(folder, "1 10 11\n2 11 12\n")
    write(folder, 'item_id\ttitle\n10\tRed  soap\n\n11\tA "blue" one\n', "items.tsv")
    log = read_log(folder)
    assert log.name == "beauty"
    assert log.titles == {"10": "Red soap", "11": 'A "blue" one'}


def test_words_as_ids(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, "ann dota_2 half-life portal\nbob portal dota_2\n"))
    assert log.items.tolist() == ["dota_2", "half-life", "portal", "portal", "dota_2"]


def test_hexadecimal_ids_without_recurrence(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [[draw.bytes(8).hex() for _ in range(5)] for _ in range(50)]
    log = read_log(write(tmp_path, "\n".join(" ".join(row) for row in rows)))
    assert len(log.items) == 200


def test_formats() -> None:
    assert set(FORMATS) >= {"embedded", "sequences"}


PROSE = """It was the best of times, it was the worst of times, it was the age of wisdom,
it was the age of foolishness, it was the epoch of belief, it was the epoch of incredulity."""
BARE_PROSE = """it was the best of times it was the worst of times it was the age of wisdom
there was a time when it was the age of foolishness and of the times
belief was the best of it and the worst of it was the epoch of incredulity
the times of the age"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (" \n\t\n", "empty"),
        (b"1 2 3\n\x004 5", "binary"),
        (b"1 2 3\n4 \xff\xfe 5\n", "line 2 is not UTF-8"),
        ("1 2 3\n4\n", "line 2 has a single word"),
        ("1 2 3\n\n4 5\n1 6\n", "line 4 is user '1' again, after line 1"),
        (json.dumps({"u1": ["i1", "i2"]}), "line 1 has"),
        (json.dumps([[1, 2], [3, 4]], indent=1), "line 1 has '['"),
        ("user,item,time\n1,2,3\n", "line 1 has ','"),
        ("user;item\n1;2\n", "line 1 has ';'"),
        ("user item time\n1 2 3\n4 5 6\n7 8 9\n9 8 7\n", "line 1 looks like a header"),
        (
            "user_id:token\titem_id:token\n1\t2\n3\t4\n5\t6\n" + "8\t9\n",
            "line 1 looks like a header",
        ),
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
        read_sequences(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_this_very_source(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"line \d+ has '\S'"):
        read_log(Path(__file__))


def test_refuses_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        read_log(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"sequences\.txt"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("1\tsoap\n", "line 1 is not the header"), ("item_id\ttitle\n1 soap\n", "line 2 has no tab")],
)
def test_refuses_bad_titles(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, text, "items.tsv")
    with pytest.raises(BadInput, match=said):
        read_log(write(tmp_path, "1 2 3\n"))


def test_importing_data_is_light() -> None:
    code = (
        "import sys; import depthprobe.data.batches, depthprobe.data.prepared;"
        "print([m for m in ('torch', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_order_of_interactions_is_kept(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(1, 50, size=draw.integers(1, 9)).tolist() for _ in range(40)]
    text = "\n".join(" ".join(map(str, [user, *row])) for user, row in enumerate(rows))
    log = read_log(write(tmp_path, text))
    back = [log.items[log.users == str(user)].astype(int).tolist() for user in range(40)]
    assert back == rows
