"""Plans: which trials, under which names, after what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.errors import BadInput
from depthprobe.methods import METHODS, Method, chosen_blocks, names
from depthprobe.runs.plan import plan, trial_of
from depthprobe.study import Probing, Study, Variant


def ids(study: Study, blocks: int) -> list[str]:
    return [task.id for task in plan(study, blocks)]


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_method_has_a_function_that_runs_it(method: Method) -> None:
    assert callable(method.runner())
    assert set(method.needs) <= set(METHODS)


def test_what_a_method_needs_is_planned_before_it() -> None:
    tasks = plan(Study(layers="1,2", methods=tuple(METHODS), seeds=2), 3)
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
    tasks = plan(Study(layers="1", methods=names("probe"), seeds=1), 4)
    trials = [trial for task in tasks for trial in task.trials]
    depths = {m: [t.depth for t in trials if t.method == m] for m in names("probe")}
    removed = {m: [t.removed for t in trials if t.method == m] for m in names("probe")}
    assert depths["early-exit"] == depths["early-exit-raw"] == depths["tuned-lens"] == [0, 1, 2, 3]
    assert depths["readout"] == [0, 1, 2, 3, 4]
    assert depths["greedy"] == depths["replace"] == [1, 2, 3]
    assert removed["skip"] == removed["drop-attention"] == removed["drop-mlp"]
    assert removed["skip"] == [(0,), (1,), (2,), (3,)]
    assert removed["span"] == [(0, 1), (1, 2), (2, 3), (0, 1, 2), (1, 2, 3)]
    assert removed["interval"] == [(1, 3), (2,), (3,)]
    assert depths["drop-mlp"] == [4] * 4  # the block stays
    assert not depths["similarity"] + depths["taylor"] + depths["settling"]
    assert not depths["prompt-only"]


@pytest.mark.parametrize("blocks", [1, 2, 3, 12])
def test_every_trial_has_a_name_of_its_own(blocks: int) -> None:
    tasks = plan(Study(layers="all", methods=tuple(METHODS), seeds=2), blocks)
    names = [trial.id for task in tasks for trial in task.trials]
    assert len(set(names)) == len(names)
    assert len({task.id for task in tasks}) == len(tasks)


@pytest.mark.parametrize("layers", ["0", "5", "two", "1-9"])
def test_depths_the_backbone_does_not_have(layers: str) -> None:
    with pytest.raises(BadInput, match="layers"):
        plan(replace(Study(), layers=layers), 4)


def test_names_say_what_is_left_out() -> None:
    assert trial_of("finetune", (0, 1), 0, 4).id == "finetune-d02-s0"
    assert trial_of("heal:ends", (0, 3), 0, 4).id == "heal-ends-d02-s0"
    # every block but the last is a truncation for one method and a skip for another
    assert trial_of("early-exit", (0, 1, 2), 0, 4).id == "early-exit-d03-s0"


def kept(method: str, layers: str = "1,3", blocks: int = 8, **settings: Any) -> list[Any]:
    tasks = plan(Study(layers=layers, methods=(method,), seeds=1, **settings), blocks)
    return [trial.kept for task in tasks for trial in task.trials if trial.method == method]


def test_a_variant_may_have_depths_of_its_own() -> None:
    one = {"one": Variant(layers="2")}
    assert kept("distill:one", variants=one) == [(0, 1)]
    assert kept("random-init:one", variants=one) == [(0, 1)]
    with pytest.raises(BadInput, match="layers"):
        kept("distill:one", variants={"one": Variant(layers="9")})


def test_selections_of_blocks() -> None:
    assert kept("finetune") == [(0, 1, 2), (0,)]
    assert kept("finetune:ends") == [(0, 1, 7), (0,)]
    assert kept("heal:interval") == [(0, 4, 7), (0,)]
    assert kept("distill:own", variants={"own": Variant(select="0,2,5-6")}) == [(0, 2, 5, 6)]
    # which ones they are is found out when they run
    for name in ("greedy", "angular", "influence"):
        assert kept(f"heal:{name}") == [(0, 1, 2), (0,)]


@given(st.integers(1, 40), st.data())
def test_a_selection_keeps_so_many_blocks_in_their_order(blocks: int, data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, blocks))
    for select in ("prefix", "ends", "interval", "random"):
        found = chosen_blocks(select, depth, blocks, seed=3)
        assert len(found) == depth
        assert list(found) == sorted(set(found))
        assert set(found) <= set(range(blocks))


def test_random_selections_differ_by_seed_alone() -> None:
    found = {chosen_blocks("random", 4, 12, seed=seed) for seed in range(8)}
    assert len(found) > 4
    assert chosen_blocks("random", 4, 12, seed=3) == chosen_blocks("random", 4, 12, seed=3)


@pytest.mark.parametrize("method", ["finetune:greedy", "heal:influence", "heal", "distill:ends"])
def test_what_asks_the_teacher_waits_for_it(method: str) -> None:
    tasks = plan(Study(layers="1", methods=(method,), seeds=1), 3)
    assert tasks[-1].needs == ("full-d03-s0",)


def test_elastic_is_one_task_with_every_depth() -> None:
    (task,) = plan(Study(layers="2", methods=("elastic",), seeds=1), 3)[1:]
    assert task.id == "elastic-s0"
    assert [trial.id for trial in task.trials] == [f"elastic-d0{d}-s0" for d in (1, 2, 3)]


def test_blocks_the_backbone_does_not_have() -> None:
    with pytest.raises(BadInput, match="blocks from 0 to 3"):
        kept("heal:own", blocks=4, variants={"own": Variant(select="0,4")})


def test_screened_spans_are_named_by_length_and_place() -> None:
    study = Study(layers="1", methods=("span",), seeds=1, probing=Probing(spans=2))
    spans = [trial for trial in plan(study, 4)[-1].trials]
    assert [trial.id for trial in spans] == [
        "span-d02-n1-s0",
        "span-d02-n2-s0",
        "span-d01-n1-s0",
        "span-d01-n2-s0",
    ]


def test_a_table_waits_for_what_the_study_has() -> None:
    def needs(*methods: str, item_table: str = "learned") -> tuple[str, ...]:
        tasks = plan(Study(methods=methods, item_table=item_table, seeds=2), 4)
        (own,) = [task.needs for task in tasks if task.method == "prompt-only"]  # of one seed
        return own

    assert needs("prompt-only") == needs("prompt-only", item_table="sasrec") == ()
    assert needs("prompt-only", "sasrec") == ("sasrec-s0",)
    assert needs("prompt-only", "skip") == ("full-d04-s0",)  # skip needs it
    (shuffled,) = plan(Study(methods=("shuffled",), item_table="learned", seeds=1), 4)[1:]
    assert shuffled.needs == ("full-d04-s0",)
