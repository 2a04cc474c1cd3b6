"""A file from an http address: resumed where it was cut, verified, whole or not there."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from depthprobe import __version__
from depthprobe.study import BadInput

ATTEMPTS = 5  # in one call, for a connection that is cut or a server that is busy
PAUSE = 1.0  # seconds before the second attempt, twice as long before each further one
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20  # bytes

_SPAN = re.compile(r"bytes (\d+)-\d+/(\d+)")


class _RefusedError(Exception):
    """The address gives nothing usable; trying again is of no use."""


class _CutError(Exception):
    """The server can't go on at present; another attempt may succeed."""


def download(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    checksum: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Fetch an address to ``path``; a file that is already there is verified and kept.

    What has come lies in ``<name>.part`` until it is complete and verified; the next call goes on
    from there, if the server still has the same file. One process at a time: the caller sees to it.

    Args:
        size: bytes, where published.
        checksum: ``sha256:...`` or ``md5:...``, where published.
        progress: called with the bytes there and the bytes in all (None: the server doesn't say),
            once before the first byte of an attempt and then about every megabyte.

    Raises:
        BadInput: if the address can't be fetched, the file is not as published, or can't be
            written; the message names the address, the reason and the path.
    """
    if not url.startswith(("https://", "http://")):
        raise BadInput("download", url, "an https or http address")
    part = path.with_name(f"{path.name}.part")
    try:
        if path.exists():
            if wrong := _difference(path, size, checksum):
                raise BadInput("download", path.name, f"{wrong}; delete {path} and run again")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        report = progress or (lambda *_: None)
        _persist(lambda: _append(url, part, size=size, checksum=checksum, progress=report))
        if wrong := _difference(part, size, checksum):
            _discard(part)
            raise _RefusedError(wrong)
        _validator(part).unlink(missing_ok=True)
        part.replace(path)
    except _RefusedError as error:
        why = f"{url} could not be fetched: {error}"
        allowed = f"{why}; download it by hand to {path} and run again"
        raise BadInput("download", path.name, allowed) from error
    except OSError as error:  # of the disk: those of the network are caught where they arise
        allowed = f"{path} can't be written: {_reason(error)}"
        raise BadInput("download", path.name, allowed) from error
    return path


def _persist(attempt: Callable[[], None]) -> None:
    """Try again, after longer and longer pauses, what was cut off."""
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except _CutError as error:
            if number == ATTEMPTS - 1:
                raise _RefusedError(str(error)) from error
            time.sleep(PAUSE * 2**number)


def _append(
    url: str,
    part: Path,
    *,
    size: int | None,
    checksum: str | None,
    progress: Callable[[int, int | None], None],
) -> None:
    """Ask for what the part lacks; start again where the server can't give only that."""
    there = part.stat().st_size if part.exists() else 0
    if there and there == size:
        return
    known = _validator(part).read_text(encoding="utf-8") if _validator(part).exists() else ""
    headers = {"User-Agent": f"depthprobe/{__version__}", "Accept-Encoding": "identity"}
    if there and (known or checksum):  # else nothing would tell two versions spliced together
        headers["Range"] = f"bytes={there}-"
        if known:
            headers["If-Range"] = known
    with _open(Request(url, headers=headers), part) as response:  # noqa: S310 - http, see above
        done, total = _span(response, part, there)
        if size is not None and total not in {None, size}:
            raise _RefusedError(f"it offers {total} bytes, {size} are published")
        with part.open("ab" if done else "wb") as file:
            if not done:
                _validator(part).write_text(_version(response), encoding="utf-8")
            progress(done, total)
            while chunk := _read(response):
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise _CutError(f"the connection was cut after {done} of {total} bytes")


def _open(request: Request, part: Path) -> HTTPResponse:
    try:
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT)  # noqa: S310 - http, see above
    except HTTPError as error:
        error.close()
        if error.code == 416:  # the part is longer than the file is by now
            _discard(part)
        again = error.code in {416, 429} or error.code >= 500
        raise (_CutError if again else _RefusedError)(
            f"HTTP {error.code} {error.reason}"
        ) from error
    except (OSError, HTTPException) as error:
        raise _RefusedError(_reason(error)) from error
    return response


def _span(response: HTTPResponse, part: Path, there: int) -> tuple[int, int | None]:
    """Where the response's bytes begin, and the size of the file if the server says it."""
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    span = _SPAN.fullmatch(response.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != there:
        _discard(part)
        raise _CutError("the server gave other bytes than were asked for")
    return there, int(span[2])


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise _CutError(f"the connection was cut ({_reason(error)})") from error


def _version(response: HTTPResponse) -> str:
    """What tells this version of the file from another: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _validator(part: Path) -> Path:
    """Where the version that a part belongs to is kept."""
    return part.with_name(f"{part.name}.version")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _difference(path: Path, size: int | None, checksum: str | None) -> str:
    """How a file differs from what is published; empty if it does not."""
    there = path.stat().st_size
    if size is not None and there != size:
        return f"it has {there} bytes, {size} are published"
    if checksum is None:
        return ""
    algorithm, _, published = checksum.partition(":")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    return "" if digest == published else f"its {algorithm} is {digest}, {published} is published"


def _reason(error: Exception) -> str:
    """Why, in one line."""
    reason = error.reason if isinstance(error, URLError) else error
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return " ".join(text.split()) or type(error).__name__
