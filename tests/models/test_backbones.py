"""Loading backbones: the embedded default, folders, and every way a source can be wrong."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from depthprobe.errors import BadInput
from depthprobe.models.backbones import (
    backbone_config,
    embedded_backbone,
    embedded_config,
    embedded_tokenizer,
    is_folder,
    load_backbone,
    load_tokenizer,
)
from depthprobe.models.blocks import find_blocks


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise socket.gaierror("no name server")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("depthprobe.models.backbones.getproxies", dict)


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_embedded_is_deterministic_and_leaves_the_random_state():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, other = embedded_backbone(), load_backbone("embedded"), embedded_backbone(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    weight = first.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)
    assert len(find_blocks(first)) == embedded_config().num_hidden_layers == 12
    assert first.dtype == torch.float32


def test_embedded_tokenizer_round_trips_any_text():
    tokenizer = embedded_tokenizer()
    assert len(tokenizer) == embedded_config().vocab_size
    for text in ("Given the history: ", "  two  spaces\n\ttab", "naïve – 日本 🙂", "", "a</b>"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())
        assert all(3 <= index < len(tokenizer) for index in ids)
    padded = load_tokenizer("embedded")(["ab", "abcd"], padding=True, return_tensors="pt")
    assert padded["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert padded["input_ids"][0, 2:].tolist() == [embedded_config().pad_token_id] * 2


def test_embedded_tokenizer_survives_saving(tmp_path):
    embedded_tokenizer().save_pretrained(tmp_path)
    assert (
        load_tokenizer(tmp_path).decode(load_tokenizer(str(tmp_path))("é x")["input_ids"]) == "é x"
    )


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


def test_dtype_follows_the_checkpoint(make_model, tmp_path):
    make_model("llama").bfloat16().save_pretrained(tmp_path)
    assert load_backbone(tmp_path).dtype == torch.bfloat16


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
            with pytest.raises(BadInput, match="backbone.*nowhere.*no such folder"):
                load(source)
    with pytest.raises(BadInput, match="no config.json"):
        load_backbone(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match="holds an adapter"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(BadInput, match="not JSON"):
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


def test_bad_dtype():
    with pytest.raises(BadInput, match="dtype: 'int8'.*bfloat16"):
        load_backbone("embedded", dtype="int8")


def test_what_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_folder("gpt2")
    assert not is_folder("org/model")
    assert is_folder("a/b/c")
    assert is_folder("./gpt2")
    assert is_folder(Path("gpt2"))
    Path("org/model").mkdir(parents=True)
    assert is_folder("org/model")


def test_encoder_decoder_folder(tmp_path, saved):
    AutoConfig.for_model("t5", num_layers=1, d_model=8).save_pretrained(tmp_path)
    shutil.copy(saved / "model.safetensors", tmp_path)
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("random_init", [None, 0])
@pytest.mark.parametrize(
    ("asked", "found"),
    [(None, "sdpa"), ("auto", "sdpa"), ("eager", "eager"), ("flex_attention", "flex_attention")],
)
def test_attention(saved, asked, found, random_init):
    for source in (saved, "embedded"):
        model = load_backbone(source, attention=asked, random_init=random_init)
        assert model.config._attn_implementation == found


def test_attention_computes_the_same(saved, ids):
    with torch.no_grad():
        logits = [load_backbone(saved, attention=name)(ids).logits for name in ("eager", "sdpa")]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(
    "name", ["kernels-community/flash-attn2", "someone/kernel", "flash", "paged|eager", ""]
)
def test_attention_of_another_name_would_be_a_download(saved, name):
    for source in (saved, "embedded"):
        with pytest.raises(BadInput, match=r"^attention: .*eager, sdpa"):
            load_backbone(source, attention=name)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_needs_its_package(saved, monkeypatch, name, edit_config):
    """Without it transformers would fetch a kernel from the hub."""
    monkeypatch.setattr("depthprobe.models.precision.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("depthprobe.models.precision.is_flash_attn_3_available", lambda: False)
    for source in (saved, "embedded"):
        with pytest.raises(BadInput, match="package flash-attn installed and a CUDA GPU"):
            load_backbone(source, attention=name)
    edit_config(saved, attn_implementation=name)
    with pytest.raises(BadInput, match="package flash-attn"):
        load_backbone(saved)
    assert load_backbone(saved, attention="eager").config._attn_implementation == "eager"


def test_a_configuration_that_names_a_kernel_is_refused(saved, edit_config):
    edit_config(saved, attn_implementation="someone/kernel")
    for load in (load_backbone, backbone_config):
        with pytest.raises(BadInput, match="'someone/kernel'.*a kernel to download") as caught:
            load(saved)
        assert "\n" not in str(caught.value)
