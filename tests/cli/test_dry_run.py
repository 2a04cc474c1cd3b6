"""`--dry-run` as a user sees it: the plan, what is there, a labelled estimate; nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprobe.formatting import duration
from depthprobe.runs import estimate

Cli = Callable[..., Any]


@pytest.fixture
def study(
    tmp_path: Path, llama_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """Flags of a study of forty users and a two-block backbone, measured for a moment."""
    from transformers import LlamaForCausalLM

    from depthprobe.models.embedded import embedded_tokenizer

    config = llama_config(num_hidden_layers=2, vocab_size=259)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    embedded_tokenizer().save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    lines = [f"u{u} " + " ".join(f"i{i}" for i in rng.permutation(30)[:9]) for u in range(40)]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(estimate, "SECONDS", 0.01)
    # one thread, as all tests have
    monkeypatch.setattr("depthprobe.runs.estimate.available_cores", lambda: 1)
    paths = ["--data", "log.txt", "--backbone", "model", "--output", "run", "--device", "cpu"]
    return [*paths, "--seeds", 1, "--epochs", 1, "--jobs", 0, "--layers", 1]


def contents(folder: Path) -> list[tuple[str, int, int]]:
    """Everything below a folder, with sizes and times."""
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return sorted((str(path), status.st_size, status.st_mtime_ns) for path, status in found)


def table(text: str, header: str) -> dict[str, list[str]]:
    """The rows of a table by their first words."""
    lines = text[text.index(header) :].splitlines()[2:]
    rows: dict[str, list[str]] = {}
    for line in lines:
        if not line.strip():
            break
        name, *values = re.split(r"  +", line.strip())
        rows[name] = values
    return rows


def plain(text: str) -> str:
    """The words without the line breaks."""
    return " ".join(text.split())


def test_a_search_is_told_to_take_less(cli: Cli, study: list[object]) -> None:
    outcome = cli("find", *study, "--seeds", 3, "--jobs", 2, "--dry-run")
    out = plain(outcome.out)
    assert "This is the most that a search may train." in out
    assert "at 70 % of the compute at the latest" in out
    assert "cpu, 1 job at a time" in out
    assert "--jobs does not make it faster" in outcome.err
    counts = table(outcome.out, "method")
    assert counts["readout"][0] == "1"
    assert counts["finetune"][0] == counts["full"][0] == "3"


def test_a_new_run(cli: Cli, study: list[object], tmp_path: Path) -> None:
    before = contents(tmp_path)
    outcome = cli("sweep", *study, "--dry-run")
    assert outcome.code == 0
    assert contents(tmp_path) == before
    out = plain(outcome.out)
    for words in (
        "nothing is written",
        "run (new)",
        ": 40 users, 30 items, 360 interactions",
        "model: llama, 2 blocks; all weights of the blocks trained",
        "cpu, 1 job at a time",
        "ESTIMATE of what is left",
        "at most",
        "however many jobs: sasrec-s0 > full-d02-s0 > ",
        "training all blocks, measured",
        "a measurement of some seconds just now",
        "early stopping or a cache may save some",
    ):
        assert words in out
    rows = table(outcome.out, " method")
    assert rows["skip"][:5] == ["1", "2", "0", "0", "2"]
    assert rows["all"][:5] == ["11", "15", "0", "0", "15"]
    assert "ESTIMATED work" in outcome.out
    shared = table(outcome.out, " shared between")
    assert {tuple(values) for values in shared.values()} == {("1", "0", "1")}
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_a_run_that_is_half_done(cli: Cli, study: list[object], tmp_path: Path) -> None:
    command = ["sweep", *study, "--methods", "popularity,sasrec,full"]
    assert cli(*command).code == 0
    path = tmp_path / "run" / "trials" / "full-d02-s0" / "record.json"
    written = path.read_bytes()
    failed = {"status": "failed", "error": "it", "digest": None}
    path.write_text(json.dumps(json.loads(written) | failed), encoding="utf-8")
    before = contents(tmp_path)

    command[-1] = "popularity,sasrec,full,skip,finetune"
    outcome = cli(*command, "--dry-run")
    out = plain(outcome.out)
    rows = table(outcome.out, " method")
    assert rows["sasrec"] == ["1", "1", "1", "0", "0", "-"]
    assert rows["full"] == ["1", "1", "0", "1", "0", "-"]
    assert rows["finetune"][:5] == ["1", "1", "0", "0", "1"]
    assert "run (goes on)" in out
    assert "1 failed before" in out
    assert "2 of those left need one that failed" in out
    assert "however many jobs: finetune-d01-s0" in out
    assert "the times of every depth that this run measured" in out
    assert "training all blocks, measured" in out
    shared = table(outcome.out, " shared between")
    assert shared["prepared data"] == shared["SASRec, one per seed"] == ["1", "1", "0"]
    assert shared["teacher, one per seed"] == ["1", "0", "1"]

    outcome = cli(*command, "--dry-run", "--retry-failed")
    assert table(outcome.out, " method")["full"][:5] == ["1", "1", "0", "1", "1"]
    assert "Failed trials run again" in outcome.out
    assert "full-d02-s0 > skip-s0" in plain(outcome.out)
    assert contents(tmp_path) == before

    path.write_bytes(written)
    command[-1] = "sasrec,full"
    assert "Nothing is left to do." in cli(*command, "--dry-run").out


def test_memory_that_is_not_there(
    cli: Cli, study: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1000)
    outcome = cli("distill", *study, "--dry-run")
    assert outcome.code == 0
    assert table(outcome.out, " method")["all"][5:] == ["-"]
    out = plain(outcome.out)
    assert "No ESTIMATE of time and memory: a training takes about 0.0 GB" in out


def test_jobs_of_a_cluster_have_machines_of_their_own(cli: Cli, study: list[object]) -> None:
    out = plain(cli("sweep", *study, "--jobs", 3, "--executor", "slurm", "--dry-run").out)
    assert "3 jobs of a cluster at a time, 1 thread each" in out
    assert "B a job at the peak" in out
    assert "each job is taken to have a machine like this one" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "3"], ["layers", "'3'", "from 1 to 2"]),
        (["--jobs", "-1"], ["jobs", "-1"]),
        (["--device", "gpu"], ["device", "'gpu'"]),
        (["--item-embeddings", "text"], ["--item-embeddings", "titles"]),
        (["--item-embeddings", "items.npy"], ["--item-embeddings", "rows"]),
        (["--methods", "skip,finetun"], ["methods", "'finetun'"]),
        (["--output", "model"], ["output", "'model'", "earlier run"]),
        (["--backbone", "bare"], ["backbone", "'bare'", "no weights"]),
    ],
)
def test_bad_input_is_the_line_of_a_sweep(
    cli: Cli, study: list[object], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    np.save(tmp_path / "items.npy", np.ones((3, 4), np.float32))
    (tmp_path / "bare").mkdir()
    text = (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    (tmp_path / "bare" / "config.json").write_text(text, encoding="utf-8")
    before = contents(tmp_path)
    outcome = cli("sweep", *study, *arguments, "--dry-run")
    assert (outcome.code, outcome.out) == (2, "")
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert contents(tmp_path) == before


def test_another_study_in_the_folder_is_refused(cli: Cli, study: list[object]) -> None:
    assert cli("sweep", *study, "--methods", "popularity").code == 0
    outcome = cli("sweep", *study, "--methods", "popularity", "--epochs", 2, "--dry-run")
    assert outcome.code == 2
    assert "the study it began with" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("name", ["sweep", "train", "probe", "distill"])
def test_every_phase_has_it(cli: Cli, name: str) -> None:
    assert "--dry-run" in cli(name, "--help").out


def test_durations() -> None:
    seconds = (0.2, 52.3, 100, 5000, 20000, 400000)
    told = ["<1 s", "52 s", "1.7 min", "83 min", "5.6 h", "4.6 days"]
    assert [duration(s) for s in seconds] == told


def test_what_cant_be_measured_leaves_the_plan(
    cli: Cli, study: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise RuntimeError("a kernel is missing\nand so on")

    monkeypatch.setattr("depthprobe.runs.estimate.measure", measure)
    outcome = cli("sweep", *study, "--dry-run")
    assert outcome.code == 0
    assert table(outcome.out, " method")["all"] == ["11", "15", "0", "0", "15", "-"]
    assert "No ESTIMATE of time and memory: a kernel is missing." in outcome.out
