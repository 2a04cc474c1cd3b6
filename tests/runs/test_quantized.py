"""A run on quantised weights, and its export; bitsandbytes computes on a processor, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.evaluation.ranks import evaluate
from depthprobe.models.backbones import pretrained
from depthprobe.models.build import build_recommender
from depthprobe.models.embedded import embedded_tokenizer
from depthprobe.models.export import load_recommender
from depthprobe.runs.context import Context
from depthprobe.runs.export import export_trial
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Study

pytest.importorskip("bitsandbytes", reason="in the extra dev")
METHODS = ("full", "early-exit", "finetune", "heal", "distill")


@pytest.fixture(params=[pytest.param("8bit", marks=pytest.mark.slow), "4bit"])
def quantized(
    study: Study,
    llama_config: Callable[..., LlamaConfig],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Study:
    if not torch.cuda.is_available():
        monkeypatch.setattr("depthprobe.models.precision.can_quantize", lambda: True)
        monkeypatch.setattr("torch.cuda.current_device", lambda: "cpu")
    # bitsandbytes packs rows and columns in blocks
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    source = write_backbone(tmp_path / "backbone", llama_config(vocab_size=259, **sizes))
    backbone = replace(
        study.backbone,
        source=str(source),
        quantize=request.param,
        tuning="lora",
        lora_rank=4,
    )
    recipe = replace(study.recipe, epochs=1)
    chosen = {"methods": METHODS, "layers": "1", "seeds": 1, "device": "auto", "recipe": recipe}
    return replace(study, backbone=backbone, **chosen)


def write_backbone(path: Path, config: LlamaConfig) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    embedded_tokenizer().save_pretrained(path)
    return path


def packed(model: nn.Module) -> int:
    """How many linear maps are stored in fewer bits."""
    return sum("bit" in type(m).__name__ and isinstance(m, nn.Linear) for m in model.modules())


def test_a_run_and_its_export(quantized: Study, tmp_path: Path) -> None:
    run = run_sweep(quantized, tmp_path / "run", jobs=0)
    assert not run.failed
    for trial in ("finetune-d01-s0", "heal-d01-s0", "early-exit-d02-s0", "full-d03-s0"):
        folder = export_trial(run.path, trial, tmp_path / trial)
        loaded = load_recommender(folder)
        assert packed(loaded.model) == 0
        assert "quantization_config" not in (folder / "config.json").read_text()
        context = Context(run.path, quantized)
        found = evaluate(loaded.model, context.test, device=torch.device("cpu"))["full"]
        users = run.users[(run.users["trial"] == trial) & (run.users["protocol"] == "full")]
        # the same weights, multiplied in float32 and not as the packed ones are
        assert spearmanr(found, users["rank"]).statistic > 0.9
        assert np.abs(found - users["rank"]).mean() < 2


def test_lora_sits_on_packed_weights(quantized: Study) -> None:
    items = torch.randn(9, 4)
    model = build_recommender(quantized.backbone, items, kept=(0, 2), seed=0)
    assert packed(model) == 2 * 7  # q, k, v, o, gate, up, down
    names = {type(m).__name__ for n, m in model.named_modules() if n.endswith("mlp.up_proj")}
    assert names == {"Linear8bitLt" if quantized.backbone.quantize == "8bit" else "Linear4bit"}
    assert model.depth == 2
    plain = pretrained(quantized.backbone, plain=True)
    assert packed(plain) == 0
    assert not getattr(plain.base_model, "is_quantized", False)
