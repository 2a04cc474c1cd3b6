"""Shallower models that are trained: which blocks, from where, for how long, after whom."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from depthprobe.cost.flops import flops_per_user
from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import evaluate
from depthprobe.models.cutting import keep_blocks
from depthprobe.probing.walk import nearest_spans
from depthprobe.runs.context import Context
from depthprobe.runs.plan import full_trial, trial_of
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.runs.training import FEATURES, budgeted, teacher_for
from depthprobe.study import Distillation, Heal, Study, Variant

CPU = torch.device("cpu")


def trial(run: Run, name: str) -> pd.Series:
    return run.trials.set_index("trial").loc[name]


@pytest.fixture
def context(small_run: Run) -> Context:
    return Context(small_run.path, small_run.study)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_elastic_at_a_depth_is_it_cut_there(small_run: Run, context: Context, depth: int) -> None:
    model = context.trained(full_trial("elastic", 1, 3))
    keep_blocks(model.backbone, range(depth))
    ranks = evaluate(model, context.test, device=CPU)["full"]
    users = small_run.users
    own = users[(users["trial"] == f"elastic-d0{depth}-s1") & (users["protocol"] == "full")]
    np.testing.assert_array_equal(ranks, own["rank"])


def test_blocks_are_those_that_the_probes_found(small_run: Run) -> None:
    for seed in (0, 1):
        for depth in (1, 2):
            chosen = trial(small_run, f"heal-greedy-d0{depth}-s{seed}")["kept"]
            assert chosen == trial(small_run, f"greedy-d0{depth}-s{seed}")["kept"]
        table = small_run.scores("similarity")
        table = table[(table["seed"] == seed) & (table["score"] == "angular-distance")]
        angular = np.zeros((4, 4))
        angular[table["start"], table["end"]] = table["value"]
        (start, end), *_ = nearest_spans(angular, 2)
        kept = [block for block in range(3) if not start <= block < end]
        assert trial(small_run, f"finetune-angular-d01-s{seed}")["kept"] == str(kept[0])
    assert trial(small_run, "distill-top-d01-s0")["kept"] == "1"


def test_a_cut_teacher_is_trained_for_a_part_of_the_epochs(small_run: Run) -> None:
    assert small_run.study.heal == Heal(share=0.5)
    assert trial(small_run, "heal-d02-s0")["training_epochs"] <= 2  # of 3
    assert small_run.trials["training_epochs"].max() == 3


def test_the_teachers_time_is_told_apart(small_run: Run) -> None:
    teacher = trial(small_run, "full-d03-s0")["training_seconds"]
    spent = trial(small_run, "distill-d02-s0")
    # what it says was computed too, once for all students
    assert spent["training_teacher_seconds"] > teacher
    assert trial(small_run, "distill-top-d01-s0")["training_teacher_seconds"] == pytest.approx(
        teacher, abs=1e-3
    )
    assert trial(small_run, "finetune-d02-s0")["training_teacher_seconds"] == 0


@pytest.mark.parametrize("method", ["finetune", "heal", "distill", "random-init", "heal:greedy"])
def test_flops_are_those_of_the_trials_own_model(
    method: str, small_run: Run, context: Context
) -> None:
    length = int(np.median([len(history) for history in context.test.histories]))
    own = small_run.trials.query("method == @method and depth < 3")
    for _, row in own.iterrows():
        kept = tuple(small_run.record(row["trial"]).kept)
        model = context.trained(trial_of(method, kept, row["seed"], 3))
        assert row["flops_user"] == flops_per_user(model, length)
    assert own["flops_user"].nunique() == 2


def test_features_are_made_once_a_seed_and_belong_to_one_teacher(
    small_run: Run, tmp_path: Path
) -> None:
    folders = sorted(small_run.path.glob(f"shared/{FEATURES}-*"))
    assert [folder.name.rsplit("-", 2)[0] for folder in folders] == [
        f"{FEATURES}-s{seed}-every" for seed in (0, 1)
    ]
    copy = shutil.copytree(small_run.path, tmp_path / "copy")
    shutil.copytree(copy / "trials/full-d03-s1", copy / "trials/full-d03-s0", dirs_exist_ok=True)
    record = copy / "trials/full-d03-s0/record.json"
    other = json.loads(record.read_text()) | {"id": "full-d03-s0", "digest": None}
    record.write_text(json.dumps(other))
    student = trial_of("distill", (0, 1), 0, 3)
    teacher_for(Context(copy, small_run.study), student)
    (after,) = copy.glob(f"shared/{FEATURES}-s0-*")
    assert after.name != folders[0].name  # of another teacher: made anew, the old ones deleted


def test_equal_compute_buys_shallow_models_more_epochs(small_run: Run) -> None:
    context = Context(small_run.path, replace(small_run.study, budget="compute"))
    read = Counter(len(window) - 1 for window in context.windows)  # windows by their items

    def epoch(depth: int, models: float = 1.0) -> float:
        """Forward and backward over each window, and the catalogue at each of its positions."""
        model = context.new_recommender(trial_of("finetune", tuple(range(depth)), 0, 3))
        scores = 2 * context.sequences.n_items * model.item_matrix().shape[1]
        users = [many * (flops_per_user(model, items) - scores) for items, many in read.items()]
        positions = sum(many * items for items, many in read.items())
        return 3.0 * (sum(users) + models * scores * positions)

    def epochs(method: str, depth: int) -> int:
        made = trial_of(method, tuple(range(depth)), 0, 3)
        return budgeted(context, made, context.new_recommender(made)).epochs

    assert epochs("full", 3) == 3
    for depth in (1, 2):
        assert epochs("finetune", depth) == round(3 * epoch(3) / epoch(depth))
        assert epochs("heal", depth) == round(2 * epoch(3) / epoch(depth))
    assert epochs("finetune", 1) > 3
    # depths 1, 2 and 3 in one training, each step of which scores twice
    assert epochs("elastic", 3) == round(3 * 3 * epoch(3) / epoch(3, models=2))
    same, shallow = Context(small_run.path, small_run.study), trial_of("finetune", (0,), 0, 3)
    assert budgeted(same, shallow, same.new_recommender(shallow)).epochs == 3


def test_a_variant_can_be_added_to_a_run_and_none_changed(study: Study, tmp_path: Path) -> None:
    begun = replace(study, layers="1", methods=("finetune",), seeds=1, variants={})
    run_sweep(begun, tmp_path / "run", jobs=0)
    squared = Variant(distillation=Distillation(norm_form="squared"))
    more = replace(begun, methods=("distill:squared",), variants={"squared": squared})
    run = run_sweep(more, tmp_path / "run", jobs=0)
    assert {"finetune", "full", "distill:squared"} <= set(run.trials["method"])
    other = Variant(distillation=Distillation(norm=0.5))
    with pytest.raises(BadInput, match="variants.squared.distillation.norm"):
        run_sweep(replace(more, variants={"squared": other}), tmp_path / "run", jobs=0)
