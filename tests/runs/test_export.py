"""Exports: every trial with a backbone, loadable by transformers alone, of the same ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import depthprobe as dp
from depthprobe.errors import BadInput
from depthprobe.models.embedded import embedded_tokenizer
from depthprobe.models.export import ExportedRecommender
from depthprobe.runs.context import Context
from depthprobe.runs.export import export_trial
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Recipe, Study

RunOf = Callable[[str], Run]
PROBED = ("full", "early-exit", "skip", "finetune")
CARD_OF = "distill-d02-s1"
LAST = Recipe(epochs=2, batch_size=16, learning_rate=0.01, objective="last")
# what differs from the small study
RUNS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "lora": (
        {"methods": (*PROBED, "replace", "heal")},
        {"tuning": "lora", "lora_rank": 4, "lora_targets": ("mlp", "v_proj")},
    ),
    "bfloat16": ({"methods": (*PROBED, "replace", "distill", "elastic")}, {"dtype": "bfloat16"}),
    "frozen": (
        {"methods": ("full", "finetune")},
        {"tuning": "frozen", "prompt": "", "attention": "eager"},
    ),
    "suffix": (
        {"methods": (*PROBED, "heal", "distill"), "recipe": LAST, "train_items": True},
        {"suffix": "=>"},
    ),
    "linear": (
        {"methods": (*PROBED, "distill"), "item_table": "learned", "item_width": 12},
        {"head": "linear"},
    ),
}
TRIALS = {
    "small": "full-d03-s1 finetune-d01-s0 heal-d02-s0 distill-d02-s1 random-init-d03-s0"
    " random-init-d01-s1 early-exit-d01-s0 early-exit-d02-s1 skip-b00-s0 skip-b01-s1"
    " replace-d02-s0 replace-d01-s1 greedy-d01-s0 elastic-d01-s0 elastic-d03-s1"
    " random-selection-d02-s1 finetune-angular-d01-s0 heal-greedy-d01-s1 distill-logits-d02-s0"
    " distill-top-d01-s0",
    "lora": "full-d03-s0 replace-d02-s0 finetune-d02-s0 heal-d01-s0 early-exit-d01-s0 skip-b01-s0",
    "bfloat16": "full-d03-s0 finetune-d01-s0 early-exit-d02-s0 skip-b00-s0 replace-d01-s0"
    " elastic-d02-s0",
    "frozen": "full-d03-s0 finetune-d02-s0",
    "suffix": "full-d03-s0 early-exit-d02-s0 skip-b01-s0 heal-d01-s0 distill-d01-s0",
    "linear": "full-d03-s0 skip-b00-s0 distill-d02-s0",
}


@pytest.fixture(scope="session")
def run_of(
    study: Study, small_run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """``run_of("lora")``: the small run, or one of it with other settings, made once."""
    made = {"small": small_run}

    def run(name: str) -> Run:
        if name not in made:
            of_study, of_backbone = RUNS[name]
            changed = replace(study, seeds=1, **of_study)  # type: ignore[arg-type]
            backbone = replace(changed.backbone, **of_backbone)  # type: ignore[arg-type]
            folder = tmp_path_factory.mktemp("runs") / name
            made[name] = run_sweep(replace(changed, backbone=backbone), folder, jobs=0)
            assert not made[name].failed
        return made[name]

    return run


def recorded(run: Run, trial: str) -> np.ndarray:
    users = run.users
    chosen = users[(users["trial"] == trial) & (users["protocol"] == "full")]
    return chosen["rank"].to_numpy()


@torch.inference_mode()
def ranks_alone(loaded: ExportedRecommender, run: Run) -> np.ndarray:
    """The rank of every user's last item, from the log's lines and the exported model alone."""
    lines = [line.split() for line in Path(run.study.data.source).read_text().splitlines()]
    order = Context(run.path, run.study).sequences.user_ids.tolist()
    logs = {user: [loaded.numbers[item] for item in items] for user, *items in lines}
    histories = [logs[user][:-1] for user in order]
    recent = [torch.tensor(history[-loaded.max_history :]) for history in histories]
    padded = torch.nn.utils.rnn.pad_sequence(recent, batch_first=True)
    vectors = loaded.model.encode(padded, torch.tensor([len(one) for one in recent]))
    exclude = torch.zeros(len(order), len(loaded.item_ids), dtype=torch.bool)
    if loaded.filter_seen:
        for row, history in enumerate(histories):
            exclude[row, torch.tensor(history) - 1] = True
    targets = torch.tensor([logs[user][-1] for user in order]) - 1
    scores = vectors @ loaded.model.item_matrix()[1:].T
    return dp.rank_targets(scores, targets, exclude).numpy()


@pytest.mark.parametrize(
    ("name", "trial"), [(name, trial) for name, all_ in TRIALS.items() for trial in all_.split()]
)
def test_ranks_of_the_export_are_the_trials(
    run_of: RunOf, name: str, trial: str, tmp_path: Path
) -> None:
    run = run_of(name)
    folder = export_trial(run.path, trial, tmp_path / "model")
    loaded = dp.load_recommender(folder)
    np.testing.assert_array_equal(ranks_alone(loaded, run), recorded(run, trial))
    record = run.record(trial)
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert model.config.num_hidden_layers == len(model.model.layers) == record.depth
    expected = torch.bfloat16 if name == "bfloat16" else torch.float32
    assert model.dtype == loaded.model.backbone.dtype == expected
    assert {p.dtype for p in model.parameters()} == {expected}
    assert AutoTokenizer.from_pretrained(folder)("Next:")["input_ids"]
    assert not [part for part, _ in model.named_parameters() if "lora" in part]
    if name == "lora":  # not only taken off, but added to the weights
        source = dp.load_backbone(run.study.backbone.source).model.layers[record.kept[0]]
        exported = model.model.layers[0]
        assert torch.equal(exported.self_attn.q_proj.weight, source.self_attn.q_proj.weight)
        assert not torch.equal(exported.self_attn.v_proj.weight, source.self_attn.v_proj.weight)
        assert not torch.equal(exported.mlp.up_proj.weight, source.mlp.up_proj.weight)
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "recommender.json", "recommender.safetensors"} <= names
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md"}


def test_what_the_run_recommends_is_what_the_ranks_say(small_run: Run, tmp_path: Path) -> None:
    """The target of a user of rank 1 is the first recommendation."""
    trial = "full-d03-s0"
    loaded = dp.load_recommender(export_trial(small_run.path, trial, tmp_path / "model"))
    lines = [line.split() for line in Path(small_run.study.data.source).read_text().splitlines()]
    logs = {user: items for user, *items in lines}
    order = Context(small_run.path, small_run.study).sequences.user_ids.tolist()
    answers = loaded.recommend([logs[user][:-1] for user in order], top=10)
    for user, answer, rank in zip(order, answers, recorded(small_run, trial), strict=True):
        place = [found.item for found in answer].index(logs[user][-1]) + 1 if rank <= 10 else None
        assert place == (rank if rank <= 10 else None)


@pytest.mark.parametrize("trial", ["sasrec-s0", "sasrec-s1"])
def test_sasrec_is_exported_without_a_backbone(trial: str, small_run: Run, tmp_path: Path) -> None:
    folder = export_trial(small_run.path, trial, tmp_path / "model")
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "recommender.json", "recommender.safetensors"}
    loaded = dp.load_recommender(folder)
    np.testing.assert_array_equal(ranks_alone(loaded, small_run), recorded(small_run, trial))
    # users of many lengths in one call are answered as each alone
    logs = [line.split()[1:] for line in small_inputs_lines(small_run)]
    together = loaded.recommend(logs, top=5)
    for log, answer in zip(logs[:5], together, strict=False):
        (alone,) = loaded.recommend([log], top=5)
        assert [one.item for one in alone] == [one.item for one in answer]
    _, top, body = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    front = yaml.safe_load(top)
    assert (front["library_name"], front["license_name"]) == ("depthprobe", "terms-of-the-data")
    assert "SASRec, a sequential recommender without a language model" in body
    assert "AutoModel" not in body
    assert f"NDCG@10 of the teacher of its seed (`full-d03-{trial[-2:]}`" in body


def small_inputs_lines(run: Run) -> list[str]:
    return Path(run.study.data.source).read_text().splitlines()


def test_a_sasrec_that_is_damaged(small_run: Run, tmp_path: Path) -> None:
    folder = export_trial(small_run.path, "sasrec-s0", tmp_path / "model")
    card = json.loads((folder / "recommender.json").read_text())
    for change in ({"sasrec": {"width": 7, "blocks": 1, "heads": 1}}, {"max_history": 9}):
        (folder / "recommender.json").write_text(json.dumps(card | change))
        with pytest.raises(BadInput, match="damaged: it does not fit the model"):
            dp.load_recommender(folder)
    copy = shutil.copytree(small_run.path, tmp_path / "copy")
    shutil.rmtree(copy / "trials/sasrec-s0/model")
    with pytest.raises(BadInput, match=r"sasrec-s0/model is not"):
        export_trial(copy, "sasrec-s0", tmp_path / "other")


@pytest.mark.parametrize("trial", ["sasrec-s1", CARD_OF])
def test_the_example_of_the_card_prints_what_it_says(
    trial: str, small_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_trial(small_run.path, trial, tmp_path / "model")
    card = (folder / "README.md").read_text("utf-8")
    code = re.search("```python\n(.*?)```", card, re.S)[1].replace("FOLDER", str(folder))  # type: ignore[index]
    exec(code)  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert printed == re.findall("(?m)^# (.*)$", code)
    assert len(printed) == 3
    counts = Counter(item for line in small_inputs_lines(small_run) for item in line.split()[1:])
    had = json.loads(re.search(r"recommend\(\[(\[.*?\])\]", code)[1])  # type: ignore[index]
    assert sorted(counts[item] for item in had) == sorted(counts.values())[-3:]
    assert not {line.split()[0] for line in printed} & {*had}  # seen items are left out


@pytest.mark.parametrize("trial", ["popularity-s0", "nothing"])
def test_what_is_no_model_is_not_exported(trial: str, small_run: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="trial") as caught:
        export_trial(small_run.path, trial, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_map_that_was_deleted(small_run: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(small_run.path, tmp_path / "copy")
    shutil.rmtree(copy / "trials/replace-d02-s0/model")
    with pytest.raises(BadInput, match=r"replace-d02-s0/model is not"):
        export_trial(copy, "replace-d02-s0", tmp_path / "model")


@pytest.mark.parametrize("trial", ["full-d03-s0", "early-exit-d01-s0"])
def test_a_run_whose_teacher_was_deleted(trial: str, small_run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_run.path, copy)
    shutil.rmtree(copy / "trials" / "full-d03-s0" / "model")
    with pytest.raises(BadInput, match=r"full-d03-s0/model is not"):
        export_trial(copy, trial, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_export_that_fails_leaves_nothing(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> str:
        raise OSError("No space left on device")

    (tmp_path / "model").mkdir()
    monkeypatch.setattr("depthprobe.runs.export.model_card", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_trial(small_run.path, "full-d03-s0", tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model"]
    (tmp_path / "model" / "mine").write_text("mine")
    with pytest.raises(BadInput, match="new or empty"):
        export_trial(small_run.path, "full-d03-s0", tmp_path / "model")


def test_the_checkpoints_own_dtype_is_kept(
    study: Study, llama_config: Callable[..., LlamaConfig], tmp_path: Path
) -> None:
    """``dtype = auto`` on a bfloat16 checkpoint."""
    model = LlamaForCausalLM(llama_config(num_hidden_layers=2, vocab_size=259))
    model.bfloat16().save_pretrained(tmp_path / "backbone")
    embedded_tokenizer().save_pretrained(tmp_path / "backbone")
    backbone = replace(study.backbone, source=str(tmp_path / "backbone"), dtype="auto")
    few = replace(study, methods=("full",), layers="1", seeds=1, backbone=backbone)
    run = run_sweep(few, tmp_path / "run", jobs=0)
    assert run.manifest.backbone.dtype == "bfloat16"
    loaded = dp.load_recommender(export_trial(run.path, "full-d02-s0", tmp_path / "model"))
    assert loaded.model.backbone.dtype == torch.bfloat16
    np.testing.assert_array_equal(ranks_alone(loaded, run), recorded(run, "full-d02-s0"))


def test_nothing_tells_where_the_backbone_was(small_run: Run, tmp_path: Path) -> None:
    folder = export_trial(small_run.path, "full-d03-s0", tmp_path / "model")
    place = str(Path(small_run.study.backbone.source).parent)
    for path in folder.rglob("*"):
        assert place not in path.read_text(encoding="utf-8", errors="replace"), path.name


def test_without_a_prompt_no_tokenizer_is_needed(study: Study, tmp_path: Path) -> None:
    source = tmp_path / "backbone"
    shutil.copytree(study.backbone.source, source)
    for file in source.glob("tokenizer*"):
        file.unlink()
    backbone = replace(study.backbone, source=str(source), prompt="")
    few = replace(study, methods=("finetune",), layers="1", seeds=1, backbone=backbone)
    run = run_sweep(few, tmp_path / "run", jobs=0)
    folder = export_trial(run.path, "finetune-d01-s0", tmp_path / "model")
    loaded = dp.load_recommender(folder)
    np.testing.assert_array_equal(ranks_alone(loaded, run), recorded(run, "finetune-d01-s0"))
    assert json.loads((folder / "recommender.json").read_text())["prompt"] == []
