"""`cost` as a user sees it: what was measured, what is predicted, in a file and on the terminal."""

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


def test_what_is_measured_and_what_is_predicted_is_said(cli: Cli, backbone: Path) -> None:
    outcome = cli("cost", "--backbone", backbone, "--gpu", "L4,h100", "--price", 1.5, *SMALL)
    assert (outcome.code, outcome.err) == (0, "")
    measured, l4, h100 = outcome.out.split("\nPREDICTED for one ")
    for words in (
        "Measured on cpu",
        "random weights",
        "Histories of 4 items, 20 items to choose from",
        "95 % intervals",
        "A training step of 2 users",
        "An answer to 2 users at once",
        "An answer to one user",
        "machine-hours",
        "money",
        "Peak memory (of the whole process)",
        "Energy: not measured",
        "PREDICTED by a roofline of this device",
    ):
        assert words in measured
    assert l4.startswith("L4 in float32; nothing was run there.")
    assert h100.startswith("H100-SXM in float32; nothing was run there.")
    for prediction in (l4, h100):
        assert "no measurement" in prediction
        assert "times what this method predicts" in prediction
        assert "GPU-hours" in prediction
        assert "Measured on" not in prediction
    assert max(map(len, outcome.out.splitlines())) <= 125


def test_all_numbers_go_into_a_file(cli: Cli, backbone: Path, tmp_path: Path) -> None:
    for name in ("costs.csv", "costs.json"):
        outcome = cli("cost", "--backbone", backbone, "--gpu", "L4", "--output", name, *SMALL)
        assert outcome.code == 0
    table = pd.read_csv(tmp_path / "costs.csv")
    content = json.loads((tmp_path / "costs.json").read_text())
    assert table["depth"].tolist() == [row["depth"] for row in content["rows"]] == [1, 2, 1, 2]
    assert table["predicted_on"].tolist()[2:] == ["L4", "L4"]
    assert table["answer_ms"].isna().tolist() == [False, False, True, True]
    assert "answer_ms" not in content["rows"][2]
    assert content["rows"][0]["serving_joules_per_user"] is None
    assert isinstance(content["rows"][0]["parameters"], int)
    assert len(content["seconds"]["answer:2"]) == content["rows"][0]["answer_ms_n"] >= 7


def test_where_nothing_is_measured_a_gpu_is_predicted(cli: Cli, backbone: Path) -> None:
    outcome = cli("cost", "--backbone", backbone, "--seconds", 0)
    assert "Nothing was measured on this machine: no time was given to it." in outcome.out
    assert "PREDICTED for one H100-SXM" in outcome.out
    assert "Measured" not in outcome.out
    assert "what this method predicts" not in outcome.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpu", "B52"], ["gpu", "'B52'", "H100-SXM"]),
        (["--gpu", "T4", "--dtype", "bfloat16", "--seconds", 0], ["dtype", "'bfloat16'", "T4"]),
        (["--price", "0"], ["price", "0", "above 0"]),
        (["--price", "cheap"], ["'cheap'", "number"]),
        (["--batch", "0"], ["batch", "0", "at least 1"]),
        (["--batch", "many"], ["'many'", "whole number"]),
        (["--items", "3"], ["items", "3", "at least 10"]),
        (["--dtype", "int4"], ["dtype", "'int4'", "bfloat16"]),
        (["--tuning", "some"], ["tuning", "'some'", "lora"]),
        (["--length", "65"], ["length", "65", "at most 64 positions"]),
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
