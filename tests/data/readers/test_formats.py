from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.readers.formats import FORMATS, join_parts, read_log, recognise
from depthprobe.errors import BadInput
from depthprobe.study import Columns

# (user, item, rating, time); each user's in time order and together, as a sequence file needs
ROWS = [
    ("7", "10", 3, 900000200),
    ("7", "2", 4, 900000300),
    ("8", "10", 1, 900000100),
    ("8", "31", 5, 900000400),
]


def lines(separator: str, *, rows: list[tuple[str, str, int, int]] = ROWS) -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def parquet(folder: Path) -> bytes:
    names = ["user_id", "item_id", "rating", "timestamp"]
    table = pa.table([list(column) for column in zip(*ROWS, strict=True)], names=names)
    pa.parquet.write_table(table, folder / "parquet")
    return (folder / "parquet").read_bytes()


def amazon(rows: list[tuple[str, str, int, int]] = ROWS) -> str:
    names = ("reviewerID", "asin", "overall", "unixReviewTime")
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
FORMS = {
    "recbole": HEADER + lines("\t"),
    "movielens u.data": lines("\t"),
    "movielens ratings.dat": lines("::"),
    "movielens ratings.csv": "userId,movieId,rating,timestamp\n" + lines(","),
    "json": amazon(),
    "csv": 'user_id,"item_id",rating,timestamp\n' + lines(","),
    "csv with tabs": "user\titem\trating\ttime\n" + lines("\t"),
    "csv with semicolons": "\ufeffUser ID;Item ID;Rating;Timestamp\r\n" + lines(";"),
    "sequences": "7 10 2\n8 10 31\n",
    "sequences with tabs": "7\t10\t2\n8\t10\t31\n",
}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pairs(log: Log) -> list[tuple[str, str]]:
    users = [log.users.names[code] for code in log.users.codes]
    return list(zip(users, [log.items.names[code] for code in log.items.codes], strict=True))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "parquet"])
def test_each_format_gives_the_same_log(tmp_path: Path, form: str, compressed: bool) -> None:
    content = parquet(tmp_path) if form == "parquet" else FORMS[form].encode()
    if compressed and form != "parquet":
        content = gzip.compress(content)
    # the name says something else: the content decides
    path = write(tmp_path / "log.json", content)
    assert recognise(path) == form.split()[0]
    for log in (read_log(path), read_log(str(path), format=form.split()[0])):
        assert pairs(log) == [row[:2] for row in ROWS]
        if form.startswith("sequences"):
            assert (log.times, log.ratings) == (None, None)
        else:
            assert log.times is not None
            assert log.times.tolist() == [row[3] for row in ROWS]
            assert log.ratings is not None
            assert log.ratings.tolist() == [row[2] for row in ROWS]
        assert (log.titles, log.notes, log.name) == ({}, (), tmp_path.name)


def test_every_format_is_in_the_round_trip() -> None:
    assert {form.split()[0] for form in FORMS} | {"parquet", "embedded"} == set(FORMATS)


def test_the_embedded_log() -> None:
    log = read_log("embedded")
    assert log.name == "embedded"
    assert len(log.titles) == len(log.items.names)
    with pytest.raises(BadInput, match="another one for"):
        read_log("log.csv", format="embedded")
    with pytest.raises(BadInput, match="none for the embedded log"):
        read_log("embedded", columns=Columns(user="x"))


def test_the_format_that_is_named_wins(tmp_path: Path) -> None:
    path = write(tmp_path / "log.txt", "1\t5\n1\t3\n2\t5\n")
    assert pairs(read_log(path, columns=Columns(user="2", item="1")))[1] == ("3", "1")
    with pytest.raises(BadInput, match="line 2 is user '1' again"):
        read_log(path, format="sequences")
    with pytest.raises(BadInput, match=r"data\.format: expected one of embedded.*'CSV'"):
        read_log(path, format="CSV")
    with pytest.raises(BadInput, match="did you mean sequences"):
        read_log(path, format="sequence")


FOLDERS: dict[str, dict[str, str | bytes]] = {
    "sequences": {"sequences.txt": FORMS["sequences"], "embeddings.npy": b"\x93NUMPY"},
    "RecBole": {"x.inter": FORMS["recbole"], "x.user": "user_id:token\tage:token\n7\t30\n"},
    "MovieLens": {"ratings.dat": lines("::"), "users.dat": "7::F::1\n", "README": "Thanks.\n"},
    "Amazon": {
        "reviews_X_5.json.gz": gzip.compress(FORMS["json"].encode()),
        "meta_X.json.gz": gzip.compress(b"{'asin': '10', 'title': 'Tea &amp; co'}\n"),
    },
    "one CSV": {"any.csv": FORMS["csv"], "items.csv": "item_id,title\n10,Tea & co\n"},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(tmp_path: Path, kind: str) -> None:
    for name, text in FOLDERS[kind].items():
        write(tmp_path / name, text)
    log = read_log(tmp_path)
    assert pairs(log) == [row[:2] for row in ROWS]
    assert log.titles == ({"10": "Tea & co"} if kind in {"Amazon", "one CSV"} else {})


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({}, "it has no file; expected one log"),
        (
            {"README.md": "", "items.csv": "item_id,title\n"},
            "it has README.md, items.csv; expected",
        ),
        ({"a.csv": "", "b.csv": ""}, "it has several logs, a.csv, b.csv; expected one log"),
        ({"a.parquet": "", "b.csv": ""}, "it has several logs, a.parquet, b.csv"),
        ({"train.csv": "", "test.csv": ""}, "it has train.csv, test.csv"),
        ({"day=1/a.parquet": ""}, "in subfolders, such as 'day=1/a.parquet'; write them to one"),
        ({"a.parquet": "", "y=1/m=2/b.parquet": ""}, "in subfolders, such as 'y=1/m=2/b.parquet'"),
        (
            dict.fromkeys(("train.csv", "valid.csv", "dev.csv", "test.csv"), ""),
            "it has train.csv, dev.csv, valid.csv, test.csv",
        ),
        (
            dict.fromkeys(("train.csv", "valid.csv", "test.csv", "ratings.csv"), ""),
            "it has train.csv, valid.csv, test.csv, ratings.csv",
        ),
    ],
)
def test_refuses_folders(tmp_path: Path, files: dict[str, str], fault: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, text)
    with pytest.raises(BadInput, match=fault) as caught:
        read_log(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "valid.csv", "test.csv"),
        ("x.train.inter", "x.valid.inter", "x.test.inter"),
        ("Books.training.tsv", "Books.val.tsv.gz", "Books.test.tsv"),
        ("train-00000-of-00001.csv", "dev-00000-of-00001.csv", "test-00000-of-00001.csv"),
    ],
)
def test_a_log_that_came_split(tmp_path: Path, names: tuple[str, ...]) -> None:
    parts = [
        [("u1", "i1", 5, 10**9 + 100), ("u2", "i2", 4, 10**9 + 200)],
        [("u1", "i3", 3, 10**9 + 300)],
        [("u1", "i1", 2, 10**9 + 400), ("u3", "i2", 1, 10**9 + 500)],
    ]
    for name, rows in zip(names, parts, strict=True):
        write(tmp_path / "split" / name, HEADER + lines("\t", rows=rows))
    write(tmp_path / "split" / "items.tsv", "item_id\ttitle\ni3\tTea\n")
    log = read_log(tmp_path / "split", format="recbole")
    assert pairs(log) == [row[:2] for rows in parts for row in rows]
    assert log.users.names == ["u1", "u2", "u3"]
    assert log.parts is not None
    assert log.parts.dtype == np.int8
    assert log.parts.tolist() == [0, 0, 1, 2, 2]
    assert log.times is not None
    assert (log.times - 10**9).tolist() == [100, 200, 300, 400, 500]
    assert log.titles == {"i3": "Tea"}
    assert log.notes == ("1 (user, item) pairs are in training and in test",)
    assert log.name == "split"


def test_parts_have_the_same_columns(tmp_path: Path) -> None:
    def part(times: np.ndarray | None) -> Log:
        return Log(encode_ids(["u"]), encode_ids(["i"]), times, notes=("as milliseconds",))

    some = np.array([1.5])
    with pytest.raises(BadInput, match="times in all three parts, or in none"):
        join_parts([part(some), part(None), part(None)], folder=tmp_path)
    log = join_parts([part(np.array([2])), part(some), part(some)], folder=tmp_path)
    assert log.notes[0] == "as milliseconds"
    assert len(log.notes) == 2
    assert log.times is not None
    assert log.times.tolist() == [2, 1.5, 1.5]


def test_a_public_set_by_its_name_unless_a_path_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "cache" / "ratings.dat", lines("::"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("depthprobe.data.readers.formats.fetch", lambda name: tmp_path / "cache")
    assert len(read_log("ml-1m")) == 4
    write(tmp_path / "ml-1m", "1 2\n")
    assert len(read_log("ml-1m")) == 1


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("ml-1mm", "did you mean ml-1m?"),
        ("x" * 300, "an existing path"),
        ("nowhere/log.csv", "an existing path"),
        ("amazon-2014:Beuty", "did you mean amazon-2014:Beauty?"),
    ],
)
def test_refuses_what_is_missing(source: str, fault: str) -> None:
    with pytest.raises(BadInput, match=r"data\.source") as caught:
        read_log(source)
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv.gz", gzip.compress((FORMS["csv"] * 999).encode(), mtime=0)[:-9], "cut off"),
        ("a.csv.gz", gzip.compress(FORMS["csv"].encode(), mtime=0)[:-5] + b"abcde", "damaged"),
        ("a.gz", b"\x1f\x8b no gzip", "damaged"),
        ("a.npy", b"\x93NUMPY\x01\x00", "its format isn't recognised, it starts with"),
        ("a", "\n", "its format isn't recognised, it is empty"),
        ("a.csv", FORMS["csv"].encode("utf-16-le"), "its format isn't recognised"),
        ("a.csv", FORMS["csv"].encode("utf-16")[:-1], "a whole text in UTF-16"),
        ("a.csv", b"PK\x03\x04 and so on", "it is a zip archive, or a spreadsheet; unpack it"),
        ("a.csv", lzma.compress(FORMS["csv"].encode()), "it is a xz archive"),
    ],
)
def test_refuses_what_is_no_log(
    tmp_path: Path, name: str, content: str | bytes, fault: str
) -> None:
    with pytest.raises(BadInput) as caught:
        read_log(write(tmp_path / name, content))
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_importing_data_is_light() -> None:
    code = (
        "import sys; import depthprobe.data.batches, depthprobe.data.prepared;"
        "print([m for m in ('torch', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
