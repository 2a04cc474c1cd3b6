"""Downloads against a server on loopback that cuts, lies, refuses and ignores."""

from __future__ import annotations

import hashlib
import resource
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from depthprobe.data import public as module
from depthprobe.data.public import download
from depthprobe.errors import BadInput

BODY = hashlib.shake_256(b"set").digest(300_000)  # nothing in it repeats
SHA256 = f"sha256:{hashlib.sha256(BODY).hexdigest()}"
MD5 = f"md5:{hashlib.md5(BODY, usedforsecurity=False).hexdigest()}"


@dataclass
class Server:
    """What the server does; ``cuts`` and ``statuses`` are used up, one a request."""

    url: str = ""
    body: bytes = BODY
    etag: str = '"one"'
    modified: str = ""
    ranges: bool = True
    shift: int = 0  # how far from what was asked for a partial answer begins
    cuts: list[int] = field(default_factory=list)  # bytes after which the connection ends
    statuses: list[int] = field(default_factory=list)
    asked: list[tuple[str | None, str | None]] = field(default_factory=list)  # Range, If-Range
    sent: int = 0  # bytes in all

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted, condition = request.headers["Range"], request.headers["If-Range"]
        self.asked.append((wanted, condition))
        start = 0
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            request.send_error(status)
            return
        if wanted and self.ranges and condition in {None, self.etag, self.modified}:
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) + self.shift
            if start >= len(self.body):
                request.send_error(416)
                return
            request.send_response(206)
            span = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
            request.send_header("Content-Range", span)
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(self.body) - start))
        for header, value in (("ETag", self.etag), ("Last-Modified", self.modified)):
            if value:
                request.send_header(header, value)
        request.end_headers()
        rest = self.body[start:]
        rest = rest[: self.cuts.pop(0)] if self.cuts else rest
        request.wfile.write(rest)
        self.sent += len(rest)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "*")
    does = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            does.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        does.url = f"http://127.0.0.1:{http.server_address[1]}/set.zip"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield does
        http.shutdown()
        thread.join()


def interrupt(server: Server, path: Path, after: int = 100_000) -> None:
    """Fetch so many bytes, then give up as if the process had been stopped."""
    server.cuts = [after]

    def stop(done: int, _: int | None) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url, path, progress=stop)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("checksum", [None, SHA256, MD5])
def test_a_whole_file(server: Server, tmp_path: Path, checksum: str | None) -> None:
    seen: list[tuple[int, int | None]] = []
    path = tmp_path / "cache" / "set.zip"
    got = download(
        server.url,
        path,
        size=len(BODY),
        checksum=checksum,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert got == path
    assert path.read_bytes() == BODY
    assert names(path.parent) == ["set.zip"]
    assert (seen[0], seen[-1]) == ((0, len(BODY)), (len(BODY), len(BODY)))


def test_a_file_that_is_there_is_verified_and_not_fetched(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    path.write_bytes(BODY)
    download(server.url, path, size=len(BODY), checksum=MD5)
    path.write_bytes(BODY[:-1] + b"x")
    with pytest.raises(BadInput, match=r"its md5 is \w+, \w+ is published; delete /.*set\.zip"):
        download(server.url, path, size=len(BODY), checksum=MD5)
    path.write_bytes(BODY[:-1])
    with pytest.raises(BadInput, match="it has 299999 bytes, 300000 are published"):
        download(server.url, path, size=len(BODY))
    assert not server.asked
    assert path.read_bytes() == BODY[:-1]  # what was put there by hand is not thrown away


def test_interrupted_then_resumed_asks_only_for_the_rest(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    interrupt(server, path)
    assert names(tmp_path) == ["set.zip.part", "set.zip.part.version"]
    there = (tmp_path / "set.zip.part").stat().st_size
    assert there == 100_000
    before = server.sent
    download(server.url, path, checksum=SHA256)
    assert server.asked[1:] == [(f"bytes={there}-", '"one"')]
    assert server.sent - before == len(BODY) - there
    assert path.read_bytes() == BODY
    assert names(tmp_path) == ["set.zip"]


def test_cuts_are_mended_within_a_call(server: Server, tmp_path: Path) -> None:
    server.cuts = [1, 70_000, 200_000]
    path = download(server.url, tmp_path / "set.zip")
    assert path.read_bytes() == BODY
    ranges = [wanted for wanted, _ in server.asked]
    assert ranges == [None, "bytes=1-", "bytes=70001-", "bytes=270001-"]
    assert server.sent == len(BODY)


def test_a_server_that_always_cuts_is_given_up_and_resumed_later(
    server: Server, tmp_path: Path
) -> None:
    server.cuts = [1000] * module.ATTEMPTS
    path = tmp_path / "set.zip"
    with pytest.raises(BadInput, match="cut after 5000 of 300000 bytes"):
        download(server.url, path)
    assert len(server.asked) == module.ATTEMPTS
    assert download(server.url, path).read_bytes() == BODY
    assert server.sent == len(BODY)


def test_a_changed_file_starts_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    interrupt(server, path)
    server.body, server.etag = BODY[::-1], '"two"'
    download(server.url, path)
    assert server.asked[1:] == [("bytes=100000-", '"one"')]
    assert path.read_bytes() == BODY[::-1]


def test_a_weak_etag_is_not_trusted_the_date_is(server: Server, tmp_path: Path) -> None:
    server.etag, server.modified = 'W/"one"', "Wed, 21 Oct 2015 07:28:00 GMT"
    interrupt(server, tmp_path / "set.zip")
    assert download(server.url, tmp_path / "set.zip").read_bytes() == BODY
    assert server.asked[1:] == [("bytes=100000-", server.modified)]


@pytest.mark.parametrize("checksum", [None, SHA256])
def test_without_a_version_only_a_checksum_allows_to_resume(
    server: Server, tmp_path: Path, checksum: str | None
) -> None:
    server.etag = ""
    interrupt(server, tmp_path / "set.zip")
    path = download(server.url, tmp_path / "set.zip", checksum=checksum)
    assert path.read_bytes() == BODY
    assert server.asked[1:] == [("bytes=100000-" if checksum else None, None)]


@pytest.mark.parametrize("how", ["ignores Range", "answers with other bytes"])
def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path, how: str) -> None:
    interrupt(server, tmp_path / "set.zip")
    server.ranges, server.shift = how != "ignores Range", -7
    assert download(server.url, tmp_path / "set.zip").read_bytes() == BODY


def test_a_part_longer_than_the_file_starts_again(server: Server, tmp_path: Path) -> None:
    interrupt(server, tmp_path / "set.zip")
    server.body = BODY[:50_000]
    assert download(server.url, tmp_path / "set.zip").read_bytes() == BODY[:50_000]


def test_a_complete_part_is_taken_without_a_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(BODY)
    path = download(server.url, tmp_path / "set.zip", size=len(BODY), checksum=MD5)
    assert path.read_bytes() == BODY
    assert not server.asked


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.body = BODY[::-1]
    with pytest.raises(BadInput, match=r"its sha256 is .* is published; download it by hand to /"):
        download(server.url, tmp_path / "set.zip", size=len(BODY), checksum=SHA256)
    assert names(tmp_path) == []


def test_a_wrong_size_is_seen_before_the_bytes_come(server: Server, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="it offers 300000 bytes, 299999 are published"):
        download(server.url, tmp_path / "set.zip", size=len(BODY) - 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 5), (429, 5)])
def test_refusals(server: Server, tmp_path: Path, status: int, requests: int) -> None:
    server.statuses = [status] * 9
    path = tmp_path / "set.zip"
    with pytest.raises(BadInput) as caught:
        download(server.url, path)
    message = str(caught.value)
    assert message.startswith("download: 'set.zip' is not usable; http://127.0.0.1")
    assert f"HTTP {status} " in message
    assert message.endswith(f"download it by hand to {path} and run again")
    assert "\n" not in message
    assert len(server.asked) == requests


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 500]
    assert download(server.url, tmp_path / "set.zip").read_bytes() == BODY


def test_no_route(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/set.zip"
        with pytest.raises(BadInput, match=f"{url} could not be fetched: Connection refused"):
            download(url, tmp_path / "set.zip")


def test_a_server_that_falls_silent(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/set.zip"
        with pytest.raises(BadInput, match="timed out"):
            download(url, tmp_path / "set.zip")


def test_only_http(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="an https or http address"):
        download("file:///etc/hostname", tmp_path / "set.zip")
    assert names(tmp_path) == []


def test_a_folder_that_can_not_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"file/set\.zip can't be written: File exists"):
        download(server.url, tmp_path / "file" / "set.zip")


def test_a_full_disk(server: Server, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a quota, whatever the disk
    try:
        with pytest.raises(BadInput, match=r"set\.zip can't be written: File too large"):
            download(server.url, tmp_path / "set.zip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert download(server.url, tmp_path / "set.zip").read_bytes() == BODY
