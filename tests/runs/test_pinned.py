"""A run on a hub model stays at the commit it began with; one with nothing to do loads nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import depthprobe as dp
from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import evaluate
from depthprobe.models.embedded import embedded_tokenizer
from depthprobe.runs.context import Context
from depthprobe.runs.export import export_trial
from depthprobe.runs.processes import Progress
from depthprobe.runs.store import Run, open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Study

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(
    llama_config: Callable[..., LlamaConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The hub client's cache: a model of two commits, ``main`` at the older one."""
    repository = tmp_path / "hub" / "models--org--model"
    for seed, commit in enumerate((OLD, NEW)):
        torch.manual_seed(seed)
        folder = repository / "snapshots" / commit
        LlamaForCausalLM(llama_config(num_hidden_layers=2, vocab_size=259)).save_pretrained(folder)
        embedded_tokenizer().save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("depthprobe.models.sources.offline", lambda source: True)
    monkeypatch.setattr("depthprobe.models.sources.offline", lambda source: True)
    return repository


@pytest.fixture
def on_hub(study: Study, hub: Path) -> Study:
    backbone = replace(study.backbone, source="org/model")
    return replace(study, methods=("finetune",), layers="1", seeds=1, backbone=backbone)


def ranks(run: Run, trial: str) -> np.ndarray:
    users = run.users
    return users[(users["trial"] == trial) & (users["protocol"] == "full")]["rank"].to_numpy()


class Moves(Progress):
    """Moves the branch once the run has begun, before its first trial."""

    def __init__(self, hub: Path) -> None:
        self.hub = hub

    def plan(self, trials: object) -> None:
        (self.hub / "refs" / "main").write_text(NEW)


def test_a_run_stays_at_the_commit_it_began_with(on_hub: Study, hub: Path, tmp_path: Path) -> None:
    expected = {}
    for commit in (OLD, NEW):
        at = replace(on_hub, backbone=replace(on_hub.backbone, revision=commit))
        both = replace(at, methods=("finetune", "full"))
        expected[commit] = run_sweep(both, tmp_path / commit, jobs=0)
    trials = ("finetune-d01-s0", "full-d02-s0")
    for trial in trials:
        assert not np.array_equal(*(ranks(run, trial) for run in expected.values()))

    run = run_sweep(on_hub, tmp_path / "run", jobs=0, progress=Moves(hub))
    assert (hub / "refs" / "main").read_text() == NEW
    assert run.manifest.backbone.revision == OLD
    assert run.study.backbone.revision is None
    np.testing.assert_array_equal(ranks(run, trials[0]), ranks(expected[OLD], trials[0]))

    continued = run_sweep(replace(on_hub, methods=("full",)), run.path, jobs=0)
    assert continued.manifest.backbone.revision == OLD
    np.testing.assert_array_equal(ranks(continued, trials[1]), ranks(expected[OLD], trials[1]))
    for record in continued.records:
        assert record.provenance.backbone == OLD
        assert record.provenance.study == on_hub.digest()

    folder = export_trial(run.path, trials[0], tmp_path / "model")
    context = Context(run.path, run.study)
    found = evaluate(dp.load_recommender(folder).model, context.test, device=context.device)
    np.testing.assert_array_equal(found["full"], ranks(run, trials[0]))
    card = (folder / "README.md").read_text()
    assert f"`org/model`, revision `{OLD}`" in card

    other = replace(on_hub, backbone=replace(on_hub.backbone, revision=NEW))
    with pytest.raises(BadInput, match=r"backbone\.revision: None -> "):
        run_sweep(other, run.path, jobs=0)
    fresh = run_sweep(on_hub, tmp_path / "fresh", jobs=0)
    assert fresh.manifest.backbone.revision == NEW


def test_a_run_with_nothing_to_do_loads_no_weights(
    on_hub: Study, tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = {"a": replace(on_hub, methods=("popularity",)), "b": tiny}
    for name, study in studies.items():
        run_sweep(study, tmp_path / name, jobs=0)
    for module in ("backbones", "build"):
        name = "load_backbone" if module == "backbones" else "pretrained"
        monkeypatch.setattr(
            f"depthprobe.models.{module}.{name}", lambda *_, **__: pytest.fail("loaded")
        )
    for name, study in studies.items():
        before = json.loads((tmp_path / name / "manifest.json").read_text())
        run_sweep(study, tmp_path / name, jobs=0)
        after = json.loads((tmp_path / name / "manifest.json").read_text())
        assert after["backbone"] == before["backbone"]
        assert after["wall_seconds"] >= before["wall_seconds"]


def test_changed_weights_of_a_folder_are_refused_without_loading_them(
    study: Study, tmp_path: Path, hub: Path
) -> None:
    source = hub / "snapshots" / OLD
    backbone = replace(study.backbone, source=str(source))
    few = replace(study, methods=("popularity",), layers="1", backbone=backbone)
    run = run_sweep(few, tmp_path / "run", jobs=0)
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (source / "model.safetensors").write_bytes(weights)
    with pytest.raises(BadInput, match="the backbone has changed"):
        run_sweep(few, run.path, jobs=0)
    assert open_run(run.path).manifest == run.manifest


def test_an_unknown_revision_writes_nothing(on_hub: Study, tmp_path: Path) -> None:
    study = replace(on_hub, backbone=replace(on_hub.backbone, revision="v9"))
    with pytest.raises(BadInput, match="backbone: 'org/model'") as caught:
        run_sweep(study, tmp_path / "run", jobs=0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
