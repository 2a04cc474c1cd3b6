"""Readers of raw logs: one function a format, one entry in :data:`FORMATS`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from depthprobe.data.log import Log
from depthprobe.study import BadInput

FIELD = "data.source"
EXPECTED = "a log has one user a line: 'user item item ...', ids without blanks, oldest item first"
LONGEST_ID = 128  # characters; ids lie in fixed-width arrays
SAMPLE = 1000  # lines that are looked at to tell a log from prose

# what ids don't hold, and prose, JSON, CSV, XML and markdown do
_FOREIGN = re.compile(r"[{}\[\]()<>\"'`,;\x00-\x08\x0e-\x1f\x7f]")
_PLAIN = re.compile(r"[\w:\-./]*\w")  # no full stop, question mark or colon at its end
_DECIMAL = re.compile(r"[-+]?\d*\.\d+(e[-+]?\d+)?", re.IGNORECASE)


def read_log(source: str | Path) -> Log:
    """Read ``"embedded"``, a file, or the file that a folder holds.

    Raises:
        BadInput: if there is nothing, or it is not a log; the message names the line.
    """
    if str(source) == "embedded":
        return FORMATS["embedded"](Path())
    path = Path(source)
    if not path.exists():
        raise BadInput(FIELD, path, "'embedded', or the path of a log or of a prepared folder")
    if path.is_dir():
        folder, path = path, path / "sequences.txt"
        if not path.is_file():
            raise BadInput(FIELD, folder, "a folder with a sequences.txt, or a prepared folder")
    return FORMATS["sequences"](path)


def read_sequences(path: Path) -> Log:
    """Read ``user item item ...``, one user a line, oldest item first; there are no times.

    An ``items.tsv`` beside it, with the header ``item_id<TAB>title``, gives titles.

    A file is refused, with the line's number, where a line has a user and no item, where a user
    has a second line, or where it is some other kind of file. Brackets, quotes, commas and
    semicolons tell JSON, CSV and most prose. Beyond that, ids nearly always hold digits; items
    that are words pass only if they have no punctuation at their ends, most of them recur on
    other lines, and no user's id is also an item's, which is not so in prose.
    """
    lines = _read_text(path).split("\n")
    rows = [line.split() for line in lines]
    numbers = [number for number, row in enumerate(rows, 1) if row]
    rows = [row for row in rows if row]
    if not rows:
        raise BadInput(FIELD, path, f"the file is empty; {EXPECTED}")
    for number, row in zip(numbers, rows, strict=True):
        foreign = _FOREIGN.search(lines[number - 1])
        if foreign:
            raise _bad_line(path, number, f"has {foreign.group()!r}")
        if len(row) == 1:
            raise _bad_line(path, number, f"has a single word, {row[0][:40]!r}")
    _check_ids(path, numbers, rows)
    first_line: dict[str, int] = {}
    for number, row in zip(numbers, rows, strict=True):
        if row[0] in first_line:
            earlier = first_line[row[0]]
            raise _bad_line(path, number, f"is user {row[0][:40]!r} again, after line {earlier}")
        first_line[row[0]] = number
    lengths = np.array([len(row) - 1 for row in rows])
    items = np.array([item for row in rows for item in row[1:]], dtype=np.str_)
    return Log(
        users=np.repeat(np.array([row[0] for row in rows], dtype=np.str_), lengths),
        items=items,
        titles=_read_titles(path.with_name("items.tsv")),
        name=path.resolve().parent.name if path.stem == "sequences" else path.stem,
    )


def read_embedded(_: Path) -> Log:
    """Make the embedded log; there is nothing to read."""
    from depthprobe.data.synthetic import embedded_log

    return embedded_log()


FORMATS: dict[str, Callable[[Path], Log]] = {
    "embedded": read_embedded,
    "sequences": read_sequences,
}


def _bad_line(path: Path, number: int, what: str) -> BadInput:
    return BadInput(FIELD, path, f"line {number} {what}; {EXPECTED}")


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(FIELD, path, f"a file that can be read ({error.strerror})") from error
    if b"\x00" in raw:
        raise BadInput(FIELD, path, f"a text file, this one is binary; {EXPECTED}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _bad_line(path, line, "is not UTF-8 text") from error


def _check_ids(path: Path, numbers: list[int], rows: list[list[str]]) -> None:
    """Tell ids from words and numbers; see :func:`read_sequences`."""
    for number, row in zip(numbers, rows, strict=True):
        longest = max(map(len, row))
        if longest > LONGEST_ID:
            raise _bad_line(path, number, f"has a word of {longest} characters")
    sample = rows[:SAMPLE]
    # without the first line, which may be a header
    items = [item for row in sample[1:] or sample for item in row[1:]]
    with_digit = sum(any(c.isdigit() for c in item) for item in items) / len(items)
    if with_digit >= 0.9:
        if not any(c.isdigit() for word in rows[0] for c in word):
            raise _bad_line(path, numbers[0], "looks like a header: no id in it has a digit")
        if sum(_DECIMAL.fullmatch(item) is not None for item in items) > len(items) / 2:
            raise _bad_line(path, numbers[0], "and those after it hold decimal numbers, not ids")
        return
    for number, row in zip(numbers, sample, strict=False):
        odd = next((word for word in row if not _PLAIN.fullmatch(word)), None)
        if odd is not None:
            raise _bad_line(path, number, f"has {odd[:40]!r}, and most ids hold no digit: prose?")
    items = [item for row in sample for item in row[1:]]
    lines_with = Counter(item for row in sample for item in set(row[1:]))
    recurring = sum(lines_with[item] > 1 for item in items) / len(items)
    if recurring < 0.5 or any(row[0] in lines_with for row in sample):
        raise _bad_line(path, numbers[0], "and those after it hold words, not ids: prose?")


def _read_titles(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("items.tsv", path, "UTF-8 text that can be read") from error
    expected = "the header 'item_id<TAB>title', then an id, a tab and a title on each line"
    if not lines or [word.strip() for word in lines[0].split("\t")] != ["item_id", "title"]:
        raise BadInput("items.tsv", path, f"line 1 is not the header; {expected}")
    titles: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        item, tab, title = line.partition("\t")
        if not line.strip():
            continue
        if not tab:
            raise BadInput("items.tsv", path, f"line {number} has no tab; {expected}")
        titles[item.strip()] = " ".join(title.split())
    return titles
