"""Code beside a checkpoint: it runs where it is trusted, and nobody is asked."""

from __future__ import annotations

import builtins
import json
import sys

import pytest

from depthprobe.errors import BadInput
from depthprobe.models.backbones import (
    backbone_config,
    embedded_tokenizer,
    load_backbone,
    load_tokenizer,
)

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
