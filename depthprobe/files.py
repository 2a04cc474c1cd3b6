"""Files that are complete or absent: written beside their place, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

TEMPORARY = ".tmp-"
ABANDONED = 7 * 86_400  # seconds since the last write, after which nobody is still writing


def _machine() -> str:
    """A name for where process numbers hold: the host, its boot, and the container.

    Machines that share a disk may share a host name, and so may containers of one machine.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, processes = f"{uuid.getnode()}-{psutil.boot_time():.0f}", ""
    digest = hashlib.sha256(f"{platform.node()} {boot} {processes}".encode()).hexdigest()
    return re.sub(r"[^A-Za-z0-9]+", "", platform.node())[:20] + digest[:12]


HOST = _machine()


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_prefix(), suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _full_disk_named():
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
    with temporary_folder(path.parent) as temporary:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()  # under the user's umask, unlike the temporary folder itself
        with _full_disk_named():
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


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder that goes when the block ends; a kill leaves it to :func:`remove_leftovers`."""
    folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _full_disk_named() -> Iterator[None]:
    """Name the full disk: numpy says only how much of an array could be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None and str(error).endswith(" written"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def reserve(path: Path) -> None:
    """Allocate a sparse file's room on the disk, so that a full disk is an error right away.

    One that gets full while the file is written through a memory map kills the process.
    """
    if hasattr(os, "posix_fallocate"):
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
    """Delete what killed processes left half-written in a folder.

    What belongs to a living process of this machine stays. Whether one of another machine lives
    can't be seen from here: what it wrote goes when nobody has written to it for a week.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        host, _, rest = path.name.removeprefix(TEMPORARY).partition("-")
        number = rest.partition("-")[0]
        if host == HOST and number.isdigit():
            alive = psutil.pid_exists(int(number))
        else:
            latest = 0.0
            for each in (path, *path.rglob("*")):
                with suppress(OSError):
                    latest = max(latest, each.stat().st_mtime)
            alive = bool(rest) and time.time() - latest < ABANDONED
        if not alive:
            shutil.rmtree(path, ignore_errors=True)  # another sweep may delete it at the same time
            with suppress(OSError):
                path.unlink()


def _prefix() -> str:
    """What a temporary name begins with: whose it is."""
    return f"{TEMPORARY}{HOST}-{os.getpid()}-"
