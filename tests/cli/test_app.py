"""What surrounds a command: streams closed or full, an odd environment, a hostile folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depthprobe.runs import store


def shell(folder: Path, line: str, **environment: str) -> tuple[int, str]:
    """Run a line of bash, in which ``$DP`` is the command; its exit code and what it printed."""
    done = subprocess.run(  # noqa: S603
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        env={**os.environ, "DP": f"{sys.executable} -m depthprobe", **environment},
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("$DP data list | head -n 1 > /dev/null", 1, ""),
        ("$DP data list > /dev/full", 1, "error: No space left on device"),
        ("$DP data list > /dev/full 2> /dev/full", 1, ""),
        ("$DP data list >&- 2>&-", 0, ""),
        ("$DP data list > /dev/null <&-", 0, ""),
        ("$DP data shw 2>&-", 2, ""),
    ],
)
def test_a_stream_that_takes_nothing(tmp_path: Path, line: str, code: int, words: str) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    found, text = shell(tmp_path, line)
    assert found == code
    assert text.startswith(words)
    assert text.count("\n") == bool(words)


def test_a_closed_stream_lends_its_number_to_no_file(tmp_path: Path) -> None:
    code = (
        "from depthprobe.cli.terminal import open_streams; open_streams();"
        "print(open('file', 'w').fileno() > 2, end='', file=open('told', 'w'))"
    )
    (tmp_path / "run.py").write_text(code, encoding="utf-8")
    shell(tmp_path, f"{sys.executable} run.py <&- >&- 2>&-")
    assert (tmp_path / "told").read_text(encoding="utf-8") == "True"


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "\u00b2", "LINES": "x", "WORLD_SIZE": "", "RANK": " ", "LOCAL_RANK": ""},
        {"COLUMNS": "9" * 20, "WORLD_SIZE": "all", "RANK": "x", "OMP_NUM_THREADS": "many"},
        {"COLUMNS": "0", "TMPDIR": "/nowhere", "HOME": "/nowhere", "LANG": "xx_YY.none"},
        {"PYTHONIOENCODING": "ascii", "TERM": ""},
    ],
)
def test_an_odd_environment(tmp_path: Path, environment: dict[str, str]) -> None:
    code, text = shell(tmp_path, "$DP data list > out", **environment)
    assert (code, text) == (0, "")


def test_no_module_of_the_current_folder_is_imported(tmp_path: Path) -> None:
    for name in ("typer", "socket", "signal", "logging", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(77)\n", encoding="utf-8")
    assert shell(tmp_path, "$DP --version")[0] == 0


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BrokenPipeError(), 1, ""),
        (MemoryError(), 1, "error: not enough memory"),
        (
            RuntimeError("[enforce fail] can't allocate memory\nmore"),
            1,
            "error: not enough memory: [",
        ),
        (OSError(errno.ENAMETOOLONG, "", "x" * 5000), 2, "error: File name too long: 'xxx"),
        (NotADirectoryError(errno.ENOTDIR, "", "file/x"), 2, "error: Not a directory: 'file/x'"),
        (ValueError("embedded null byte"), 2, "error: a path holds a NUL"),
        (KeyError("\x1b[31m" + "x" * 5000), 1, r"error: internal: KeyError: '\x1b[31mxxx"),
    ],
)
def test_a_fault_of_the_machine_is_one_line(
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    words: str,
) -> None:
    def fail(run: Path) -> None:
        raise error

    monkeypatch.setattr(store, "status_of", fail)
    outcome = cli("status", "run")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith(words)
    assert outcome.err.count("\n") == bool(words)
    assert len(outcome.err) <= 1001
    assert "\x1b" not in outcome.err
