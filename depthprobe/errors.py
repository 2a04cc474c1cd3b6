"""Errors about input: one line for the user."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path

# Characters that control a terminal or end a line: control characters, line separators, marks that
# change the direction of text. And half surrogate pairs, which no encoding can hold.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 1000  # characters of a message


class BadInput(ValueError):
    """Input that can't be used; the message is one line: field, what was expected, what came.

    Args:
        field: the key, or the option.
        value: what came; None if nothing came.
        allowed: what was expected, such as ``a folder``; with ``fault``, what is wrong instead.
    """

    def __init__(self, field: str, value: object, allowed: str, *, fault: bool = False) -> None:
        self.field, self.value, self.allowed, self.fault = field, value, allowed, fault
        if fault:
            message = f"{short(value)}: {allowed}"
        elif value is None:
            message = f"required. Give {allowed}"
        else:
            message = f"expected {allowed}, got {short(value)}"
        super().__init__(f"{field}: {message}")

    def __reduce__(self) -> tuple[partial[BadInput], tuple[str, object, str]]:
        """How to pickle it: by default it could not be rebuilt from its message."""
        return partial(type(self), fault=self.fault), (self.field, self.value, self.allowed)

    def renamed(self, field: str) -> BadInput:
        """The same error for another field."""
        return type(self)(field, self.value, self.allowed, fault=self.fault)


def short(value: object, limit: int = 120) -> str:
    """The value as written in Python, shortened if it is long."""
    try:
        text = repr(str(value)) if isinstance(value, Path) else repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or deeply nested
        text = "what is too long to be shown"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def visible(text: str, keep: str = "") -> str:
    """Foreign text made safe for a terminal: control characters are shown, not sent."""
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def shell_line(words: Iterable[str]) -> str:
    """A command in one line that can be pasted into a shell; words are quoted."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if not CONTROL.search(word):
        return shlex.quote(word)
    # only bash's $'...' can write a line break in one line
    plain = re.sub(r"[\\']", r"\\\g<0>", word)
    written = CONTROL.sub(lambda c: "".join(rf"\x{byte:02x}" for byte in os.fsencode(c[0])), plain)
    return f"$'{written}'"


def one_line(text: object) -> str:
    """A foreign message in one visible line, shortened in the middle if it is long."""
    line = visible(" ".join(str(text).split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 205]} ... {line[-200:]}"


def closest(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.3) -> list[str]:
    """The known names that were probably meant; those that begin with the name come first."""
    known = list(known)
    begun = [each for each in known if name and each.startswith(name)]
    similar = difflib.get_close_matches(name, known, n=most, cutoff=cutoff)
    return list(dict.fromkeys([*begun, *similar]))[:most]


def nearest(name: str, known: Iterable[str]) -> str:
    """The allowed names with the one that was probably meant; of many names only that one."""
    known = list(known)
    hint = "".join(f" (did you mean {each}?)" for each in closest(name, known, most=1, cutoff=0.6))
    names = f"{len(known)} names" if hint and len(known) > 12 else ", ".join(known)
    return f"one of {names}{hint}"


def one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not allowed."""
    if value not in allowed:
        raise BadInput(field, value, f"one of {', '.join(allowed)}")


def check_writable(field: str, path: Path) -> None:
    """Refuse a folder that can't be made: below a file, or without permission."""
    try:
        place = path.absolute()
    except FileNotFoundError:
        raise BadInput(field, path, "an absolute path (the current folder is gone)") from None
    existing = next(p for p in (place, *place.parents) if p.exists())
    if not existing.is_dir():
        raise BadInput(field, path, f"a folder ({existing} is a file)")
    if not os.access(existing, os.W_OK):
        raise BadInput(field, path, f"a folder that can be written ({existing} can't)")
