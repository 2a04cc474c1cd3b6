"""Loading backbones: every source, what is refused, revisions, code beside a checkpoint."""

from __future__ import annotations

import builtins
import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import depthprobe.models.backbones as module
from depthprobe.errors import BadInput
from depthprobe.models.backbones import (
    backbone_config,
    backbone_revision,
    describe,
    load_backbone,
    load_tokenizer,
    pinned,
    pinned_now,
    pretrained,
)
from depthprobe.models.embedded import embedded_backbone, embedded_tokenizer
from depthprobe.models.families import family_config
from depthprobe.models.sources import resolve_revision
from depthprobe.models.tiny import tiny_model
from depthprobe.study import Backbone


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror("no name server")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("depthprobe.models.sources.getproxies", dict)


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_folder(saved, make_model, ids):
    model = load_backbone(saved)
    assert model.dtype == torch.float32
    assert not model.training
    with torch.no_grad():
        expected = make_model("qwen3").float()(ids).logits
        torch.testing.assert_close(model(ids).logits, expected)
    assert load_backbone(str(saved), dtype="bfloat16").dtype == torch.bfloat16
    assert load_backbone(saved, dtype=torch.float64).dtype == torch.float64
    assert load_backbone("embedded", dtype="float16").dtype == torch.float16


def test_random_init_needs_no_weights_and_is_seeded(saved):
    for file in saved.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first, again, other = (load_backbone(saved, random_init=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    weight = first.model.layers[2].mlp.up_proj.weight
    assert torch.equal(weight, again.model.layers[2].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[2].mlp.up_proj.weight)
    assert not first.training
    assert first.dtype == torch.float32


def test_config_alone(saved):
    (saved / "model.safetensors").unlink()
    assert backbone_config(saved).num_hidden_layers == 6
    assert backbone_config(str(saved / "config.json")).num_hidden_layers == 6
    assert backbone_config("embedded").num_hidden_layers == 12
    with pytest.raises(BadInput, match=r"no weights \(\*\.safetensors\)"):
        load_backbone(saved)


def test_pickled_weights_are_refused(saved):
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    with pytest.raises(BadInput, match="only pickled weights.*pytorch_model.bin"):
        load_backbone(saved)


def test_missing_folder_and_files(tmp_path):
    for source in (
        tmp_path / "nowhere",
        str(tmp_path / "nowhere"),
        "./nowhere",
        "~/nowhere-at-all",
    ):
        for load in (load_backbone, backbone_config, load_tokenizer):
            with pytest.raises(BadInput, match="backbone.*no such folder.*nowhere"):
                load(source)
    with pytest.raises(BadInput, match="no config.json"):
        load_backbone(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match="holds an adapter"):
        load_backbone(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(BadInput, match="JSON"):
        backbone_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(BadInput) as caught:
        backbone_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_tokenizer(saved):
    with pytest.raises(BadInput, match="no tokenizer in it"):
        load_tokenizer(saved)


def test_missing_weights_are_refused(saved):
    edit_weights(saved, lambda weights: weights.pop("model.layers.5.mlp.up_proj.weight"))
    with pytest.raises(BadInput, match=r"1 of its weights are missing \(model.layers.5"):
        load_backbone(saved)


def test_config_deeper_or_shallower_than_the_weights_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    for depth, what in ((8, "missing"), (4, "unexpected")):
        changed = config | {"num_hidden_layers": depth, "layer_types": ["full_attention"] * depth}
        (saved / "config.json").write_text(json.dumps(changed))
        with pytest.raises(BadInput, match=f"weights are {what}"):
            load_backbone(saved)


def test_unexpected_weights_are_refused_unless_harmless(saved):
    edit_weights(
        saved,
        lambda weights: weights.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        ),
    )
    load_backbone(saved)
    edit_weights(saved, lambda weights: weights.update({"model.extra.weight": torch.ones(4)}))
    with pytest.raises(BadInput, match=r"unexpected \(model.extra.weight\)"):
        load_backbone(saved)


def test_tied_head_is_not_missing(make_model, tmp_path):
    make_model("gpt2").float().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_backbone(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_wrong_shape_and_corrupt_file_are_refused(saved):
    original = (saved / "model.safetensors").read_bytes()
    edit_weights(saved, lambda weights: weights.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(BadInput, match="backbone") as caught:
        load_backbone(saved)
    assert "\n" not in str(caught.value)
    (saved / "model.safetensors").write_bytes(original[: len(original) // 2])
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_backbone(saved)


@pytest.mark.usefixtures("no_network")
def test_unreachable_id_is_one_line(monkeypatch):
    for load in (load_backbone, backbone_config, load_tokenizer):
        with pytest.raises(BadInput, match="backbone: 'nobody/nothing-here'") as caught:
            load("nobody/nothing-here")
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_remote_code_needs_a_revision():
    with pytest.raises(BadInput, match="revision"):
        load_backbone("nobody/nothing-here", trust_remote_code=True)
    with pytest.raises(BadInput, match="backbone"):
        load_backbone("nobody/nothing-here", trust_remote_code=True, revision="abc")


# Revisions: a branch is looked up once, a commit is loaded whatever the branch does later.

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
    monkeypatch.setattr("depthprobe.models.sources.offline", lambda source: True)
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


@pytest.mark.parametrize("whole", [True, False])
def test_a_head_that_alone_is_missing_is_tied(saved, caplog, tmp_path, whole):
    """As in checkpoints of embedding models, with or without the prefix of the base model."""
    full = load_backbone(saved)
    assert not full.config.tie_word_embeddings
    weights = full.model.state_dict()
    for prefix in ("model.", ""):
        named = {prefix + name: value for name, value in weights.items()}
        save_file(named, saved / "model.safetensors", metadata={"format": "pt"})
        model = load_backbone(saved, weights=whole)
        assert "no language-model head; the embeddings are used" in caplog.text
        caplog.clear()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    if whole:
        assert all(torch.equal(value, weights[n]) for n, value in model.model.state_dict().items())
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(weight(load_backbone(tmp_path / "again")), weight(model))
        assert not caplog.text
    del named["layers.2.mlp.up_proj.weight"]
    save_file(named, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="2 of its weights are missing"):
        load_backbone(saved, weights=whole)


def test_an_adapter_beside_the_weights_is_never_taken_in(saved):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(load_backbone(saved), LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(saved)
    for load in (load_backbone, backbone_config):
        with pytest.raises(BadInput, match="an adapter is beside its weights"):
            load(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": None},
        {"num_hidden_layers": "six"},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 6.5},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 10**9},
        {"text_config": {"n_layers": 10**9}},
        {"num_attention_heads": 0},
        {"hidden_act": "no-such-function"},
        {"vocab_size": 10**30},
        {"pad_token_id": 10**6},
        {"dtype": "float99"},
        {"rope_parameters": {"rope_type": "spiral"}},
        {"layer_types": ["full_attention"]},
    ],
    ids=lambda changes: str(changes)[1:40],
)
def test_a_configuration_that_makes_no_model_is_one_line(saved, edit_config, changes):
    edit_config(saved, **changes)
    with pytest.raises(BadInput, match="backbone: ") as caught:
        load_backbone(saved)
    assert "\n" not in str(caught.value)


def test_a_relative_folder_is_found_from_elsewhere(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved.parent)
    settings = Backbone(source="saved")
    revision, model = backbone_revision(settings), pretrained(settings, weights=False)
    source = describe(model, "saved", revision)["source"]
    assert source == str(saved)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert backbone_revision(pinned(settings, revision, source)) == revision
    # moved: the hub is not asked for what was a folder
    for moved in (pinned(settings, revision, str(tmp_path / "gone")), pinned(settings, revision)):
        with pytest.raises(BadInput, match="no such folder"):
            pretrained(moved)


def test_the_embedded_backbone_is_hashed_in_memory(tmp_path, monkeypatch):
    (tmp_path / "embedded").mkdir()  # a folder of that name is not meant
    monkeypatch.chdir(tmp_path)
    first = backbone_revision(Backbone())
    assert first == backbone_revision(Backbone(dtype="bfloat16"))
    changed = embedded_backbone()
    weight(changed).data[0, 0] += 1
    monkeypatch.setattr("depthprobe.models.backbones.embedded_backbone", lambda: changed)
    assert backbone_revision(Backbone()) != first


def described(settings, revision):
    return describe(pretrained(settings, weights=False), settings.source, revision)


def test_what_is_recorded(make_model):
    found = described(Backbone(dtype="bfloat16"), "sha256:0")
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
    recorded = described(HUB, OLD)
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
        described(HUB, OLD)
    assert "\n" not in str(caught.value)


def test_an_architecture_without_blocks_is_refused_before_a_run_begins(tmp_path):
    tiny_model(family_config("xlm"), depth=2).save_pretrained(tmp_path)
    for use in (pretrained, lambda settings: described(settings, "sha256:0")):
        with pytest.raises(BadInput, match="more than one list of blocks"):
            use(Backbone(source=str(tmp_path)))


# Code beside a checkpoint: it runs where it is trusted, and nobody is asked.

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class PlantedConfig(LlamaConfig):
    model_type = "planted"
class PlantedModel(LlamaForCausalLM):
    config_class = PlantedConfig
class PlantedTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAP = {"AutoConfig": "code.PlantedConfig", "AutoModelForCausalLM": "code.PlantedModel"}


@pytest.fixture
def planted(saved, tmp_path, monkeypatch, edit_config):
    """A folder whose files name Python code beside them; the code leaves a marker where it runs."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    marker = tmp_path / "marker"
    (saved / "code.py").write_text(CODE.format(marker=str(marker)))
    edit_config(saved, auto_map=MAP)
    return saved, marker


def test_code_in_a_folder_is_not_run_and_nobody_is_asked(planted, edit_config):
    folder, marker = planted
    edit_config(folder, model_type="planted")
    for load in (load_backbone, backbone_config):
        with pytest.raises(BadInput, match="contains custom code") as caught:
            load(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="contains custom code"):
        load_backbone(folder, random_init=0)
    assert not marker.exists()


def test_code_for_a_family_that_transformers_has_is_left_aside(planted):
    folder, marker = planted
    assert type(load_backbone(folder)).__name__ == "Qwen3ForCausalLM"
    assert type(load_backbone(folder, random_init=0)).__name__ == "Qwen3ForCausalLM"
    assert not marker.exists()


def test_code_of_a_tokenizer_is_not_run_and_nobody_is_asked(planted, edit_config):
    folder, marker = planted
    edit_config(folder, model_type="planted")
    embedded_tokenizer().save_pretrained(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    written |= {
        "tokenizer_class": "PlantedTokenizer",
        "auto_map": {"AutoTokenizer": [None, "code.PlantedTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    try:
        load_tokenizer(folder)
    except BadInput as error:
        assert "\n" not in str(error)  # noqa: PT017 - refusing and leaving aside are both right
    assert not marker.exists()


def test_code_is_run_where_it_is_trusted(planted, edit_config):
    """The planted code works: what keeps it from running is the missing trust."""
    folder, marker = planted
    edit_config(folder, model_type="planted")
    config = backbone_config(folder, trust_remote_code=True)
    assert type(config).__name__ == "PlantedConfig"
    assert marker.exists()
