"""Backbones in 8 and 4 bits: what is asked for, what is refused."""

from __future__ import annotations

import pytest
import torch

from depthprobe.errors import BadInput
from depthprobe.models.backbones import load_backbone, pretrained
from depthprobe.study import Backbone


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
    with pytest.raises(BadInput, match="quantize: '2bit'.*one of none, 8bit, 4bit"):
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
