"""Narrower and looped blocks, and gradual cuts: trained, recorded, read again, exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import depthprobe as dp
from depthprobe.cost.flops import flops_per_user
from depthprobe.cost.size import count_parameters
from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import evaluate
from depthprobe.methods import Sizes, Trial
from depthprobe.models.blocks import find_blocks
from depthprobe.models.build import Shape, reshape
from depthprobe.probing.units import unit_scores
from depthprobe.report.numbers import summarise
from depthprobe.runs import training
from depthprobe.runs.cache import result_file
from depthprobe.runs.context import Context
from depthprobe.runs.estimate import Units, jobs_of
from depthprobe.runs.export import export_trial
from depthprobe.runs.plan import full_trial, plan
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.runs.timing import read_timing
from depthprobe.study import Backbone, Heal, Study, Variant, settings_of
from depthprobe.training.checkpoint import Checkpoint
from depthprobe.training.objectives import NextItem

CPU = torch.device("cpu")
METHODS = (
    *("full", "finetune", "heal:narrow", "finetune:narrow", "random-init:narrow"),
    *("distill:twice", "finetune:twice", "heal:taylor", "heal:gradual", "heal:angular-steps"),
)
VARIANTS = {
    "narrow": Variant(width=0.5, layers="1,3"),
    "taylor": Variant(width=0.5, importance="taylor", layers="2"),
    "twice": Variant(loops=2, layers="2"),
    "gradual": Variant(at_once=0.34, layers="1"),
    "angular-steps": Variant(at_once=0.5, select="angular", layers="1"),
}


@pytest.fixture(scope="module")
def shaped(study: Study) -> Study:
    return replace(
        study, methods=METHODS, variants=VARIANTS, seeds=1, layers="1,2", heal=Heal(share=1.0)
    )


@pytest.fixture(scope="module")
def run(shaped: Study, tmp_path_factory: pytest.TempPathFactory) -> Run:
    done = run_sweep(shaped, tmp_path_factory.mktemp("runs") / "shapes", jobs=0)
    assert not done.failed
    return done


@pytest.fixture(scope="module")
def context(run: Run) -> Context:
    return Context(run.path, run.study.with_precision("float32"))


def trial_in(run: Run, name: str) -> Trial:
    return next(t for task in plan(run.study, 3) for t in task.trials if t.id == name)


def ranks_in(run: Run, name: str) -> np.ndarray:
    users = run.users
    return users[(users["trial"] == name) & (users["protocol"] == "full")]["rank"].to_numpy()


SHAPES = {  # intermediate size, heads, blocks
    "heal-narrow-d01-s0": (12, 1, 1),
    "finetune-narrow-d03-s0": (12, 1, 3),  # as many blocks as the teacher
    "random-init-narrow-d01-s0": (12, 1, 1),
    "heal-taylor-d02-s0": (12, 1, 2),
    "finetune-twice-d02-s0": (24, 2, 4),  # more than the backbone has
    "distill-twice-d02-s0": (24, 2, 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_trained_trial_is_read_again_from_its_weights_alone(
    run: Run, context: Context, name: str
) -> None:
    model, record = context.trained(trial_in(run, name)), run.record(name)
    config = model.backbone.config
    shape = config.intermediate_size, config.num_attention_heads, config.num_hidden_layers
    assert shape == SHAPES[name]
    assert record.depth == int(name.split("-d")[1][:2])
    assert record.costs.parameters == count_parameters(model)
    ranks = evaluate(model, context.test, device=CPU)["full"]
    np.testing.assert_array_equal(ranks, ranks_in(run, name))
    length = int(np.median(model.positions(context.test.histories)))
    assert record.costs.flops_user == flops_per_user(model, length)


@pytest.mark.parametrize("name", SHAPES)
def test_an_export_is_an_ordinary_checkpoint(run: Run, tmp_path: Path, name: str) -> None:
    folder = export_trial(run.path, name, tmp_path / "model")
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    config = model.config
    shape = config.intermediate_size, config.num_attention_heads, config.num_hidden_layers
    assert shape == SHAPES[name]
    context = Context(run.path, run.study)
    loaded = dp.load_recommender(folder)
    ranks = evaluate(loaded.model, context.test, device=CPU)["full"]
    np.testing.assert_array_equal(ranks, ranks_in(run, name))
    card = (folder / "README.md").read_text()
    assert ("50 % of the backbone's MLP channels" in card) == (SHAPES[name][0] == 12)
    assert ("as 4 blocks with equal weights" in card) == ("twice" in name)
    if "twice" in name:
        first, third = model.model.layers[0], model.model.layers[2]
        for one, other in zip(first.parameters(), third.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one is not other


def test_looped_weights_count_once_and_work_twice(run: Run, context: Context) -> None:
    once, twice = (run.record(f"finetune{v}-d02-s0").costs for v in ("", "-twice"))
    assert twice.parameters == once.parameters
    trial = trial_in(run, "finetune-twice-d02-s0")
    products = next(iter(context.known_products(trial).values()), None)
    assert twice.flops_user > 1.4 * once.flops_user
    assert products is None or len(products.blocks) == 4
    deep, shallow = run.record("finetune-d02-s0"), run.record("finetune-twice-d02-s0")
    assert shallow.costs.training.flops > 1.4 * deep.costs.training.flops


def test_shapes_have_times_of_their_own(run: Run) -> None:
    names = read_timing(run.path / "shared" / "timing.json")["seconds"]
    for shape in ("1:narrow", "3:narrow", "2:taylor", "2:twice"):
        assert {f"encode:{shape}", f"latency:{shape}", f"train:{shape}"} <= names.keys()
    assert "encode:1:gradual" not in names
    own, plain = (run.record(f"finetune{v}-d02-s0").costs.timing for v in ("-twice", ""))
    assert own["encode"].seconds == names["encode:2:twice"] != plain["encode"].seconds
    distilled = run.record("distill-twice-d02-s0").costs.timing
    assert distilled["train_step"].seconds == names["distill:twice:2"]


@pytest.mark.parametrize("name", ["heal-narrow-d01-s0", "finetune-narrow-d03-s0"])
def test_a_training_begins_with_the_best_units(run: Run, context: Context, name: str) -> None:
    trial = trial_in(run, name)
    settings = settings_of(run.study, trial.method)
    healed = trial.method.startswith("heal")
    begun = training._begin(context, trial, from_teacher=healed)
    teacher = context.trained(full_trial("full", 0, 3))
    plan_ = training.plan_narrowing(teacher.backbone, 0.5)
    scores = unit_scores(teacher, plan_, context.training, by="activation", device=CPU)
    source = teacher if healed else context.new_recommender(full_trial("full", 0, 3))
    assert settings.width == 0.5
    assert settings.needs_teacher
    for index in trial.kept:
        best = scores["channels"][index].argsort(descending=True)[:12].sort().values
        own = find_blocks(begun.backbone)[index].mlp.up_proj.weight
        assert torch.equal(own, find_blocks(source.backbone)[index].mlp.up_proj.weight[best])
        head = int(scores["heads"][index][:2].argmax())
        own = find_blocks(begun.backbone)[index].self_attn.v_proj.weight
        full = find_blocks(source.backbone)[index].self_attn.v_proj.weight
        assert torch.equal(own, full[8 * head : 8 * head + 8])


def test_a_gradual_cut_heals_each_stage_for_its_part(run: Run) -> None:
    assert training.stage_depths(12, 4, 0.34) == [8, 6, 4]
    assert training.stage_depths(3, 1, 0.34) == [2, 1]
    assert training.stage_depths(12, 11, 0.01) == [11]
    fit = run.record("heal-gradual-d01-s0").costs.training
    assert run.record("heal-gradual-d01-s0").kept == (0,)
    assert (fit.epochs, len(fit.validation)) == (3, 3)  # 1 of two blocks, 2 of one
    assert fit.best_epoch in {2, 3}
    context = Context(run.path, run.study.with_precision("float32"))
    trial = trial_in(run, "heal-gradual-d01-s0")
    deep = replace(trial, kept=(0, 1))
    flops = [
        epochs * training.trained_epoch(context, each, context.new_recommender(each))
        for epochs, each in ((1, deep), (2, trial))
    ]
    assert fit.flops == sum(flops)
    ranks = evaluate(context.trained(trial), context.test, device=CPU)["full"]
    np.testing.assert_array_equal(ranks, ranks_in(run, trial.id))


def test_blocks_are_chosen_anew_after_each_stage(run: Run, context: Context) -> None:
    record = run.record("heal-angular-steps-d01-s0")
    trial = replace(trial_in(run, record.id), kept=(0, 1, 2))
    teacher = context.trained(full_trial("full", 0, 3))
    assert len(record.kept) == 1
    first = training.fewer_blocks(context, teacher, trial, (), 2)
    assert set(record.kept) < set(first) < {0, 1, 2}  # nested
    gone = min(
        range(3),
        key=lambda b: training.similarities(teacher, context.validation, device=CPU).angular[
            b, b + 1
        ],
    )
    assert gone not in first
    ends = replace(trial, method="heal:ends")
    assert training.fewer_blocks(context, teacher, ends, (0,), 2) == (0, 1)
    assert training.fewer_blocks(context, teacher, ends, (2,), 2) == (0, 2)


def test_a_killed_stage_goes_on(
    run: Run, shaped: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = replace(shaped, methods=("full", "heal:gradual"), layers="1")
    monkeypatch.setattr(Checkpoint, "is_due", lambda self: self.path is not None)
    fit, calls = training.fit, []

    def killed(*given: object, **more: object) -> object:
        path = more["checkpoint"]
        calls.append(path)
        if "stage-2" in str(path):
            raise KeyboardInterrupt
        return fit(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(study, tmp_path / "run", jobs=0)
    assert (tmp_path / "run/checkpoints/heal-gradual-d01-s0.stage-1.safetensors").is_file()
    monkeypatch.setattr(training, "fit", fit)
    again = run_sweep(study, tmp_path / "run", jobs=0)
    np.testing.assert_array_equal(
        ranks_in(again, "heal-gradual-d01-s0"), ranks_in(run, "heal-gradual-d01-s0")
    )
    found = again.record("heal-gradual-d01-s0").costs.training
    assert found.resumed_at
    assert found.epochs == 3
    assert not [*(tmp_path / "run").glob("checkpoints/*")]


def test_only_whole_blocks_are_an_answer_to_depth(run: Run) -> None:
    summary = summarise(run)
    methods = {method for method, _ in summary.candidates}
    assert methods == {"finetune", "heal:gradual", "heal:angular-steps"}
    assert {p.method for p in summary.points} >= {"heal:narrow", "finetune:twice"}
    with pytest.raises(BadInput, match="finetune, heal or distill"):
        replace(run.study, methods=("full", "finetune:twice"), layers="find")


def test_the_cache_tells_shapes_apart(run: Run, tmp_path: Path) -> None:
    study = replace(run.study.with_precision("float32"), cache=str(tmp_path))
    context = Context(run.path, study)
    trial = trial_in(run, "finetune-d02-s0")
    files = set()
    for shape in (Shape(), Shape(loops=2), Shape(loops=3), Shape(width=0.5), Shape(width=0.25)):
        model = context.new_recommender(trial)
        reshape(model.backbone, shape)
        recipe = study.recipe
        files.add(result_file(context, trial, NextItem(model, recipe), recipe))
    best = training._unit_scores(context, trial_in(run, "heal-taylor-d02-s0"))
    model = context.new_recommender(trial)
    reshape(model.backbone, Shape(0.5, scores={k: -s for k, s in best.items()}))
    files.add(result_file(context, trial, NextItem(model, study.recipe), study.recipe))
    assert len(files) == 6


def test_the_estimate_counts_turns_and_stages(shaped: Study) -> None:
    seconds = {"train:1": 1.0, "train:3": 3.0, "encode:1": 0.1, "encode:3": 0.3}
    seconds |= {"train:1:narrow": 0.5, "encode:1:narrow": 0.04, "encode:sasrec": 0.1}
    units = Units(batch=16, seconds=seconds | {"train:sasrec": 1.0}, score=0.0)
    sizes = Sizes(windows=32, test=5, validation=4)
    every = {job.id: job.seconds for job in jobs_of(shaped, plan(shaped, 3), sizes, units)}
    of = {name.removesuffix("-s0"): value for name, value in every.items()}
    plain = 3 * (2 * 2 + 4 * 0.2) + 5 * 0.2  # three epochs of two steps, at depth 2
    assert of["finetune-d02"] == pytest.approx(plain)
    assert of["finetune-twice-d02"] == pytest.approx(2 * plain)  # as four blocks
    assert of["heal-narrow-d01"] == pytest.approx(3 * (2 * 0.5 + 4 * 0.04) + 5 * 0.04)
    assert of["heal-narrow-d03"] == pytest.approx(3 * (2 * 3 + 4 * 0.3) + 5 * 0.3)  # not timed
    assert of["heal-gradual-d01"] == pytest.approx(3 * (2 * 1.5 + 4 * 0.15) + 5 * 0.15)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "elastic": (lambda: asked("elastic:v", width=0.5), "elastic is one model for every depth"),
    "steps": (lambda: asked("finetune:v", at_once=0.5), "does not cut a trained model"),
    "both": (lambda: Variant(loops=2, at_once=0.5), "loops: expected 1 beside at_once"),
    "width": (lambda: Variant(width=0.0), "width: expected a number above 0"),
    "loops": (lambda: Variant(loops=17), "loops: expected a whole number of at most 16"),
    "lora": (
        lambda: replace(asked("heal:v", width=0.5), backbone=Backbone(tuning="lora")),
        "backbone.tuning: expected tuning = full of a Hugging Face model beside heal:v",
    ),
}


def asked(method: str, **settings: object) -> Study:
    return Study(methods=(method,), variants={"v": Variant(**settings)})  # type: ignore[arg-type]


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_is_one_line(case: str) -> None:
    make, said = REFUSED[case]
    with pytest.raises(BadInput) as refused:
        make()
    assert said in str(refused.value)


def test_an_architecture_that_stays_wide_is_refused_before_anything_is_trained(
    shaped: Study, tmp_path: Path
) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=3, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    backbone = Backbone(source=str(tmp_path / "gpt2"), prompt="")
    study = replace(shaped, methods=("finetune:narrow",), backbone=backbone)
    with pytest.raises(BadInput, match="GPT2LMHeadModel.*fewer heads of the same size"):
        run_sweep(study, tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()
