"""Folders and their files: what is one, what of it is hashed, and which weights are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from depthprobe.errors import BadInput
from depthprobe.models.backbones import (
    backbone_revision,
    is_same,
    load_backbone,
    load_tokenizer,
    pinned,
    pinned_now,
)
from depthprobe.models.embedded import embedded_tokenizer
from depthprobe.models.sources import is_folder
from depthprobe.study import Backbone


def test_what_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_folder("gpt2")
    assert not is_folder("org/model")
    for path in ("a/b/c", "./gpt2", "../gpt2", "~/gpt2", "/gpt2", "my model", "gpt2/", "C:\\gpt2"):
        assert is_folder(path), path
    assert is_folder(Path("gpt2"))
    Path("org/model").mkdir(parents=True)
    assert is_folder("org/model")


def test_folders_have_no_commit_but_a_hash(saved):
    settings = Backbone(source=str(saved))
    assert pinned_now(settings) == settings
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update(name.encode() + (saved / name).read_bytes())
    before, own = backbone_revision(settings), f"sha256:{digest.hexdigest()[:16]}"
    assert is_same(own, before)  # what runs of an earlier version recorded
    assert is_same(None, before)
    assert pinned(settings, before) == settings
    (saved / "README.md").write_text("nothing that a number depends on")
    assert backbone_revision(settings) == before


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "merges.txt",
        "special_tokens_map.json", "added_tokens.json", "vocab.txt", "spiece.model",
        "chat_template.jinja", "generation_config.json", "modeling_own.py",
    ],
)  # fmt: skip
def test_every_file_that_is_read_is_in_the_hash(saved, name):
    settings, file = Backbone(source=str(saved)), saved / name
    before = backbone_revision(settings)
    old = file.read_bytes() if file.exists() else b""
    file.write_bytes(old + b" ")
    assert not is_same(before, backbone_revision(settings))
    if old:
        file.write_bytes(old)
        assert is_same(before, backbone_revision(settings))


def shard(folder, *, named=lambda name: name):
    """Two files and their index, under the names that the index is to give them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for place, part in enumerate((names[::2], names[1::2])):
        file = f"part-{place}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, named(file))
    content = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(content)


def test_shards_are_loaded_and_hashed_with_their_index(saved):
    whole, settings = load_backbone(saved), Backbone(source=str(saved))
    shard(saved)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(load_backbone(saved).get_parameter(name), whole.get_parameter(name))
    before = backbone_revision(settings)
    for name in ("part-1.safetensors", "model.safetensors.index.json"):
        old = (saved / name).read_bytes()
        (saved / name).write_bytes(old + b" ")
        assert not is_same(before, backbone_revision(settings)), name
        (saved / name).write_bytes(old)


@pytest.mark.parametrize(
    "named",
    [
        lambda name: "pytorch_model.bin",
        lambda name: f"../outside/{name}",
        lambda name: f"/{name}",
        lambda name: 3,
    ],
    ids=["pickled", "above", "absolute", "no name"],
)
def test_an_index_names_safetensors_of_its_folder_alone(saved, named):
    outside = saved.parent / "outside"
    shutil.copytree(saved, outside)
    shard(outside)
    shard(saved, named=named)
    torch.save({}, saved / "pytorch_model.bin")
    for load in (load_backbone, lambda path: backbone_revision(Backbone(source=str(path)))):
        with pytest.raises(BadInput, match="backbone: .*"):
            load(saved)


def test_weights_beyond_a_dtype_are_told_from_damage(saved):
    file, name = saved / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    save_file(weights | {name: weights[name] * 1e7}, file, metadata={"format": "pt"})
    load_backbone(saved, dtype="bfloat16")
    with pytest.raises(BadInput, match=f"{name} holds NaN or infinity: .* the range of float16"):
        load_backbone(saved, dtype="float16")


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32])
def test_a_weight_of_whole_numbers_is_refused(saved, whole, kind):
    file, name = saved / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file) | {"model.rotary_emb.inv_freq": torch.arange(4)}
    save_file(weights, file, metadata={"format": "pt"})
    load_backbone(saved, weights=whole)
    save_file(weights | {name: (100 * weights[name]).to(kind)}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"weight {name} is of whole numbers .*quantization_config"):
        load_backbone(saved, weights=whole)


@pytest.mark.parametrize("whole", [True, False])
def test_a_weight_in_two_shards_is_refused(saved, whole):
    shard(saved)
    file = saved / "part-1.safetensors"
    weights = load_file(file)
    stale = next(iter(load_file(saved / "part-0.safetensors")))
    harmless = {"model.rotary_emb.inv_freq": torch.ones(2)}
    save_file(weights | harmless, file, metadata={"format": "pt"})
    save_file(load_file(saved / "part-0.safetensors") | harmless, saved / "part-0.safetensors")
    load_backbone(saved, weights=whole)
    again = load_file(saved / "part-0.safetensors")[stale] + 1
    save_file(weights | {stale: again}, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"part-0.* and part-1.* both hold its weight {stale}"):
        load_backbone(saved, weights=whole)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_clone_without_lfs_is_told(saved, name):
    embedded_tokenizer().save_pretrained(saved)
    (saved / "unread.bin").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    load_backbone(saved), load_tokenizer(saved)
    (saved / name).write_text((saved / "unread.bin").read_text())
    with pytest.raises(BadInput, match=f"{name} is a pointer of Git LFS .*: git lfs pull"):
        load_backbone(saved), load_tokenizer(saved)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(saved, whole, value, dtype):
    file, name = saved / "model.safetensors", "model.layers.4.self_attn.k_norm.weight"
    weights = load_file(file)
    weights[name] = weights[name].to(dtype)
    weights[name][-1] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"{name} holds NaN or infinity"):
        load_backbone(saved, weights=whole)
