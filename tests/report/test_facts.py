"""What the report says of the split and of the cleaning is what the run recorded."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from depthprobe.report.answer import caveats
from depthprobe.report.numbers import Summary, summarise
from depthprobe.report.page import environment
from depthprobe.runs.records import Costs, TrainingCosts
from depthprobe.study import Recipe, override

Make = Callable[..., Any]

COUNTS = {
    "training_interactions": 12_345, "training_items": 1_990, "validation_users": 410,
    "test_users": 400, "cold_test_targets": 7,
}  # fmt: skip
POINTS = {
    "validation_begins": "2014-03-01", "test_begins": "2014-05-01", "cold_validation_users": 21,
    "cold_test_users": 34,
}  # fmt: skip
SPLITS = {
    "leave-one-out": (
        COUNTS,
        "leave-one-out, full",
        ["a user's last item", "400 in the test", " 7 of"],
    ),
    "temporal": (
        COUNTS | POINTS,
        "temporal split at 2014-03-01 and 2014-05-01, full",
        ["points in time", "on 2014-03-01, the test on 2014-05-01", "21 in validation", "34 in"],
    ),
    "given": (
        COUNTS | {"cold_test_users": 5},
        "given split, full",
        ["As the log came", "12,345 interactions of 1,990 items", "Cold users: 5 in the test"],
    ),
}


def summary_of(make: Make, folder: Path, name: str, **data: object) -> Summary:
    run = make(folder, methods=["full", "finetune"], seeds=1, users=60)
    run.study = override(run.study, **{"protocol.split": name})
    for key, value in data.items():
        setattr(run.manifest.data, key, value)
    return summarise(run)


def facts(name: str, *arguments: object) -> str:
    """What a macro of the page says, without its line breaks."""
    module: Any = environment().get_template("facts.html.j2").module
    return " ".join(unescape(getattr(module, name)(*arguments)).replace("\u00a0", " ").split())


def how_measured(summary: Summary) -> dict[str, str]:
    return dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", facts("measured", summary, False)))


LOSSES = typing.get_args(typing.get_type_hints(Recipe)["loss"])


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_a_study_has_words(make: Make, tmp_path: Path, loss: str) -> None:
    summary = summary_of(make, tmp_path, "leave-one-out")
    summary.run.study = override(summary.run.study, **{"recipe.loss": loss})
    said = how_measured(summary)["training"]
    assert ("random items" in said) == (loss != "full")


@pytest.mark.parametrize("split", SPLITS)
def test_the_split_is_the_run_s(make: Make, tmp_path: Path, split: str) -> None:
    counts, condition, words = SPLITS[split]
    summary = summary_of(make, tmp_path, split, split=counts)
    assert f"<span>{condition}" in facts("conditions", summary)
    said = how_measured(summary)["split"]
    for word in words:
        assert word in said
    assert ("last item" in said) == (split == "leave-one-out")


def test_learning_rates_that_were_tried_are_told(make: Make, tmp_path: Path) -> None:
    summary = summary_of(make, tmp_path, "leave-one-out")
    assert "learning rates" not in how_measured(summary)
    record = next(each for each in summary.run.records if each.method == "finetune")
    training = {"epochs": 1, "steps": 1, "seconds": 1.0, "learning_rate": 0.003}
    tried = {"0.003": 0.2, "0.1": None}
    record.depth, record.costs = 1, Costs(training=TrainingCosts(**training, tried=tried))
    said = how_measured(summarise(summary.run))["learning rates"]
    assert said.endswith("finetune at depth 1 0.003 (0.003 0.2000, 0.1 diverged)")


def test_cleaning_statistics_and_warnings(make: Make, tmp_path: Path) -> None:
    steps = [
        {"step": "as read", "interactions": 20_000, "users": 500, "items": 3_000},
        {"step": "5-core", "interactions": 15_000, "users": 412, "items": 2_000},
    ]
    data = {
        "cleaning": steps,
        "statistics": {"users": 412, "density": 0.0182, "first": "2012-01-01"},
        "warnings": ["no times: order is the file's", "34 users begin after the test does"],
    }
    summary = summary_of(make, tmp_path, "leave-one-out", **data)
    said = how_measured(summary)
    assert said["cleaning"] == (
        "as read: 500 users, 3,000 items, 20,000 interactions; "
        "5-core: 412 users, 2,000 items, 15,000 interactions"
    )
    assert "density 0.0182, first 2012-01-01" in said["data"]
    assert said["data"].count("users") == 1
    assert said["warnings"] == "; ".join(data["warnings"])
    shown = caveats(summary, None)
    assert {f"Data: {warning}." for warning in data["warnings"]} <= set(shown)
    unclean = summary_of(make, tmp_path, "leave-one-out", cleaning=steps[:1])
    assert how_measured(unclean)["cleaning"] == "none"


def test_trainings_from_the_cache_are_counted(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, methods=["full", "finetune"], seeds=1, users=60)
    assert "reused trainings" not in how_measured(summarise(run))
    for record in run.records:
        reused = record.method == "full"
        record.costs.training = TrainingCosts(epochs=1, steps=1, seconds=1.0, reused=reused)
    assert how_measured(summarise(run))["reused trainings"].startswith("1 trials")
