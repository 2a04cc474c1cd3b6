"""Loading backbones: every source, what is refused, revisions, code beside a checkpoint, bits."""

from __future__ import annotations

import builtins
import copy
import hashlib
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
    embedded_backbone,
    embedded_config,
    embedded_tokenizer,
    is_folder,
    is_same,
    load_backbone,
    load_tokenizer,
    pinned,
    pinned_now,
    pretrained,
    resolve_revision,
)
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.families import family_config
from depthprobe.models.skipping import after_blocks
from depthprobe.models.taps import tap_blocks
from depthprobe.models.tiny import tiny_model
from depthprobe.study import Backbone


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


def test_bad_dtype():
    with pytest.raises(BadInput, match="dtype: expected .*bfloat16.*'int8'"):
        load_backbone("embedded", dtype="int8")


@pytest.mark.parametrize(
    ("has", "parameters", "expected"),
    [
        ({"avx512_bf16": True}, 10**8, "bfloat16"),
        ({"amx_bf16": True}, 10**8, "bfloat16"),
        ({"bf16": True}, 10**8, "bfloat16"),  # ARM
        ({"avx512_bf16": True}, 10**6, "float32"),
        ({"avx512_bf16": False, "avx2": True}, 10**8, "float32"),
        ({}, 10**8, "float32"),
    ],
)
def test_precision_follows_from_the_hardware_and_the_size(monkeypatch, has, parameters, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert module.precision_on(torch.device("cpu"), parameters) == expected
    assert module.precision_on(torch.device("mps"), parameters) == "float32"


def test_blocks_in_bfloat16_stay_so_when_cut_copied_or_tapped(make_model):
    model = make_model("llama").float().eval()
    ids = torch.arange(12).view(2, 6) % 7
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            expected = model.model(input_ids=ids).last_hidden_state
        module.compute_in_bfloat16(model)
        with tap_blocks(model) as tap:
            found = model.model(input_ids=ids).last_hidden_state
        states = tap.states
        assert torch.equal(found, expected)
        assert {state.dtype for state in states} == {torch.float32}
        shallow = copy.deepcopy(model)
        keep_blocks(shallow, [0])
        one = shallow.model(input_ids=ids).last_hidden_state
        assert torch.equal(one, after_blocks(model, states[1]))
        for block in find_blocks(model):
            block.forward = None  # it raises where it is called
        with pytest.raises(TypeError):
            model(input_ids=ids)
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.equal(exact, model.lm_head(expected))


def test_what_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_folder("gpt2")
    assert not is_folder("org/model")
    for path in ("a/b/c", "./gpt2", "../gpt2", "~/gpt2", "/gpt2", "my model", "gpt2/", "C:\\gpt2"):
        assert is_folder(path), path
    assert is_folder(Path("gpt2"))
    Path("org/model").mkdir(parents=True)
    assert is_folder("org/model")


@pytest.mark.parametrize("random_init", [None, 0])
@pytest.mark.parametrize(
    ("asked", "found"),
    [(None, "sdpa"), ("auto", "sdpa"), ("eager", "eager"), ("flex_attention", "flex_attention")],
)
def test_attention(saved, asked, found, random_init):
    for source in (saved, "embedded"):
        model = load_backbone(source, attention=asked, random_init=random_init)
        assert model.config._attn_implementation == found


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
    monkeypatch.setattr("depthprobe.models.backbones.is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("depthprobe.models.backbones.is_flash_attn_3_available", lambda: False)
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


# Weights of 8 or 4 bits.


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
@pytest.mark.parametrize(("package", "gpu"), [(False, False), (True, False), (False, True)])
def test_quantising_needs_the_package_and_a_gpu(saved, monkeypatch, quantize, package, gpu):
    here = "depthprobe.models.backbones"
    monkeypatch.setattr(f"{here}.is_bitsandbytes_available", lambda: package)
    monkeypatch.setattr(f"{here}.torch.cuda.is_available", lambda: gpu)
    with pytest.raises(
        BadInput, match=r"pip install 'depthprobe\[quantize\]'.* CUDA GPU"
    ) as caught:
        load_backbone(saved, quantize=quantize)
    assert "\n" not in str(caught.value)


def test_what_can_not_be_quantised(saved, monkeypatch, edit_config):
    with pytest.raises(BadInput, match="quantize: expected one of none, 8bit, 4bit, got '2bit'"):
        load_backbone(saved, quantize="2bit")
    for source, seed in ((saved, 0), ("embedded", None), ("embedded", 0)):
        with pytest.raises(BadInput, match="quantize.*random ones"):
            load_backbone(source, quantize="4bit", random_init=seed)
    pretend_a_gpu(monkeypatch)
    edit_config(saved, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(BadInput, match="not quantised already"):
        load_backbone(saved, quantize="4bit")
    load_backbone("embedded", quantize="none")


def pretend_a_gpu(monkeypatch):
    here = "depthprobe.models.backbones"
    monkeypatch.setattr(f"{here}.is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(f"{here}.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(f"{here}.torch.cuda.current_device", lambda: 1)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_what_transformers_is_asked_for(saved, monkeypatch, quantize):
    pretend_a_gpu(monkeypatch)
    model = load_backbone(saved)
    model.is_loaded_in_4bit = quantize == "4bit"
    seen = {}

    def from_pretrained(source, **arguments):
        seen.update(arguments, source=source)
        nothing = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return model, nothing

    monkeypatch.setattr(
        "depthprobe.models.backbones.AutoModelForCausalLM.from_pretrained", from_pretrained
    )
    settings = Backbone(
        source=str(saved), dtype="bfloat16", attention="eager", quantize=quantize, tuning="lora"
    )
    assert pretrained(settings) is model
    # the base model is what a recommender holds, and what peft asks
    assert model.base_model.is_loaded_in_4bit == (quantize == "4bit")
    packed = seen["quantization_config"]
    assert (packed.load_in_8bit, packed.load_in_4bit) == (quantize == "8bit", quantize == "4bit")
    if quantize == "4bit":
        assert packed.bnb_4bit_quant_type == "nf4"
        assert packed.bnb_4bit_compute_dtype == torch.bfloat16
    assert seen["device_map"] == {"": 1}
    assert seen["attn_implementation"] == "eager"
    assert seen["dtype"] == torch.bfloat16
    assert seen["use_safetensors"] is True
    assert seen["trust_remote_code"] is False
    assert pretrained(Backbone(source=str(saved))) is model


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
    monkeypatch.setattr(module, "offline", lambda source: True)
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
    assert torch.equal(weight(load_backbone(saved)), weight(whole))
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
    name = "model.layers.4.self_attn.k_norm.weight"

    def damage(weights):
        weights[name] = weights[name].to(dtype)
        weights[name][-1] = value

    edit_weights(saved, damage)
    with pytest.raises(BadInput, match=f"{name} holds NaN or infinity"):
        load_backbone(saved, weights=whole)


def test_numbers_that_a_type_can_not_hold_are_named(saved):
    edit_weights(saved, lambda weights: weights["model.norm.weight"].fill_(1e6))
    load_backbone(saved)
    with pytest.raises(BadInput, match="model.norm.weight holds NaN or infinity"):
        load_backbone(saved, dtype="float16")


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
