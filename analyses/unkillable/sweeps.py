"""What kills and damage share: the study, sweeps of it as processes, and what they must leave."""

# ruff: noqa: S101, S603 - it runs commands, and its assertions are what it is for
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.models.embedded import embedded_tokenizer
from depthprobe.runs.store import Run, open_run

COMMAND = Path(__file__).with_name("checkpointing.py")
STUDY = """
name = "unkillable"
layers = "1,2"
methods = ["popularity", "sasrec", "full", "early-exit", "skip", "similarity", "finetune", "heal",
           "distill", "elastic", "random-init"]
seeds = 1
device = "cpu"
[data]
source = "{folder}/log.txt"
max_history = 20
[backbone]
source = "{folder}/backbone"
prompt = "Next:"
[sasrec]
width = 16
blocks = 1
[sasrec.recipe]
epochs = 4
[recipe]
epochs = 4
[protocol]
resamples = 200
[cost]
rounds = 3
"""
TASKS = 16
USERS, ITEMS = 400, 1500
# what is measured differs from one run to the next
MEASURED = ("_ms", "seconds")


def write_study(folder: Path) -> Path:
    """A log of 400 users, a Llama of four blocks, and a study of them; returns its file."""
    draw = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        start, length = draw.integers(ITEMS), draw.integers(5, 25)
        rows.append(f"u{user} " + " ".join(f"i{(start + k) % ITEMS}" for k in range(length)))
    (folder / "log.txt").write_text("\n".join(rows) + "\n")
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    embedded_tokenizer().save_pretrained(folder / "backbone")
    study = folder / "study.toml"
    study.write_text(STUDY.format(folder=folder))
    return study


def start(
    study: Path, run: Path, *more: str, said: Path, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Begin a sweep of two workers; all that it prints goes to a file."""
    command = [sys.executable, str(COMMAND), "sweep", str(study)]
    with said.open("wb") as file:
        return subprocess.Popen(
            [*command, "--output", str(run), "--jobs", "2", *more],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})},
        )


def finish(study: Path, run: Path, *more: str, said: Path, **named: Mapping[str, str]) -> None:
    """A sweep to its end, which must be a good one."""
    assert start(study, run, *more, said=said, **named).wait() == 0, said.read_text()


def tell(study: Path, run: Path, *more: str, said: Path) -> str:
    """A sweep that can't end well: its exit code and what it says of it; never a traceback."""
    code = start(study, run, *more, said=said).wait()
    text = said.read_text()
    assert code in (1, 2), text
    assert "Traceback" not in text, text
    assert "internal:" not in text, text
    told = [line for line in text.splitlines() if line.startswith(("error: ", "failed: "))]
    causes = [line for line in told if ": needs " not in line]
    assert causes, text
    lost = f" (and {len(told) - len(causes)} that need it)" if len(causes) < len(told) else ""
    return f"exit {code}: {' / '.join(causes)}{lost}"


def complete(run: Path) -> dict[str, tuple[int, int]]:
    """What is done, with what would change if it were done again."""
    places = [*run.glob("trials/*/record.json"), *run.glob("probes/*/record.json")]
    found = {}
    for path in places:
        status = path.stat()
        found[path.parent.name] = status.st_ino, status.st_mtime_ns
    return found


def check(run: Path, quiet: Run, done: Mapping[str, tuple[int, int]] | None = None) -> None:
    """The tables of a sweep in peace to the last bit, and nothing left behind.

    Args:
        done: what was seen to be done: it must not have been done again. None: nothing is known.
    """
    found = open_run(run)
    assert not found.failed, found.failed
    pd.testing.assert_frame_equal(found.users, quiet.users, check_exact=True)
    pd.testing.assert_frame_equal(found.scores("similarity"), quiet.scores("similarity"))
    for name in ("metrics", "trials"):
        written = pd.read_parquet(run / f"{name}.parquet")
        expected = pd.read_parquet(quiet.path / f"{name}.parquet")
        pd.testing.assert_frame_equal(_lasting(written), _lasting(expected), check_exact=True)
    if done is not None:
        now = complete(run)
        assert {name: now[name] for name in done} == dict(done)
        logs = {log.stem: log.read_text() for log in (run / "logs").glob("*.log")}
        assert len(logs) == TASKS, sorted(logs)
        for task, text in logs.items():
            assert "begun" not in text.partition("done in")[2], task
    files = {path for path in _files(run) if not path.startswith(("logs", "checkpoints"))}
    assert files == {path for path in _files(quiet.path) if not path.startswith("logs")}
    left = [*run.rglob(".tmp-*"), *run.glob(".locks"), *run.glob("checkpoints")]
    assert not left, left


def _files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def _lasting(table: pd.DataFrame) -> pd.DataFrame:
    return table[[name for name in table if not any(part in name for part in MEASURED)]]
