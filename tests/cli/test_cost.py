"""`cost` as a user sees it: what was counted and measured, on the terminal and in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

Cli = Callable[..., Any]
SMALL = ("--length", 4, "--items", 20, "--batch", 2, "--seconds", 0.01, "--device", "cpu")


@pytest.fixture
def backbone(tmp_path: Path, llama_config: Callable[..., Any]) -> Path:
    llama_config(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_measured_is_said(cli: Cli, backbone: Path) -> None:
    outcome = cli("cost", "--backbone", backbone, "--price", 1.5, *SMALL)
    assert outcome.code == 0
    assert "timing 7 actions" in outcome.err
    for words in (
        "Measured on cpu",
        "random weights",
        "Histories of 4 items, 20 items to choose from",
        "95 % intervals",
        "A training step of 2 users",
        "One user, from history to the best items",
        "2 users at once; machine-hours of a billion requests",
        "money",
        "Peak memory (of the process)",
    ):
        assert words in outcome.out
    assert "PREDICTED" not in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_all_numbers_go_into_a_file(cli: Cli, backbone: Path, tmp_path: Path) -> None:
    for name in ("costs.csv", "costs.json"):
        assert cli("cost", "--backbone", backbone, "--output", name, *SMALL).code == 0
    table = pd.read_csv(tmp_path / "costs.csv")
    content = json.loads((tmp_path / "costs.json").read_text())
    assert table["depth"].tolist() == [row["depth"] for row in content["rows"]] == [1, 2]
    assert (table[["latency_ms", "flops_user", "training_rss_bytes"]] > 0).all(axis=None)
    assert content["rows"][0]["money_per_billion"] is None
    assert isinstance(content["rows"][0]["parameters"], int)
    assert len(content["seconds"]["train:2"]) == content["rows"][0]["train_step_ms_n"]


def test_json_is_that_of_the_file(cli: Cli, backbone: Path, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    words = ("cost", "--backbone", backbone, "--seconds", "0", "--layers", "1")
    outcome = cli(*words, "--json", "--output", file)
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == json.loads(file.read_text("utf-8"))
    content = json.loads(outcome.out)
    assert content["schema"] == 1
    assert content["rows"][0]["depth"] == 1
    assert content["rows"][0]["latency_ms"] is None  # nothing was measured


def test_nothing_is_made_up_where_nothing_is_measured(cli: Cli, backbone: Path) -> None:
    outcome = cli("cost", "--backbone", backbone, "--seconds", 0)
    assert "Nothing was measured on this machine: no time was given to it." in outcome.out
    assert "FLOPs a user" in outcome.out
    assert " ms" not in outcome.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--price", "0"], ["price", "0", "above 0"]),
        (["--price", "cheap"], ["'cheap'", "number"]),
        (["--batch", "0"], ["batch", "0", "at least 1"]),
        (["--batch", "many"], ["'many'", "whole number"]),
        (["--items", "3"], ["items", "3", "at least 10"]),
        (["--dtype", "int4"], ["dtype", "'int4'", "bfloat16"]),
        (["--tuning", "some"], ["tuning", "'some'", "lora"]),
        (["--output", "costs.txt"], ["output", "'costs.txt'", ".csv or .json"]),
        (["--revision", "v1"], ["revision", "'v1'"]),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, backbone: Path, arguments: list[object], named: list[str]
) -> None:
    outcome = cli("cost", "--backbone", backbone, *arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    for word in named:
        assert word in outcome.err
