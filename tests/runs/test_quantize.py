"""Variants of trained trials in fewer bits: planned, measured, exported, and the same again."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import evaluate
from depthprobe.models.embedded import embedded_tokenizer
from depthprobe.models.export import load_recommender
from depthprobe.models.own import own_facts
from depthprobe.models.quantize import load_parts
from depthprobe.models.recommender import is_quantized
from depthprobe.runs.context import Context
from depthprobe.runs.export import export_trial
from depthprobe.runs.plan import plan
from depthprobe.runs.records import TIMING
from depthprobe.runs.search import plan_search
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.runs.timing import covers, read_timing, timing_of
from depthprobe.study import Backbone, Cost, Study, Variant, settings_of

pytest.importorskip("torchao", reason="in the extra dev")
LEVERS = ("int8", "int8-dynamic", "int4", "int8-items")
TRAINED = ("full", "heal:greedy", "elastic")


def of(study: Study) -> dict[str, str]:
    """The variants that are planned, by the trial that each is made of."""
    trials = [trial for task in plan(study, 4) for trial in task.trials if trial.of]
    return {str(trial.of): trial.id for trial in trials}


def test_a_lever_makes_a_variant_of_every_trained_trial() -> None:
    methods = ("early-exit", "distill", "random-init", "int8")
    study = Study(layers="1,2", methods=methods, seeds=2)
    found = of(study)
    assert {*found} == {
        *(f"{kind}-s{seed}" for kind in ("full-d04", "distill-d01", "distill-d02") for seed in "01")
    }
    assert found["distill-d02-s1"] == "distill-d02-s1:int8"
    task = next(each for each in plan(study, 4) if each.id == "distill-d02-s1:int8")
    assert (task.method, task.seed, task.needs) == ("int8:distill", 1, ("distill-d02-s1",))
    (trial,) = task.trials
    assert (trial.method, trial.kept, trial.blocks) == ("int8:distill", (0, 1), 4)


def test_a_lever_on_one_method_brings_that_along_and_is_made_once() -> None:
    study = Study(
        layers="2",
        methods=("int4:distill:soft", "int4:full", "int8", "int8:full"),
        variants={"soft": Variant()},
        seeds=1,
    )
    tasks = [task.id for task in plan(study, 4)]
    assert len(tasks) == len({*tasks})
    assert "distill-soft-d02-s0" in tasks
    levers = [name for name in tasks if ":" in name]
    assert sorted(levers) == [
        "distill-soft-d02-s0:int4", "distill-soft-d02-s0:int8", "full-d04-s0:int4",
        "full-d04-s0:int8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (("int8:early-exit",), "methods: expected int8: and "),
        (("int8:random-init",), "methods: expected int8: and "),
        (("int8:distill:none",), "methods: expected distill: and "),
        (("int8:nothing",), "methods: expected "),
    ],
)
def test_a_lever_on_what_is_not_trained_is_refused(methods: tuple[str, ...], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Study(methods=methods)


def test_a_lever_alone_has_nothing_to_work_on() -> None:
    with pytest.raises(BadInput, match="full, or a method that trains shallower models, beside it"):
        plan(Study(methods=("int8", "popularity")), 4)


def test_quantised_backbones_are_not_quantised_again(study: Study) -> None:
    backbone = replace(study.backbone, quantize="4bit", tuning="lora")
    with pytest.raises(BadInput, match="without int8 beside it .the weights are quantised already"):
        replace(study, methods=("full", "int8"), device="auto", backbone=backbone)


def test_the_settings_are_those_of_the_trial_it_is_made_of() -> None:
    variants = {"soft": Variant(recipe=replace(Study().recipe, precision="bfloat16"))}
    study = Study(methods=("distill:soft", "int8"), variants=variants)
    assert settings_of(study, "int8:distill:soft").recipe.precision == "bfloat16"
    assert settings_of(study, "int8:distill:soft").method.name == "int8"


@pytest.fixture(scope="module")
def run_of(
    study: Study, llama_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """``run_of(width, methods, precision=..., **backbone)``: a run of one seed on three blocks."""

    def run(
        width: int,
        methods: tuple[str, ...],
        *,
        precision: Any = "auto",
        variants: dict[str, Variant] | None = None,
        **own: Any,
    ) -> Run:
        folder = tmp_path_factory.mktemp("levers")
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": 259}
        LlamaForCausalLM(llama_config(num_hidden_layers=3, **sizes)).save_pretrained(folder / "b")
        embedded_tokenizer().save_pretrained(folder / "b")
        made = replace(
            study,
            methods=methods,
            variants=variants or study.variants,
            layers="1",
            seeds=1,
            recipe=replace(study.recipe, epochs=1, precision=precision),
            backbone=replace(study.backbone, source=str(folder / "b"), **own),
            cost=Cost(batch_size=16, warmup=0, rounds=1),
        )
        return run_sweep(made, folder / "run", jobs=0)

    return run


@pytest.fixture(scope="module")
def run(run_of: Callable[..., Run]) -> Run:
    made = run_of(32, (*TRAINED, *LEVERS))
    assert not made.failed
    return made


def recorded(run: Run, trial: str) -> np.ndarray:
    users = run.users.query("protocol == 'full'")
    return users[users["trial"] == trial]["rank"].to_numpy()


def check_export(run: Run, trial: str, folder: Path) -> None:
    """What is read again ranks every test user as the trial did."""
    export_trial(run.path, trial, folder)
    context = Context(run.path, run.study)
    model: Any = load_recommender(folder).model
    ranks = evaluate(model, context.test, device=context.device)["full"]
    assert ranks.tolist() == recorded(run, trial).tolist()


@pytest.mark.parametrize("lever", LEVERS)
def test_the_exported_folder_reproduces_the_record(run: Run, lever: str, tmp_path: Path) -> None:
    for source in ("full-d03-s0", "heal-greedy-d01-s0", "elastic-d02-s0"):
        check_export(run, f"{source}:{lever}", tmp_path / source)
        text = (tmp_path / source / "README.md").read_text()
        assert f"Its weights are in fewer bits (method `{lever}`)" in text
        costs = run.record(f"{source}:{lever}").costs
        assert costs is not None
        parameters, held = costs.parameters["total"], costs.bytes["total"]
        assert f"| total | {parameters:,} | {held:,} |" in text


def test_records_say_what_they_are_made_of_and_what_they_weigh(run: Run) -> None:
    table = run.trials.set_index("trial")
    for source in ("full-d03-s0", "heal-greedy-d01-s0"):
        plain = table.loc[source]
        for lever in LEVERS:
            row = table.loc[f"{source}:{lever}"]
            method = f"{lever}:{plain['method']}"
            assert (row["of"], row["method"], row["kept"]) == (source, method, plain["kept"])
            assert row["parameters_total"] == plain["parameters_total"]
            parts = ["blocks", "item_table", "adapters", "token_embeddings"]
            changed = {part for part in parts if row[f"bytes_{part}"] != plain[f"bytes_{part}"]}
            rounded = {"item_table"} if lever == "int8-items" else {"blocks", "token_embeddings"}
            assert changed == rounded
            assert row["bytes_total"] < plain["bytes_total"]
            assert np.isnan(row["training_seconds"])
    assert (table["bytes_blocks"] == 4 * table["parameters_blocks"])[table["of"].isna()].all()


def test_what_is_added_to_a_run_is_timed_with_all_that_is_there(
    run_of: Callable[..., Run],
) -> None:
    made = run_of(16, ("full", "finetune"))
    study = replace(made.study, methods=("full", "finetune", "int8:finetune"))
    added = run_sweep(study, made.path, jobs=0)
    measured = read_timing(made.path / "shared" / TIMING)["seconds"]
    for name, key in (("finetune-d01-s0", "1"), ("finetune-d01-s0:int8", "int8:1")):
        costs = added.record(name).costs
        assert costs is not None
        assert costs.timing is not None
        assert costs.timing["encode"].seconds == measured[f"encode:{key}"]


def test_quantised_copies_are_timed_beside_the_plain_ones(run: Run) -> None:
    context = Context(run.path, run.study)
    measured = read_timing(context.shared / TIMING)
    rounds = len(measured["seconds"]["encode:1"])
    for lever in LEVERS:
        for kind in ("encode", "latency"):
            assert len(measured["seconds"][f"{kind}:{lever}:1"]) == rounds
    assert covers(measured, context, 3)
    without = {**measured, "seconds": dict(measured["seconds"])}
    del without["seconds"]["encode:int4:3"]
    assert not covers(without, context, 3)
    tasks = {task.id: task for task in plan(run.study, 3)}
    for lever, score in (("int8", "score"), ("int8-items", "score:int8-items")):
        (trial,) = tasks[f"elastic-d01-s0:{lever}"].trials
        timed = timing_of(trial, measured, run.study)
        assert timed is not None
        assert timed["latency"]["seconds"] == measured["seconds"][f"latency:{lever}:1"]
        assert timed["score"]["seconds"] == measured["seconds"][score]


def test_narrow_and_looped_blocks_in_fewer_bits(run_of: Callable[..., Run], tmp_path: Path) -> None:
    variants = {"narrow": Variant(width=0.5), "loop": Variant(loops=2)}
    methods = ("finetune:narrow", "finetune:loop", "int8", "int8-items")
    run = run_of(32, methods, variants=variants)
    assert not run.failed
    measured = read_timing(Context(run.path, run.study).shared / TIMING)
    for variant in variants:
        assert measured["seconds"][f"encode:int8:1:{variant}"]
        name = f"finetune-{variant}-d01-s0:int8"
        check_export(run, name, tmp_path / variant)
        costs = run.record(name).costs
        assert costs is not None
        assert costs.timing is not None
        assert costs.timing["encode"].seconds == measured["seconds"][f"encode:int8:1:{variant}"]


def test_no_onnx_of_few_bits(run: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="onnx: expected a trial whose weights are not quantised"):
        export_trial(run.path, "elastic-d01-s0:int8", tmp_path / "model", onnx=True)


def test_without_torchao_nothing_is_begun(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("depthprobe.models.precision.is_torchao_available", lambda: False)
    with pytest.raises(BadInput, match=r"methods: 'int8': torchao, .* 'depthprobe\[quantize\]'"):
        run_sweep(replace(study, methods=("full", "int8"), variants={}), tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


def test_a_search_asks_for_variants_of_what_is_trained_alone(run: Run, tmp_path: Path) -> None:
    study = replace(run.study, layers="find", methods=("finetune", "int8"), variants={})
    tasks = plan(study, 3)
    levers = [trial.id for task in tasks for trial in task.trials if trial.of]
    assert {"full-d03-s0:int8", "finetune-d01-s0:int8"} <= {*levers}

    def asked() -> list[str]:
        found = plan_search(tmp_path, study, tasks, 3).tasks
        return [task.id for task in found if task.trials and task.trials[0].of]

    assert asked() == []
    trial = "full-d03-s0"
    shutil.copytree(run.path / "trials" / trial, tmp_path / "trials" / trial)
    assert asked() == [f"{trial}:int8"]


def test_what_nothing_can_be_rounded_of_is_refused_before_it_is_trained(
    run_of: Callable[..., Run],
) -> None:
    with pytest.raises(BadInput, match="rows in 16s and columns in 32s .those of this llama"):
        run_of(24, ("full", "int4", "int8"))


SLOW = ({"dtype": "bfloat16"}, {"tuning": "lora", "lora_rank": 2})


@pytest.mark.parametrize(
    "more",
    [{"precision": "bfloat16"}, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_other_precisions_and_lora(
    run_of: Callable[..., Run], more: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(32, ("finetune", *(f"{lever}:finetune" for lever in LEVERS)), **more)
    assert not run.failed
    for lever in LEVERS:
        check_export(run, f"finetune-d01-s0:{lever}", tmp_path / lever)
    if "tuning" not in more:
        record = run.record("finetune-d01-s0:int8")
        assert record.costs is not None
        plain = run.record("finetune-d01-s0").costs
        assert plain is not None
        assert plain.bytes["blocks"] == 2 * plain.parameters["blocks"]
        assert record.costs.bytes["blocks"] < 0.7 * plain.bytes["blocks"]


def test_a_recommender_of_ones_own_in_fewer_bits(
    study: Study, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # where the examples can be imported
    sasrec: Any = importlib.import_module("examples.sasrec")
    (tmp_path / "sasrec").mkdir()
    items = [str(raw) for raw in Context(run.path, run.study).sequences.item_ids]
    sasrec.SASRec(items, width=16, blocks=2).save(tmp_path / "sasrec")
    monkeypatch.setenv("SASREC", str(tmp_path / "sasrec"))
    own_facts.cache_clear()
    source = "examples.sasrec:build"
    own = replace(
        study,
        methods=("full", "finetune", "int8", "int8-dynamic"),
        variants={},
        layers="1",
        seeds=1,
        backbone=Backbone(source=source),
    )
    with pytest.raises(BadInput, match="without int8-items beside it"):
        replace(own, methods=("full", "int8-items"))
    made = run_sweep(own, tmp_path / "run", jobs=0)
    assert not made.failed
    context = Context(made.path, made.study)
    for trial in [record.id for record in made.records if record.of]:
        export_trial(made.path, trial, tmp_path / trial)
        model: Any = load_recommender(tmp_path / trial, recommender=source).model
        ranks = evaluate(model, context.test, device=context.device)["full"]
        assert ranks.tolist() == recorded(made, trial).tolist()
        parts = load_parts(tmp_path / trial / "recommender.safetensors")
        assert any(map(is_quantized, parts.values()))
