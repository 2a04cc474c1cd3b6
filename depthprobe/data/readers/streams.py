"""Open files as streams; truncated, damaged and binary content is refused.

Compression is recognised by a file's first bytes, never by its name. pyarrow decompresses: it reads
several gzip members as one stream, and a truncated last member is an error. Texts are in UTF-8, or
in UTF-16 with a byte order mark. Before the first line, comments (``# such``) and Excel's ``sep=;``
are skipped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TextIO

from depthprobe.errors import BadInput

FIELD = "data.source"
START = 2**16  # bytes at a file's start that tell its format
BLOCK = 2**22  # bytes to read at a time; no row or line may be longer
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
ARCHIVES = {b"PK\x03\x04": "zip", b"\xfd7zX": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
COMPRESSED = re.compile(r"\.(gz|zst|zstd|bz2)$", re.IGNORECASE)
# names that say nothing about a log: use its folder's name
GENERIC = {
    *("data", "dataset", "events", "interactions", "log", "logs", "ratings", "reviews"),
    *("sequences", "test", "train", "u"),
}
_COMMENTS = re.compile(
    rb"(\xef\xbb\xbf)?(\"?[sS][eE][pP]=[^\n]\"?\r?\n)?([#%]+([ \t][^\n]*)?\r?\n)*"
)
# names of files beside a log: titles, users, notes, hidden files
OTHERS = ("items.*", "movies.*", "users.*", "meta_*", "readme*", "license*", "_*", ".*")


@contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """A file's bytes, decompressed, as a binary stream with ``read(size)``; a text in UTF-8.

    Raises:
        BadInput: if the file can't be opened or, anywhere in the block, can't be read.
    """
    import pyarrow as pa

    kind, start = _start(path)
    try:
        with pa.input_stream(str(path), compression=kind) as stream:
            if start.startswith((b"\xff\xfe", b"\xfe\xff")):
                yield pa.transcoding_input_stream(stream, "utf-16", "utf-8")
                return
            if comments := _COMMENTS.match(start):
                stream.read(comments.end())
            yield stream
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        if not error.encoding.startswith("utf-16"):
            raise
        raise BadInput(FIELD, path, f"a whole text in UTF-16 ({error.reason})") from error


def first_line(path: Path) -> int:
    """The number of the line that :func:`open_bytes` begins with."""
    comments = _COMMENTS.match(_start(path)[1])
    return 1 + (comments[0].count(b"\n") if comments else 0)


def _start(path: Path) -> tuple[str | None, bytes]:
    """A file's compression, and its first bytes decompressed."""
    import pyarrow as pa

    if path.exists() and not path.is_file():  # a pipe may wait for ever
        raise BadInput(FIELD, path, "a file that can be read, not a folder, pipe or device")
    try:
        with path.open("rb") as raw:
            start = raw.read(4)
        if start in ARCHIVES:
            fault = f"it is a {ARCHIVES[start]} archive, or a spreadsheet"
            raise BadInput(FIELD, path, f"{fault}; unpack it, or save it as CSV", fault=True)
        kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
        with pa.input_stream(str(path), compression=kind) as stream:
            return kind, stream.read(START)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> BadInput:
    # the decompressor's errors have no strerror
    fault = error.strerror or "its compressed data are cut off or damaged; copy it anew"
    return BadInput(FIELD, path, f"a file that can be read ({fault})")


def head(path: Path) -> str:
    """The first lines, decompressed, as text; bytes that are no UTF-8 are replaced."""
    with open_bytes(path) as stream:
        raw: bytes = stream.read(START)
    text = raw.decode("utf-8-sig", errors="replace")
    return text.rpartition("\n")[0] or text if len(raw) == START else text


@contextmanager
def open_lines(path: Path, *, newline: str = "\n", errors: str = "strict") -> Iterator[TextIO]:
    """A UTF-8 text to read line by line, so that a long log takes little memory."""
    try:
        with open_bytes(path) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline, errors=errors)
    except UnicodeDecodeError as error:
        with open_bytes(path) as stream:
            lines = enumerate(io.BufferedReader(stream), first_line(path))
            line = next(n for n, raw in lines if raw.decode(errors="ignore").encode() != raw)
        allowed = f"line {line} is not UTF-8; expected a text file in UTF-8"
        raise BadInput(FIELD, path, allowed, fault=True) from error


def filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines, each with its number."""
    with open_lines(path) as text:
        lines = enumerate(text, first_line(path))
        yield from ((number, line) for number, line in lines if line.strip())


def split_words(line: str, *, tabs: bool) -> list[str]:
    r"""A user and items: split only at tabs if ids may hold blanks, else at blanks too.

    >>> split_words("ann lee\tThe Wire\tLost\n", tabs=True)
    ['ann lee', 'The Wire', 'Lost']
    >>> split_words("ann lee\ti1 i2", tabs=False)
    ['ann lee', 'i1', 'i2']
    """
    user, tab, rest = line.strip().partition("\t")
    if tabs:
        return [word.strip() for word in line.strip().split("\t")]
    return [user.strip(), *rest.split()] if tab else line.split()


def stem(path: Path) -> str:
    """The name of a log: the file's name without its suffixes, or its folder's name.

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
