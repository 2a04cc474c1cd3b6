"""Files by name, and their content as streams; what is cut off, damaged or no text is refused.

Compression is recognised by a file's first bytes, never by its name. pyarrow undoes it: it reads
several gzip members as one stream, and an end before the last member's own end is an error.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from depthprobe.errors import BadInput

FIELD = "data.source"
BLOCK = 2**22  # bytes that are read at once; no row or line is longer
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED = re.compile(r"\.(gz|zst|zstd)$", re.IGNORECASE)
# names that tell nothing of a log: its folder's name is taken
GENERIC = {
    *("data", "dataset", "events", "interactions", "log", "logs", "ratings", "reviews"),
    *("sequences", "test", "train", "u"),
}
# names of what lies beside a log: titles, users, notes, what is hidden
OTHERS = ("items.*", "movies.*", "users.*", "meta_*", "readme*", "license*", "_*", ".*")


@contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """A file's bytes, decompressed, as a binary stream with ``read(size)``.

    Raises:
        BadInput: if the file can't be opened or, anywhere in the block, can't be read on.
    """
    import pyarrow as pa

    try:
        with path.open("rb") as raw:
            start = raw.read(4)
        kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
        with pa.input_stream(str(path), compression=kind) as stream:
            yield stream
    except OSError as error:
        # the decompressor's errors have no strerror
        fault = error.strerror or "its compressed data are cut off or damaged; copy it anew"
        raise BadInput(FIELD, path, f"a file that can be read ({fault})") from error


def head(path: Path, size: int = 2**16) -> str:
    """The first ``size`` bytes as text, decompressed; what is no UTF-8 in them is replaced."""
    with open_bytes(path) as stream:
        raw: bytes = stream.read(size)
    return raw.decode("utf-8-sig", errors="replace")


@contextmanager
def open_text(path: Path) -> Iterator[CheckedText]:
    """The bytes of a UTF-8 text for parsers that take bytes, checked as they are read."""
    with open_bytes(path) as stream:
        yield CheckedText(path, stream)


@contextmanager
def open_lines(path: Path, *, newline: str = "\n") -> Iterator[TextIO]:
    """The same text decoded, to be read line by line: what is held of a long log stays small."""
    with open_text(path) as stream:
        yield io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig", newline=newline)


class CheckedText(io.RawIOBase):
    """Passes a text's bytes on, counts its lines, and refuses what is not UTF-8 by its line."""

    def __init__(self, path: Path, stream: Any) -> None:
        self.path, self.stream = path, stream
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.lines = 0  # ends of lines read so far

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, ``size`` of them unless the text ends before; none at its end."""
        block: bytes = self.stream.read(size) if size >= 0 else self.stream.read()
        try:
            self.decoder.decode(block, final=size < 0 or not block)
        except UnicodeDecodeError as error:
            line = self.lines + error.object[: error.start].count(b"\n") + 1
            expected = "expected a text file in UTF-8"
            raise BadInput(FIELD, self.path, f"line {line} is not UTF-8; {expected}") from error
        self.lines += block.count(b"\n")
        return block


def stem(path: Path) -> str:
    """What to call a log: the file's name without its endings, or its folder's name.

    >>> stem(Path("Books_5.json.gz")), stem(Path("/sets/ml-1m/ratings.dat"))
    ('Books_5', 'ml-1m')
    """
    path = path.resolve()
    name = re.sub(r"(?<=.)\.[A-Za-z]+$", "", COMPRESSED.sub("", path.name))
    return path.parent.name or name if name.lower() in GENERIC else name


def plain_name(path: Path) -> str:
    """A file's name in lower case, without the ending of a compressed one."""
    return COMPRESSED.sub("", path.name.lower())


def fits(path: Path, patterns: Iterable[str]) -> bool:
    """Whether the plain name fits one of the patterns."""
    return any(fnmatch(plain_name(path), pattern) for pattern in patterns)
