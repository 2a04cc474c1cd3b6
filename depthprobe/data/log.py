"""A raw log as read, with nothing dropped or sorted; and ids to numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TypeVar

import numpy as np

from depthprobe.errors import BadInput, short

T = TypeVar("T")
PARTS = ("training", "validation", "test")
SHOWN = 20  # columns that a message lists
LONGEST_ID = 256  # characters; ids are in fixed-width arrays, so one long id widens them all
_DIGITS = re.compile(r"[0-9]+")
# a power of ten needs a point or a sign, as programs write it: 1e5 may be a hexadecimal id
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*([eE][+-]?[0-9]{1,4})?|[eE][+-][0-9]{1,4})?")
_MISSING = {
    *("nan", "none", "null", "na", "<na>", "n/a", "#n/a", "nat", "nil", "undefined", "\\n"),
    *("?", "-", "(null)", "(not set)", "unknown", "anonymous"),
}
_CHANCE = 20  # ids that a narrower number holds by chance: one in a million, where half do


@dataclass(frozen=True, eq=False)
class Ids:
    """A column of ids: row ``n`` has ``names[codes[n]]``; every name is used.

    ``codes`` int32 (N,). ``names`` are distinct, as written: blanks around them are still there.
    """

    codes: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True)
class ColumnMap:
    """The columns of a table: those that were ``read``, by what they hold, and the others.

    ``ignored`` has the flags that would order the log by a column, if it holds dates, else "".
    """

    read: dict[str, str]
    ignored: dict[str, str]

    def __str__(self) -> str:
        given = {"user": "", "item": "", "time": "none"} | self.read
        read = ", ".join(f"{what} = {name}" for what, name in given.items())
        others = [
            name + (f" (dates: {flags})" if flags else "") for name, flags in self.ignored.items()
        ]
        more = f", ... ({len(others) - SHOWN} more)" if len(others) > SHOWN else ""
        return read + (f", ignored: {', '.join(others[:SHOWN])}{more}" if others else "")

    def notes(self) -> list[str]:
        """A note about columns that hold dates, if no column was read as the time."""
        if "time" in self.read:
            return []
        return [
            f"the column {name} looks like dates and is not read: {flags} orders the log by it"
            for name, flags in self.ignored.items()
            if flags
        ]


@dataclass(frozen=True, eq=False)
class Log:
    """N interactions as read.

    ``times`` (N,), seconds since 1970, int64 or float64, or None. ``ratings`` float64 (N,) or None.
    ``parts`` int8 (N,), places in :data:`PARTS`, for a log that came split, or None. A user's
    interactions may be anywhere. ``notes`` are the reader's decisions; every report repeats them.
    ``ties`` tells how ties in time were broken, if the rows are already in that order.
    ``columns`` are those of the table that it came from.
    """

    users: Ids
    items: Ids
    times: np.ndarray | None = None
    ratings: np.ndarray | None = None
    parts: np.ndarray | None = None
    titles: dict[str, str] = field(default_factory=dict)
    name: str = "log"
    notes: tuple[str, ...] = ()
    ties: str | None = None
    columns: ColumnMap | None = None

    def __len__(self) -> int:
        return len(self.users)


def encode_ids(values: Iterable[object]) -> Ids:
    """Number ids by first appearance."""
    place: dict[str, int] = {}
    codes = [place.setdefault(str(value), len(place)) for value in values]
    return Ids(np.array(codes, dtype=np.int32), list(place))


def number_ids(ids: Ids, what: str) -> tuple[np.ndarray, list[str]]:
    """Codes 0.. in the natural order of the stripped ids, int32 (N,), and the ids by code.

    Raises:
        BadInput: for ids of a ``what`` (``user`` or ``item``) that are blank or too long, or that
            differ only in surrounding blanks: it is unknown whether these are one id or two.
    """
    field = f"data.{what}"
    names = [name.strip() for name in ids.names]
    order = _natural_sort(names)
    names = [names[place] for place in order.tolist()]
    for before, after, place in zip(names, names[1:], order[1:].tolist(), strict=False):
        if before == after:
            allowed = f"{what} ids that differ in more than the blanks around them"
            raise BadInput(field, ids.names[place], allowed)
    if "" in names:
        raise BadInput(field, "", f"{what} ids that are not blank in every interaction")
    longest = max(names, key=len)
    if len(longest) > LONGEST_ID:
        raise BadInput(field, longest, f"ids of at most {LONGEST_ID} characters")
    code = np.empty(len(names), dtype=np.int32)
    code[order] = np.arange(len(names), dtype=np.int32)
    return code[ids.codes], names


def id_notes(ids: Ids, what: str) -> list[str]:
    """Notes that ids of a ``what`` were missing, or were read as numbers and may have merged."""
    names = [name.strip() for name in ids.names]
    notes = []
    numbers, spelled = _alike(filter(_NUMBER.fullmatch, names), Decimal)
    if spelled:
        which = f"{len(spelled):,} {what} ids spell a number that another one spells too"
        pair = " and ".join(spelled[0])
        notes.append(f"{which}, such as {pair}: each spelling is counted as one {what}")
    if powers := [name for name in numbers.values() if "e" in name.lower()]:
        rounded = f"{len(powers):,} {what} ids are written with a power of ten, such as {powers[0]}"
        notes.append(f"{rounded}: if they were rounded, several {what}s are one")
    whole = [int(n) for n in numbers if 0 < n < 2**63 and n == int(n)]
    values = np.array(whole, dtype=np.int64)
    for kind in (np.float16, np.float32, np.float64):
        bits = np.finfo(kind).nmant + 1
        large = values[values > 2**bits]
        if len(large) >= _CHANCE and (large // (large & -large) < 2**bits).all():
            why = f"all {len(large):,} {what} ids above {2**bits:,} are exact as {kind.__name__}"
            notes.append(f"{why}: if they were written as such, several {what}s are one")
            break
    _, alike = _alike(() if all(map(str.isascii, names)) else names, _plain)
    if alike:
        pair = " and ".join(ascii(name[:40]) for name in alike[0])
        which = f"{len(alike):,} {what} ids look like another one, such as {pair}"
        notes.append(f"{which}: each spelling is counted as one {what}")
    if lost := [name for name in names if "\ufffd" in name]:
        which = f"{len(lost):,} {what} ids hold \ufffd, such as {short(lost[0], 40)}"
        notes.append(f"{which}: what it stands for was lost, and several may be one")
    for code, name in enumerate(names):
        if name.lower() in _MISSING:
            rows = int((ids.codes == code).sum())
            notes.append(f"{rows:,} interactions are of the {what} {name!r}: is the id missing?")
    return notes


def _alike(names: Iterable[str], key: Callable[[str], T]) -> tuple[dict[T, str], list[list[str]]]:
    """Pairs of names with the same key: the first one, and a later one."""
    firsts: dict[T, str] = {}
    pairs = [[firsts.setdefault(key(name), name), name] for name in names]
    return firsts, [[first, name] for first, name in pairs if first != name]


def _plain(name: str) -> str:
    """An id as it looks: composed characters of normal width, without invisible ones."""
    if name.isascii():
        return name
    shown = (
        one for one in unicodedata.normalize("NFKC", name) if unicodedata.category(one) != "Cf"
    )
    return "".join(shown).strip()


def used_only(codes: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Renumber codes without gaps, in the same order, after some names have lost their last row."""
    used = np.flatnonzero(np.bincount(codes, minlength=len(names)))
    code = np.zeros(len(names), dtype=np.int32)
    code[used] = np.arange(len(used), dtype=np.int32)
    return code[codes], [names[place] for place in used.tolist()]


def natural_order(text: str) -> tuple[str, str]:
    """A sorting key under which ``i2`` comes before ``i10``; different texts never tie.

    A number gets its number of digits as prefix, so that texts sort by value, whatever the size.
    """

    def sized(match: re.Match[str]) -> str:
        digits = match.group().lstrip("0")
        return f"{len(digits):06d}{digits}"

    return _DIGITS.sub(sized, text), text


def _natural_sort(names: list[str]) -> np.ndarray:
    """Indices of the names in natural order, int64."""
    if all(n.isascii() and n.isdecimal() and len(n) < 19 and n[0] != "0" for n in names):
        return np.argsort(np.array(names, dtype=np.int64), kind="stable")
    keys = [natural_order(name) for name in names]
    return np.array(sorted(range(len(names)), key=keys.__getitem__), dtype=np.int64)
