"""A file or folder is complete or absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depthprobe import files
from depthprobe.files import (
    HOST,
    complete_file,
    complete_folder,
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


def test_others_may_read_what_a_library_wrote_for_its_owner_alone(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "model") as temporary:
        (temporary / "part").mkdir()
        save_file({"a": torch.zeros(1)}, temporary / "part" / "a.safetensors")
        (temporary / "part" / "a.safetensors").chmod(0o600)
    assert (tmp_path / "model" / "part" / "a.safetensors").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "model" / "part").stat().st_mode & 0o777 == 0o755


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
