"""Files as streams: gzip and zstd undone, what is cut off, corrupt or no text refused.

Compression is recognised by a file's first bytes, never by its name. pyarrow undoes it: it reads
several gzip members as one stream, and an end before the last member's own end is an error.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthprobe.errors import BadInput

FIELD = "data.source"
BLOCK = 2**22  # bytes that are read at once; no row or line is longer
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
# names that say nothing of a log; its folder's name does
GENERIC = frozenset(
    {"data", "dataset", "events", "interactions", "log", "logs", "ratings", "reviews"}
    | {"sequences", "test", "train", "u"}
)

_COMPRESSED = re.compile(r"\.(gz|zst|zstd)$", re.IGNORECASE)
_FORMAT = re.compile(r"(?<=.)\.[a-z]+$", re.IGNORECASE)


@contextmanager
def open_bytes(path: Path, *, field: str = FIELD) -> Iterator[Any]:
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
        raise _unreadable(path, error, field=field) from error


def head(path: Path, size: int = 2**16, *, field: str = FIELD) -> bytes:
    """The first bytes, decompressed: ``size`` of them, fewer only where the file ends."""
    with open_bytes(path, field=field) as stream:
        found: bytes = stream.read(size)
        return found


@contextmanager
def open_text(path: Path, *, field: str = FIELD) -> Iterator[CheckedText]:
    """The bytes of a UTF-8 text, checked as they are read; for parsers that take bytes.

    Raises:
        BadInput: as :func:`open_bytes`, and for a NUL byte or what is not UTF-8; names the line.
    """
    with open_bytes(path, field=field) as stream:
        yield CheckedText(path, stream, field)


def read_text(path: Path, *, encoding: str = "utf-8-sig", field: str = FIELD) -> str:
    """The whole file, decompressed and decoded.

    Raises:
        BadInput: as :func:`open_bytes`, and for a NUL byte or another encoding; names the line.
    """
    with open_bytes(path, field=field) as stream:
        raw: bytes = stream.read()
    nul = raw.find(b"\x00")
    if nul >= 0:
        raise _no_text(path, raw.count(b"\n", 0, nul) + 1, "has a NUL byte", field=field)
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        what = f"is not {encoding.removesuffix('-sig').upper()}"
        line = raw.count(b"\n", 0, error.start) + 1
        raise _no_text(path, line, what, field=field) from error


def stem(path: Path) -> str:
    """What to call a log: the file's name without its endings, or its folder's name.

    >>> stem(Path("Books_5.json.gz")), stem(Path("/sets/ml-1m/ratings.dat"))
    ('Books_5', 'ml-1m')
    """
    path = path.resolve()
    name = _FORMAT.sub("", _COMPRESSED.sub("", path.name))
    return path.parent.name or name if name.lower() in GENERIC else name


class CheckedText(io.RawIOBase):
    """Passes a text's bytes through, counts lines, raises at what is not UTF-8 or is NUL."""

    def __init__(self, path: Path, stream: Any, field: str) -> None:
        self.path, self.stream, self.field = path, stream, field
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.lines = 0  # ends of lines read so far

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, ``size`` of them unless the text ends before; none at its end."""
        block: bytes = self.stream.read(size) if size >= 0 else self.stream.read()
        if b"\x00" in block:
            self._refuse(lambda line: b"\x00" in line, "has a NUL byte")
        try:
            self.decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            self._refuse(_is_not_utf8, "is not UTF-8")
        self.lines += block.count(b"\n")
        return block

    def _refuse(self, at_fault: Callable[[bytes], bool], what: str) -> None:
        with open_bytes(self.path, field=self.field) as stream:
            lines = io.BufferedReader(stream, BLOCK)
            number = next((n for n, line in enumerate(lines, 1) if at_fault(line)), 0)
        raise _no_text(self.path, number, what, field=self.field)


def _is_not_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return True
    return False


def _no_text(path: Path, line: int, what: str, *, field: str) -> BadInput:
    return BadInput(field, path, f"line {line} {what}; expected a text file in UTF-8")


def _unreadable(path: Path, error: OSError, *, field: str) -> BadInput:
    if error.strerror:  # the system's, not the decompressor's
        return BadInput(field, path, f"a file that can be read ({error.strerror})")
    if "truncated" in str(error).lower():
        return BadInput(field, path, "it is cut off: its compressed data end early; copy it anew")
    return BadInput(field, path, "it is damaged: it can't be decompressed; copy it anew")
