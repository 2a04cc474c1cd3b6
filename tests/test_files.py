"""A file or folder is complete or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from depthprobe import files
from depthprobe.files import (
    HOST,
    complete_file,
    complete_folder,
    digest_of,
    remove_leftovers,
    reserve,
    temporary_folder,
    write_json,
)


def test_a_fault_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), complete_file(path) as temporary:
        temporary.write_text(str(1 // 0))
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("complete", [complete_file, complete_folder])
def test_a_full_disk_is_told_of_an_array_too(complete: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, complete(tmp_path / "a"):
        np.ones(10_000).tofile("/dev/full")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_of_what_a_library_in_rust_says(tmp_path: Path) -> None:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    for error, kind in ((SafetensorError(text), OSError), (SafetensorError("other"), Exception)):
        with pytest.raises(kind) as caught, complete_folder(tmp_path / "model"):
            raise error
        assert getattr(caught.value, "errno", None) == (errno.ENOSPC if kind is OSError else None)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="a sparse file stays one here")
def test_the_room_of_a_file_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10 * 2**20)
    before = path.stat().st_blocks
    reserve(path)
    assert before * 512 < path.stat().st_size <= path.stat().st_blocks * 512
    assert not any(path.read_bytes())


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "trial"
    for name in ("one", "two"):
        with complete_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["two"]
    with pytest.raises(ZeroDivisionError), complete_folder(path) as temporary:
        (temporary / "three").write_text(str(1 // 0))
    assert [p.name for p in path.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["trial"]


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_who_may_read_is_what_the_umask_says(umask: int, tmp_path: Path) -> None:
    """Also of what a library wrote for its owner alone."""
    with complete_file(tmp_path / "page.html") as temporary:
        temporary.unlink()  # some write a file of their own in its place
        temporary.touch(mode=0o600)
    with complete_folder(tmp_path / "model") as folder:
        (folder / "part").mkdir()
        save_file({"a": torch.zeros(1)}, folder / "part" / "a.safetensors")
        (folder / "part" / "a.safetensors").chmod(0o600)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    folders, files = 0o777 & ~umask, 0o666 & ~umask
    assert modes == {"page.html": files, "a.safetensors": files, "model": folders, "part": folders}


def test_a_link_or_a_pipe_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    os.mkfifo(tmp_path / "pipe")
    arrived: list[str] = []
    reader = threading.Thread(target=lambda: arrived.append((tmp_path / "pipe").read_text()))
    reader.start()
    for name in ("link", "dangling", "pipe"):
        with complete_file(tmp_path / name) as temporary:
            temporary.write_text("new")
    reader.join()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
    assert [(tmp_path / name).read_text() for name in ("target", "later")] == ["new", "new"]
    assert arrived == ["new"]
    assert len([*tmp_path.iterdir()]) == 5


def test_a_link_to_a_folder_stays_and_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    with complete_folder(tmp_path / "link") as temporary:
        (temporary / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "scratch" / "a").is_file()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError), complete_folder(tmp_path / "file"):
        raise AssertionError
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("complete", [complete_file, complete_folder])
def test_a_folder_that_is_gone_is_not_made_again(complete: Any, tmp_path: Path) -> None:
    with complete(tmp_path / "deep" / "below" / "a"):
        pass
    with pytest.raises(FileNotFoundError), complete(tmp_path / "x" / "a", parents=False):
        raise AssertionError
    assert not (tmp_path / "x").exists()


def test_a_digest_is_of_the_content_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    first = digest_of(path)
    assert first == hashlib.sha256(b"abc").hexdigest()[:32] == digest_of(path)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"abd")
    os.utime(path, ns=times)
    assert digest_of(path) == hashlib.sha256(b"abd").hexdigest()[:32]
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="no plain file"):
            digest_of(tmp_path / name)


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    (tmp_path / f".tmp-{HOST}-{ended.pid}-abc").mkdir()
    (tmp_path / f".tmp-{HOST}-{ended.pid}-abc" / "x").touch()
    (tmp_path / f".tmp-{HOST}-{ended.pid}-d.json").touch()
    living = {f".tmp-{HOST}-{os.getpid()}-a", ".tmp-otherhost-1-a", "kept"}
    for name in living:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == living


def test_another_machine_of_the_same_name_keeps_what_it_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes have numbers that nobody has here, or had before a reboot."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "another boot")
    other = files._machine()
    monkeypatch.undo()
    assert other != HOST
    assert files._machine() == HOST
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    folder = tmp_path / f".tmp-{other}-{ended.pid}-a"
    folder.mkdir()
    (folder / "weights").touch()
    remove_leftovers(tmp_path)
    assert folder.exists()
    long_ago = time.time() - files.ABANDONED - 60
    os.utime(folder, (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert folder.exists()  # a file in it is new
    os.utime(folder / "weights", (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert not folder.exists()


def test_a_temporary_folder_is_one_that_is_cleared(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        assert folder.name.startswith(f".tmp-{HOST}-{os.getpid()}-")
        remove_leftovers(tmp_path)
        assert folder.is_dir()
    assert not folder.exists()


def test_temporaries_say_whose_they_are(tmp_path: Path) -> None:
    with complete_file(tmp_path / "a.json") as file, complete_folder(tmp_path / "b") as folder:
        for name in (file.name, folder.parent.name):
            assert name.startswith(f".tmp-{HOST}-{os.getpid()}-")
