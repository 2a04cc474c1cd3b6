"""Precision by hardware, kernels of attention, and weights packed in fewer bits."""

from __future__ import annotations

import copy

import pytest
import torch

from depthprobe.errors import BadInput
from depthprobe.models.backbones import (
    backbone_config,
    load_backbone,
    pretrained,
)
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.precision import compute_in_bfloat16, precision_on
from depthprobe.models.skipping import after_blocks
from depthprobe.models.taps import tap_blocks
from depthprobe.study import Backbone


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
    assert precision_on(torch.device("cpu"), parameters) == expected
    assert precision_on(torch.device("mps"), parameters) == "float32"


def test_blocks_in_bfloat16_stay_so_when_cut_copied_or_tapped(make_model):
    model = make_model("llama").float().eval()
    ids = torch.arange(12).view(2, 6) % 7
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            expected = model.model(input_ids=ids).last_hidden_state
        compute_in_bfloat16(model)
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


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
@pytest.mark.parametrize(("package", "gpu"), [(False, False), (True, False), (False, True)])
def test_quantising_needs_the_package_and_a_gpu(saved, monkeypatch, quantize, package, gpu):
    here = "depthprobe.models.precision"
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
    here = "depthprobe.models.precision"
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
