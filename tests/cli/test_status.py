"""`status`, and how a sweep ends that is told to, or has no room."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from depthprobe.cli import runs
from depthprobe.errors import BadInput
from depthprobe.runs import store
from depthprobe.runs.store import Status, Working

# a training that does not end by itself
STUDY = """
methods = ["sasrec"]
seeds = 1
device = "cpu"
data.source = "log.txt"
sasrec = { width = 4, heads = 1, recipe = { epochs = 1000000, patience = 1000000 } }
"""


@pytest.mark.slow
def test_a_sweep_that_is_told_to_end_goes_on_later(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY, encoding="utf-8")
    lines = [f"u{user} " + " ".join(f"i{(user + k) % 9}" for k in range(5)) for user in range(20)]
    (tmp_path / "log.txt").write_text("\n".join(lines), encoding="utf-8")
    words = ("sweep", "study.toml", "--output", "run", "--jobs", "1")
    for _ in range(2):
        with subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "depthprobe", *words],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        ) as sweep:
            assert sweep.stderr is not None
            assert any("1 trial to run" in line for line in sweep.stderr)  # waits for this line
            while "sasrec-s0" not in (told := cli("status", "run")).out:
                assert told.code == 0
                time.sleep(0.2)
            sweep.send_signal(signal.SIGTERM)
            rest = sweep.stderr.read().splitlines()
        assert sweep.returncode == 130
        assert rest[-1] == "error: interrupted; the same command continues a sweep"
        assert "no sweep is running" in cli("status", "run").out


@pytest.mark.parametrize("at_work", [True, False])
def test_what_is_left_is_nobodys_where_nobody_works(
    at_work: bool, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Status({"sasrec": Counter(left=2, working=at_work)}, failed=[("full-s0", "no room")])
    if at_work:
        state.working.append(Working("sasrec-s0", "epoch 3 of 9", 7.2))
    monkeypatch.setattr(store, "status_of", lambda run: state)
    told = cli("status", "run")
    assert told.code == 0
    assert told.err == "failed: full-s0: no room\n"
    assert "--retry-failed" in told.out
    assert ("epoch 3 of 9" in told.out and "7 s ago" in told.out) == at_work
    assert ("no sweep is running" in told.out) != at_work


@pytest.mark.parametrize("ended", ["", "it stands"])
def test_of_a_search_little_is_left(
    ended: str, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = SimpleNamespace(words="shown: 2", ended=ended)
    state = Status({"finetune": Counter(left=9)}, search=search)  # type: ignore[arg-type]
    monkeypatch.setattr(store, "status_of", lambda run: state)
    out = cli("status", "run").out
    assert "a search, which trains few of those left; shown: 2\n" in out
    assert ("run the same command to continue" in out) == (not ended)
    assert json.loads(cli("status", "run", "--json").out)["search"] == "shown: 2"


def test_status_for_programs(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"sasrec": Counter(left=2, working=1), "full": Counter(done=3, failed=1, damaged=1)}
    state = Status(
        counts,
        [Working("sasrec-s0", "epoch 3 \x1b[31m", 7.25)],
        [("full-s0", "no room")],
        [("full-s1", BadInput("run", "full-s1", "a record"))],
    )
    monkeypatch.setattr(store, "status_of", lambda run: state)
    told = cli("status", "run", "--json")
    content = json.loads(told.out)
    assert content.pop("damaged")[0]["task"] == "full-s1"
    none = dict.fromkeys(("done", "failed", "working", "left", "damaged"), 0)
    assert content == {
        "schema": 1,
        "run": "run",
        "tasks": {
            "sasrec": none | {"left": 2, "working": 1},
            "full": none | {"done": 3, "failed": 1, "damaged": 1},
        },
        "all": {"done": 3, "failed": 1, "working": 1, "left": 2, "damaged": 1},
        "working": [{"task": "sasrec-s0", "line": "epoch 3 \x1b[31m", "seconds": 7.25}],
        "failed": [{"task": "full-s0", "reason": "no room"}],
        "search": None,
    }
    assert (told.code, told.err.count("\n")) == (2, 1)  # of what can't be read
    state.damaged.clear()
    told = cli("status", "run", "--json")
    assert (told.code, told.err) == (0, "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_one_line(
    number: int, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(number, "told by the system", str(tmp_path / "run"))

    monkeypatch.setattr(runs, "check_output_file", refuse)
    told = cli("report", tmp_path / "run")
    assert told.code == 1
    (line,) = told.err.splitlines()
    assert os.strerror(number) in line
    assert str(tmp_path / "run") in line
