"""Bad input: one line with field, value and what is allowed; exit code 2; nothing written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYERS = "1,2,4 or 1-12 or all"

CASES = {
    "missing study": (
        ["sweep", "nowhere.toml"],
        ["STUDY.toml: expected", "'nowhere.toml'", "exists"],
    ),
    "missing data": (
        ["sweep", "--data", "nowhere.txt"],
        ["--data: expected an existing path, or one of embedded, ", ", got 'nowhere.txt'"],
    ),
    "missing backbone": (
        ["sweep", "--backbone", "./nowhere"],
        ["--backbone: expected a folder with config.json", "Hugging Face id", "got './nowhere'"],
    ),
    "backbone without config": (["sweep", "--backbone", "full"], ["backbone", "config.json"]),
    "depth 0": (["sweep", "--layers", "0"], ["--layers: expected", LAYERS, ", got '0'"]),
    "depth in words": (["sweep", "--layers", "two"], ["layers", "'two'", LAYERS]),
    "descending depths": (["sweep", "--layers", "4-2"], ["layers", "'4-2'", LAYERS]),
    "no depth": (["sweep", "--layers", ""], ["layers", "''", LAYERS]),
    "unknown method": (["sweep", "--methods", "fintune"], ["methods", "'fintune'", "finetune"]),
    "no method": (["sweep", "--methods", ","], ["methods", "at least one"]),
    "method twice": (["sweep", "--methods", "full,full"], ["methods", "once"]),
    "another phase's method": (
        ["probe", "--methods", "skip,finetune"],
        ["methods", "skip,finetune", "early-exit"],
    ),
    "zero seeds": (["sweep", "--seeds", "0"], ["seeds", "0", "at least 1"]),
    "seeds in words": (
        ["sweep", "--seeds", "two"],
        ["--seeds: expected a whole number, got 'two'"],
    ),
    "zero epochs": (["sweep", "--epochs", "0"], ["epochs", "0", "at least 1"]),
    "half an epoch": (["sweep", "--epochs", "0.5"], ["--epochs", "'0.5'", "whole number"]),
    "unknown device": (["sweep", "--device", "gpu"], ["device", "'gpu'", "auto, cpu, cuda, mps"]),
    "unknown tuning": (["sweep", "--tuning", "qlora"], ["tuning", "'qlora'", "full, lora, frozen"]),
    "unknown item table": (
        ["sweep", "--item-embeddings", "titles"],
        ["--item-embeddings", "'titles'", "sasrec, learned, a .npy file, text, or text:K"],
    ),
    "missing item table": (
        ["sweep", "--item-embeddings", "nowhere.npy"],
        ["--item-embeddings", "'nowhere.npy'", "a .npy file"],
    ),
    "unknown executor": (["sweep", "--executor", "ray"], ["executor", "'ray'", "local"]),
    "negative jobs": (["sweep", "--jobs", "-1"], ["jobs", "-1", "at least 0"]),
    "output is not a run": (["sweep", "--output", "full"], ["output", "'full'", "earlier run"]),
    "output is a file": (["sweep", "--output", "full/notes.txt"], ["output", "a folder"]),
    "output below a file": (["sweep", "--output", "full/notes.txt/run"], ["output", "a folder"]),
    "unknown option": (["sweep", "--laers", "3"], ["--laers", "--layers"]),
    "another tool's option": (
        ["sweep", "--model", "x"],
        ["No such option: --model; use --backbone"],
    ),
    "another tool's setting": (["sweep", "--lr", "1"], ["--lr; use --set recipe.learning_rate=X"]),
    "an option of data": (["sweep", "--core", "5"], ["--core; use --set data.cleaning.core=VALUE"]),
    "one that this command has": (["cost", "--batch-size", "1"], ["--batch-size; use --batch\n"]),
    "one that this command has not": (["status", "--model", "x"], ["--model; see depthprobe"]),
    "a log for a study": (["sweep", "full/notes.txt"], ["STUDY.toml: ", "a log needs --data"]),
    "no run": (["status"], ["RUN: required. A folder that sweep wrote."]),
    "option without value": (["sweep", "--layers"], ["--layers", "requires an argument"]),
    "second study": (["sweep", "a.toml", "b.toml"], ["b.toml"]),
    "unknown command": (["swep"], ["'swep'; did you mean sweep?"]),
    "unknown data command": (["data", "shw"], ["'shw'; did you mean show?"]),
    "no data command": (["data"], ["prepare, show, list"]),
    "report of nothing": (["report", "nowhere"], ["RUN: expected", "'nowhere'", "manifest.json"]),
    "report of another folder": (["report", "full"], ["RUN: expected", "'full'", "manifest.json"]),
    "margin in words": (["report", "full", "--margin", "2x"], ["--margin", "'2x'", "2% or 0.02"]),
    "no metric": (["report", "full", "--metric", "AUC"], ["metric", "'AUC'", "NDCG@K"]),
    "cost of nothing": (["cost"], ["--backbone: required. A folder (config.json is enough)"]),
    "cost of bad depths": (["cost", "--backbone", "embedded", "--layers", "x"], ["layers", "'x'"]),
    "cost on bad device": (["cost", "--backbone", "embedded", "--device", "x"], ["device", "'x'"]),
    "status of another folder": (["status", "full"], ["RUN: expected", "'full'", "manifest.json"]),
    "export of nothing": (["export", "full", "trial", "out"], ["RUN", "'full'"]),
    "export of no trial": (["export", "begun", "ful-s0", "out"], ["TRIAL", "'ful-s0'", "full-s0"]),
    "export that may lose all": (
        ["export", "full", "trial", "out", "--exit", "1"],
        ["--exit: expected a share from 0 to below 1", "got 1.0"],
    ),
    "recommend from nothing": (
        ["recommend", "nowhere", "--history", "h"],
        ["DIR: expected", "'nowhere'", "recommender.json"],
    ),
    "recommend into a folder": (
        ["recommend", "full", "--history", "h", "--output", "begun"],
        ["output", "'begun'", "a file"],
    ),
    "recommend below a file": (
        ["recommend", "full", "--history", "h", "--output", "full/notes.txt/out.tsv"],
        ["output", "a folder"],
    ),
    "recommend from another folder": (
        ["recommend", "full", "--history", "h"],
        ["DIR: expected", "'full'", "recommender.json"],
    ),
    "revision of the embedded": (
        ["sweep", "--revision", "v1"],
        ["revision", "'v1'", "Hugging Face id"],
    ),
    "revision of a folder": (
        ["sweep", "--backbone", "model", "--revision", "v1"],
        ["revision", "'v1'", "Hugging Face id"],
    ),
    "no revision": (
        ["sweep", "--backbone", "org/model", "--revision", ""],
        ["revision", "''", "branch, tag or commit"],
    ),
    "show missing data": (
        ["data", "show", "nowhere"],
        ["D: expected an existing path", "'nowhere'"],
    ),
    "check of nothing": (["check"], ["backbone", "--all"]),
    "check of one and all": (["check", "--all", "--backbone", "embedded"], ["'embedded'", "--all"]),
    "check page is a folder": (
        ["check", "--all", "--output", "full"],
        ["output", "'full'", "file"],
    ),
    "check trusts a branch": (
        ["check", "--backbone", "a/b", "--trust-remote-code"],
        ["revision", "commit or tag"],
    ),
    "check missing backbone": (["check", "--backbone", "a/b/c"], ["backbone", "'a/b/c'"]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A full folder that is no run, one that begins to be, and a model's."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine\n", encoding="utf-8")
    (tmp_path / "begun" / "trials" / "full-s0").mkdir(parents=True)
    (tmp_path / "begun" / "study.toml").write_text("", encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def contents(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES)
def test_one_line_exit_code_2_and_nothing_written(
    cli: Callable[..., Any], folder: Path, case: str
) -> None:
    arguments, words = CASES[case]
    before = contents(folder)
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert contents(folder) == before


def test_a_depth_beyond_the_backbone(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli("sweep", "--layers", "13", "--output", "run")
    assert outcome.code == 2
    assert outcome.err.startswith("error: --layers: expected depths from 1 to 12, ")
    assert "from 1 to 12" in outcome.err
    assert outcome.err.count("\n") == 1
    assert contents(tmp_path) == []


def test_debug_adds_the_traceback_and_keeps_the_line(cli: Callable[..., Any]) -> None:
    outcome = cli("sweep", "--layers", "0", "--debug")
    first, *_, last = outcome.err.splitlines()
    assert outcome.code == 2
    assert first == "Traceback (most recent call last):"
    assert last.startswith("error: --layers: expected depths")


def test_bad_input_is_found_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import atexit, sys; from depthprobe.cli import main;"
        "atexit.register(lambda: print(*sorted({'torch', 'pandas', 'numpy'} & set(sys.modules))));"
        "main(['sweep', '--backbone', 'org/model', '--layers', '3-1'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stdout.split() == []
    assert done.stderr.count("\n") == 1
