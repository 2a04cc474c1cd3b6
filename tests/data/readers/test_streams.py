from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.data.readers.streams import START, head, open_bytes, open_lines, stem
from depthprobe.errors import BadInput


def zstd(raw: bytes) -> bytes:
    packed: bytes = pa.compress(raw, codec="zstd", asbytes=True)
    return packed


PACKERS = {"plain": bytes, "gzip": gzip.compress, "zstd": zstd}


def read_text(path: Path) -> str:
    with open_lines(path) as lines:
        return lines.read()


TEXT = "".join(f"{n} {n * n}\n" for n in range(9000)).encode()


def write(folder: Path, raw: bytes, name: str = "log") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_compression_is_told_by_content(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    for name in ("log.gz", "log.zst", "log.csv"):
        path = write(tmp_path, pack(TEXT), name)
        with open_bytes(path) as stream:
            assert stream.read() == TEXT
        assert head(path) == TEXT[: TEXT.rindex(b"\n", 0, START)].decode()
        assert read_text(path) == TEXT.decode()


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_members_are_one_stream(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path, pack(TEXT[:777]) + pack(b"") + pack(TEXT[777:]))
    assert read_text(path) == TEXT.decode()


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
@given(data=st.data())
def test_cut_off_anywhere(
    tmp_path_factory: pytest.TempPathFactory, pack: Callable[[bytes], bytes], data: st.DataObject
) -> None:
    raw = pack(TEXT[:999])
    end = data.draw(st.integers(5, len(raw) - 1))
    path = write(tmp_path_factory.mktemp("cut"), raw[:end])
    for read in (read_text, head):
        with pytest.raises(BadInput, match="cut off"):
            read(path)


def test_damaged_gzip(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(TEXT))
    raw[len(raw) // 2] ^= 0xFF
    for damaged in (bytes(raw), gzip.compress(TEXT) + b"something else"):
        with pytest.raises(BadInput, match="damaged"):
            read_text(write(tmp_path, damaged))


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(BadInput, match="a file that can be read"):
            head(path)


@pytest.mark.parametrize("bad", [b"\xff", "é".encode()[:1]])
@pytest.mark.parametrize("line", [1, 2, 3])
def test_what_is_no_text(tmp_path: Path, bad: bytes, line: int) -> None:
    lines = [b"one", b"two", b"three"]
    lines[line - 1] += bad
    path = write(tmp_path, gzip.compress(b"\n".join(lines)))
    with pytest.raises(BadInput, match=f"line {line} is not UTF-8"):
        read_text(path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_text(write(tmp_path, b"\xef\xbb\xbfid")) == "id"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/sets/Books_5.json.gz", "Books_5"),
        ("/sets/steam.inter", "steam"),
        ("/sets/steam-v1.2", "steam-v1.2"),
        ("/sets/ml-1m/ratings.dat", "ml-1m"),
        ("/sets/beauty/Reviews.CSV.ZST", "beauty"),
        ("/sets/ml-100k/u.data", "ml-100k"),
        ("/sets/.hidden", ".hidden"),
        ("/data", "data"),
    ],
)
def test_stem(path: str, name: str) -> None:
    assert stem(Path(path)) == name


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.csv")
    for path in (tmp_path / "log.csv", Path("/dev/zero")):
        with pytest.raises(BadInput, match="a file that can be read, not a folder, pipe or device"):
            head(path)
