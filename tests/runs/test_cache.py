"""Trainings that runs share: the same numbers as without a cache, and nothing trained twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from depthprobe.errors import BadInput
from depthprobe.runs.cache import RESULTS
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Distillation, Protocol, Recipe, Study
from depthprobe.training.checkpoint import tensors_digest

METHODS = ("sasrec", "full", "finetune", "distill", "elastic")


@pytest.fixture
def shared(study: Study, tmp_path: Path) -> Study:
    """Few methods, one seed, a cache."""
    return replace(study, methods=METHODS, layers="2", seeds=1, cache=str(tmp_path / "cache"))


def trainings(run: Run) -> dict[str, dict[str, Any]]:
    records = (run.path / "trials").glob("*/record.json")
    found = (json.loads(path.read_text()) for path in records)
    return {each["id"]: each["costs"]["training"] for each in found if each["costs"]["training"]}


def reused(run: Run) -> set[str]:
    return {name for name, each in trainings(run).items() if each["reused"]}


def test_a_second_run_trains_nothing_and_finds_the_same(shared: Study, tmp_path: Path) -> None:
    first = run_sweep(shared, tmp_path / "first", jobs=0)
    second = run_sweep(shared, tmp_path / "second", jobs=0)
    assert not reused(first)
    assert reused(second) == set(trainings(first))
    pd.testing.assert_frame_equal(first.users, second.users, check_exact=True)
    alone = run_sweep(replace(shared, cache=None), tmp_path / "alone", jobs=0)
    pd.testing.assert_frame_equal(alone.users, second.users, check_exact=True)
    for name, each in trainings(first).items():
        assert trainings(second)[name] | {"reused": False} == each  # seconds and losses too
    (kept,) = (first.path / "shared").glob("features-*")
    for file in kept.iterdir():
        assert (second.path / "shared" / kept.name / file.name).samefile(file)  # not a byte twice


@pytest.mark.slow
def test_other_settings_are_other_trainings(shared: Study, tmp_path: Path) -> None:
    first = run_sweep(shared, tmp_path / "first", jobs=0)
    every = set(trainings(first))
    students = {name for name in every if name.startswith("distill")}
    elastic = {name for name in every if name.startswith("elastic")}
    baseline = {name for name in every if name.startswith("sasrec")}
    longer = replace(shared.recipe, epochs=4)
    changes: dict[str, tuple[Study, set[str]]] = {
        # what reports and measurements are told changes no training
        "protocol": (replace(shared, protocol=Protocol(resamples=200, sampled=False)), every),
        "distillation": (replace(shared, distillation=Distillation(cosine=0.5)), every - students),
        "elastic": (replace(shared, elastic=replace(shared.elastic, weight=0.5)), every - elastic),
        "recipe": (replace(shared, recipe=longer), baseline),
        "prompt": (replace(shared, backbone=replace(shared.backbone, prompt="Now:")), baseline),
        "validation": (replace(shared, protocol=Protocol(validation_users=7)), set()),
        "sasrec": (replace(shared, sasrec=replace(shared.sasrec, dropout=0.3)), set()),
        "history": (replace(shared, data=replace(shared.data, max_history=4)), set()),
    }
    for name, (study, left) in changes.items():
        assert reused(run_sweep(study, tmp_path / name, jobs=0)) == left, name


def test_a_damaged_result_is_trained_anew(shared: Study, tmp_path: Path) -> None:
    study = replace(shared, methods=("sasrec",))
    first = run_sweep(study, tmp_path / "first", jobs=0)
    (file,) = (tmp_path / "cache" / RESULTS).iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    second = run_sweep(study, tmp_path / "second", jobs=0)
    assert not reused(second)
    pd.testing.assert_frame_equal(first.users, second.users, check_exact=True)
    assert reused(run_sweep(study, tmp_path / "third", jobs=0)) == {"sasrec-s0"}


def test_a_cache_that_is_no_folder_is_refused_before_anything_is_written(
    shared: Study, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(BadInput, match="cache"):
        run_sweep(shared, tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


def test_a_cache_decides_no_number(study: Study) -> None:
    assert replace(study, cache="somewhere").digest() == study.digest()


@pytest.mark.parametrize("change", ["value", "name", "type", "frozen"])
def test_the_digest_of_weights_sees_every_change(change: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    before, other = model(), model()
    assert tensors_digest(before.state_dict()) == tensors_digest(other.state_dict())
    with torch.no_grad():
        if change == "value":
            other[0].weight[1, 2] += 1e-7
        elif change == "name":
            other = nn.Sequential(other[0], nn.Identity(), other[1])
        elif change == "type":
            other = other.to(torch.bfloat16)
        else:
            other[1].running_mean += 1e-7
    assert tensors_digest(before.state_dict()) != tensors_digest(other.state_dict())


def test_recipes_of_equal_content_share(shared: Study, tmp_path: Path) -> None:
    study = replace(shared, methods=("sasrec",))
    run_sweep(study, tmp_path / "first", jobs=0)
    same = replace(study, name="other", recipe=Recipe(epochs=9), layers="1")
    assert reused(run_sweep(same, tmp_path / "second", jobs=0)) == {"sasrec-s0"}
