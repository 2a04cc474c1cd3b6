"""Plans: which trials, under which names, after what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from depthprobe.study import METHODS, PROBES, BadInput, Study
from depthprobe.sweep.methods import METHODS as FUNCTIONS
from depthprobe.sweep.plan import NEEDS, Trial, plan


def ids(study: Study, blocks: int) -> list[str]:
    return [task.id for task in plan(study, blocks)]


def test_every_method_has_a_function_and_a_place_in_the_plan() -> None:
    assert set(METHODS) == set(FUNCTIONS) == set(NEEDS)


def test_what_a_method_needs_is_planned_before_it() -> None:
    tasks = plan(Study(layers="1,2", methods=METHODS, seeds=2), 3)
    known: set[str] = set()
    for task in tasks:
        assert set(task.needs) <= known
        known |= {trial.id for trial in task.trials}
    assert len(known) == sum(len(task.trials) for task in tasks)


def test_needs_are_added() -> None:
    assert ids(Study(layers="2", methods=("distill",), seeds=1), 4) == [
        "sasrec-s0",
        "full-d04-s0",
        "distill-d02-s0",
    ]


@pytest.mark.parametrize("item_table", ["text", "vectors.npy"])
def test_a_table_from_elsewhere_needs_no_sasrec(item_table: str) -> None:
    study = Study(layers="2", methods=("distill",), seeds=1, item_table=item_table)
    full, distill = plan(study, 4)
    assert (full.id, full.needs) == ("full-d04-s0", ())
    assert (distill.id, distill.needs) == ("distill-d02-s0", ("full-d04-s0",))
    assert "sasrec-s0" in ids(replace(study, methods=("distill", "sasrec")), 4)


def test_full_depth_is_the_teacher_and_not_a_variant() -> None:
    study = Study(layers="all", methods=("finetune", "random-init"), seeds=1)
    found = ids(study, 3)
    assert "finetune-d03-s0" not in found
    assert "random-init-d03-s0" in found


def test_probes_cover_every_depth_and_every_block_whatever_layers_says() -> None:
    tasks = plan(Study(layers="1", methods=PROBES, seeds=1), 4)
    trials = [trial for task in tasks for trial in task.trials]
    depths = {m: [t.depth for t in trials if t.method == m] for m in PROBES}
    removed = {m: [t.removed for t in trials if t.method == m] for m in PROBES}
    assert depths["early-exit"] == depths["early-exit-raw"] == depths["tuned-lens"] == [0, 1, 2, 3]
    assert depths["readout"] == [0, 1, 2, 3, 4]
    assert depths["greedy"] == depths["replace"] == [1, 2, 3]
    assert removed["skip"] == removed["drop-attention"] == removed["drop-mlp"]
    assert removed["skip"] == [(0,), (1,), (2,), (3,)]
    assert removed["span"] == [(0, 1), (1, 2), (2, 3), (0, 1, 2), (1, 2, 3)]
    assert removed["interval"] == [(1, 3), (2,), (3,)]
    assert depths["drop-mlp"] == [4] * 4  # the block stays
    assert not depths["similarity"] + depths["taylor"] + depths["settling"]


@pytest.mark.parametrize("blocks", [1, 2, 3, 12])
def test_every_trial_has_a_name_of_its_own(blocks: int) -> None:
    tasks = plan(Study(layers="all", methods=METHODS, seeds=2), blocks)
    names = [trial.id for task in tasks for trial in task.trials]
    assert len(set(names)) == len(names)
    assert len({task.id for task in tasks}) == len(tasks)


@pytest.mark.parametrize("layers", ["0", "5", "two", "1-9"])
def test_depths_the_backbone_does_not_have(layers: str) -> None:
    with pytest.raises(BadInput, match="layers"):
        plan(replace(Study(), layers=layers), 4)


def test_names_tell_kept_sets_apart() -> None:
    kept = [(0, 1, 2), (0, 1), (0, 2), (1, 2), (1,), (2,)]
    names = {Trial("finetune", k, 0, 4).id for k in kept}
    assert len(names) == len(kept)
    assert Trial("finetune", (0, 1), 0, 4).id == "finetune-d02-s0"
    # every block but the last is a truncation for one method and a skip for another
    assert Trial("skip", (0, 1, 2), 0, 4).id == "skip-b03-s0"
    assert Trial("early-exit", (0, 1, 2), 0, 4).id == "early-exit-d03-s0"
