"""Revisions: a branch is looked up once, a commit is loaded whatever the branch does later."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from depthprobe.errors import BadInput
from depthprobe.models.backbones import (
    backbone_revision,
    describe,
    embedded_backbone,
    load_backbone,
    pinned,
    pinned_now,
    pretrained,
    resolve_revision,
)
from depthprobe.models.families import family_config
from depthprobe.models.tiny import tiny_model
from depthprobe.study import Backbone

OLD, NEW = "a" * 40, "b" * 40
HUB = Backbone(source="org/model")


@pytest.fixture
def hub(make_model, tmp_path, monkeypatch) -> Path:
    """The hub client's cache as it is after downloads: two commits, ``main`` at the older one."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--model"
    for seed, commit in enumerate((OLD, NEW)):
        make_model("qwen3", seed=seed).float().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(OLD)
    (repository / "refs" / "v2").write_text(NEW)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("depthprobe.models.backbones.offline", lambda source: True)
    monkeypatch.setattr("depthprobe.models.backbones.offline", lambda source: True)
    return repository


def weight(model) -> torch.Tensor:
    return model.model.layers[0].mlp.up_proj.weight


def test_what_a_name_points_to(hub):
    assert resolve_revision("org/model") == OLD
    assert resolve_revision("org/model", "v2") == NEW
    assert resolve_revision("org/model", NEW) == NEW
    assert resolve_revision("embedded") is None
    assert resolve_revision(hub) is None
    for source, revision in (("org/model", "v3"), ("org/other", None)):
        with pytest.raises(BadInput, match=f"backbone: '{source}'") as caught:
            resolve_revision(source, revision)
        assert "\n" not in str(caught.value)


def test_weights_come_from_the_commit(hub, make_model):
    older, newer = (make_model("qwen3", seed=seed).float() for seed in (0, 1))
    assert torch.equal(weight(load_backbone("org/model")), weight(older))
    assert torch.equal(weight(load_backbone("org/model", revision="v2")), weight(newer))
    assert torch.equal(weight(load_backbone("org/model", revision=NEW)), weight(newer))


def test_configuration_and_weights_are_of_one_commit(hub, monkeypatch):
    """The branch moves between the two: both are of where it pointed before."""
    import depthprobe.models.backbones as module

    def moves(*args, **kwargs):
        (hub / "refs" / "main").write_text(NEW)
        return config(*args, **kwargs)

    config = module.backbone_config
    before = weight(load_backbone("org/model"))
    monkeypatch.setattr(module, "backbone_config", moves)
    assert torch.equal(weight(load_backbone("org/model")), before)
    assert not torch.equal(weight(load_backbone("org/model")), before)


def test_pinned_settings_outlive_a_branch(hub):
    settings = pinned_now(HUB)
    assert settings == replace(HUB, revision=OLD)
    before = weight(pretrained(settings))
    (hub / "refs" / "main").write_text(NEW)
    assert backbone_revision(settings) == OLD
    assert torch.equal(weight(pretrained(settings)), before)
    assert backbone_revision(HUB) == NEW
    assert pinned(HUB, OLD) == settings
    shutil.rmtree(hub / "snapshots" / OLD)
    with pytest.raises(BadInput, match="cannot be"):
        pretrained(settings)


def test_folders_have_no_commit_but_a_hash(hub):
    folder = hub / "snapshots" / OLD
    settings = Backbone(source=str(folder))
    assert pinned_now(settings) == settings
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update(name.encode() + (folder / name).read_bytes())
    expected = f"sha256:{digest.hexdigest()[:16]}"
    assert backbone_revision(settings) == expected
    assert pinned(settings, expected) == settings
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert backbone_revision(settings) != expected


def test_the_embedded_backbone_is_hashed_in_memory(tmp_path, monkeypatch):
    (tmp_path / "embedded").mkdir()  # a folder of that name is not meant
    monkeypatch.chdir(tmp_path)
    first = backbone_revision(Backbone())
    assert first == backbone_revision(Backbone(dtype="bfloat16"))
    changed = embedded_backbone()
    weight(changed).data[0, 0] += 1
    monkeypatch.setattr("depthprobe.models.backbones.embedded_backbone", lambda: changed)
    assert backbone_revision(Backbone()) != first


def test_what_is_recorded(make_model):
    found = describe(Backbone(dtype="bfloat16"), "sha256:0")
    model = embedded_backbone()
    assert found == {
        "source": "embedded",
        "revision": "sha256:0",
        "blocks": 12,
        "width": 32,
        "family": "llama",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "bfloat16",
    }


def test_what_is_recorded_is_found_without_a_weight(hub, monkeypatch, make_model):
    read = []
    tensor = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: read.append(out := tensor(self, *a, **k)) or out
    )
    recorded = describe(HUB, OLD)
    model = make_model("qwen3")
    assert recorded["parameters"] == model.num_parameters()
    assert (recorded["dtype"], recorded["blocks"]) == ("float32", 6)
    assert {p.device.type for p in pretrained(HUB, weights=False).parameters()} == {"meta"}
    assert {t.device.type for t in read} <= {"meta"}


@pytest.mark.parametrize("change", ["fewer", "more", "shorter"])
def test_weights_that_do_not_fit_are_refused_without_reading_them(hub, change):
    file = hub / "snapshots" / OLD / "model.safetensors"
    weights = load_file(file)
    if change == "fewer":
        del weights["model.layers.5.mlp.up_proj.weight"]
    weights |= {"more": {"extra": torch.ones(2)}}.get(change, {})
    save_file(weights, file, metadata={"format": "pt"})
    if change == "shorter":
        file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(BadInput, match="backbone: 'org/model'") as caught:
        describe(HUB, OLD)
    assert "\n" not in str(caught.value)


def test_an_architecture_without_blocks_is_refused_before_a_run_begins(tmp_path):
    tiny_model(family_config("xlm"), depth=2).save_pretrained(tmp_path)
    for use in (pretrained, lambda settings: describe(settings, "sha256:0")):
        with pytest.raises(BadInput, match="more than one list of blocks"):
            use(Backbone(source=str(tmp_path)))
