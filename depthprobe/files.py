"""Files that are complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

TEMPORARY = ".tmp-"
ABANDONED = 7 * 86_400  # seconds since the last write, after which a writer counts as dead


def _machine() -> str:
    """A name for the scope of process numbers: the host, its boot, and the container.

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
def complete_file(path: Path, *, parents: bool = True) -> Iterator[Path]:
    """A temporary path that becomes ``path`` if the block succeeds, and is deleted otherwise.

    A link, a pipe or a device such as ``/dev/null`` is kept, and written to directly.

    Args:
        parents: make the folders above it if they are missing, rather than fail.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    through = path.is_symlink() or (path.exists() and not path.is_file())
    place = Path(tempfile.gettempdir()) if through else path.parent
    temporary = place / f"{_prefix()}{uuid.uuid4().hex[:8]}{path.suffix}"
    temporary.touch(exist_ok=False)  # with the user's umask, like every new file
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        with _full_disk_named():
            yield temporary
        with temporary.open("rb+") as file:
            if through:
                with path.open("wb") as target:
                    shutil.copyfileobj(file, target)
                return
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: Path, *, parents: bool = True) -> Iterator[Path]:
    """A temporary folder that replaces the folder ``path`` if the block succeeds.

    If ``path`` is a link, its target is replaced.
    """
    path = path.resolve() if path.is_symlink() else path
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    with temporary_folder(path.parent) as temporary:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()  # with the user's umask, unlike a temporary folder
        mode = stat.S_IMODE(new.stat().st_mode)
        with _full_disk_named():
            yield new
        for file in new.rglob("*"):  # safetensors' are readable by the owner only
            file.chmod(mode if file.is_dir() else mode & 0o666)
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
    """A folder that is deleted when the block ends; after a kill, by :func:`remove_leftovers`."""
    folder = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _full_disk_named() -> Iterator[None]:
    """Turn any sign of a full disk into a clear error: numpy only says how much was written.

    Libraries in Rust and C++ only quote the system's message.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number is None and isinstance(error, OSError) and str(error).endswith(" written"):
            number = errno.ENOSPC
        elif number is None and (said := re.search(r"\bos error (\d+)\)", str(error))):
            number = int(said[1])
        else:
            raise
        raise OSError(number, os.strerror(number)) from error


def reserve(path: Path) -> None:
    """Allocate a sparse file's space on the disk, so that a full disk is an error right away.

    Otherwise a disk that fills up during writes to a memory map kills the process.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:  # not all file systems support it
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise


def write_json(path: Path, content: Any) -> None:
    """Strict JSON (a NaN is an error), atomically."""
    text = json.dumps(content, indent=1, allow_nan=False)
    with complete_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def digest_of(path: Path) -> str:
    """A sha256 of a file's content, 32 digits; an unchanged file is read only once.

    Raises:
        OSError: if it can't be read, or is no plain file: a pipe could block for ever.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return _digest(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def remove_leftovers(folder: Path) -> None:
    """Delete half-written files of killed processes in a folder.

    Files of living processes of this machine stay. For another machine it is unknown whether a
    process lives: its files are deleted after a week without a write.
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
                    latest = max(latest, each.lstat().st_mtime)
            alive = bool(rest) and time.time() - latest < ABANDONED
        if not alive:
            shutil.rmtree(path, ignore_errors=True)  # another sweep may delete it at the same time
            with suppress(OSError):
                path.unlink()


def _prefix() -> str:
    """The prefix of a temporary name, which names its process."""
    return f"{TEMPORARY}{HOST}-{os.getpid()}-"
