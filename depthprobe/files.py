"""Files that are complete or absent: written beside their place, then renamed."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

TEMPORARY = ".tmp-"
HOST = re.sub(r"[^A-Za-z0-9]+", "", platform.node())[:32] or "here"


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_prefix(), suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _short_writes_told():
            yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(), dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()  # under the user's umask, unlike mkdtemp's folder
        with _short_writes_told():
            yield new
        for file in new.rglob("*"):  # safetensors' own are its owner's alone: no server could read
            file.chmod(0o755 if file.is_dir() else 0o644)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            with suppress(OSError):
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _short_writes_told() -> Iterator[None]:
    """Say what numpy keeps to itself when it could write a part alone: that a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is None and str(error).endswith(" written"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def reserve(path: Path) -> None:
    """Take all the room on the disk that a sparse file will need.

    A disk that is full is an error then; one that gets full while the file is written through a
    memory map ends the process by a signal.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("rb+") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:  # not all file systems can
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise


def write_json(path: Path, content: Any) -> None:
    """Strict JSON (a NaN is an error), atomically."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with complete_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that are no more left half-written in a folder.

    What belongs to a living process of this machine stays, and so does what another machine's
    wrote: whether those live can't be seen from here.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        host, _, rest = path.name.removeprefix(TEMPORARY).partition("-")
        number = rest.partition("-")[0]
        if rest and (host != HOST or (number.isdigit() and psutil.pid_exists(int(number)))):
            continue
        if path.is_dir():  # another sweep may be at it, too: what is gone is gone
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _prefix() -> str:
    """What a temporary name begins with: whose it is."""
    return f"{TEMPORARY}{HOST}-{os.getpid()}-"
