"""Input that can't be used: one line for the person who gave it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class BadInput(ValueError):
    """Input that can't be used; the message is one line: field, value, what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: {short(value)} is not usable; {allowed}")

    def __reduce__(self) -> tuple[type[BadInput], tuple[str, object, str]]:
        """What is pickled: by default it could not be made again from its message."""
        return type(self), (self.field, self.value, self.allowed)


def short(value: object, limit: int = 120) -> str:
    """The value as it would be written in Python, cut where it is long."""
    text = repr(str(value)) if isinstance(value, Path) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """What is allowed, the known name that was probably meant first."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}one of {', '.join(known)}"


def one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is none of the allowed ones."""
    if value not in allowed:
        raise BadInput(field, value, f"one of {', '.join(allowed)}")


def check_writable(field: str, path: Path) -> None:
    """Refuse a folder that could not be made: below a file, or without the permission."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise BadInput(field, path, f"a folder ({existing} is a file)")
    if not os.access(existing, os.W_OK):
        raise BadInput(field, path, f"a folder that can be written ({existing} can't)")
