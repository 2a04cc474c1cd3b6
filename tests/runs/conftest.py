"""One small run, made once: sixty users, a three-block backbone, every method, some variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.models.backbones import embedded_tokenizer
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import (
    METHODS,
    Backbone,
    Cost,
    Data,
    Distillation,
    Protocol,
    Recipe,
    SasRecSettings,
    Study,
    Variant,
)


def write_log(path: Path, users: int = 60, items: int = 40) -> Path:
    """Items count up from a random start: easily learnt."""
    rng = np.random.default_rng(0)
    lines = []
    for user in range(users):
        start, length = rng.integers(items), rng.integers(5, 12)
        lines.append(f"u{user} " + " ".join(f"i{(start + k) % items}" for k in range(length)))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_backbone(path: Path, config: LlamaConfig) -> Path:
    """A folder as `save_pretrained` leaves it, tokenizer included."""
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    embedded_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def study(
    tmp_path_factory: pytest.TempPathFactory, llama_config: Callable[..., LlamaConfig]
) -> Study:
    folder = tmp_path_factory.mktemp("inputs")
    config = llama_config(num_hidden_layers=3, vocab_size=259)  # the embedded tokenizer's
    few = Recipe(epochs=3, batch_size=16, learning_rate=0.01)
    return Study(
        name="small",
        layers="1,2",
        methods=(*METHODS, "finetune:angular", "heal:greedy", "distill:logits", "distill:top"),
        variants={
            "logits": Variant(
                distillation=Distillation(cosine=0, norm=0, supervision=0, logits=1, init="teacher")
            ),
            "top": Variant(
                select="1",
                distillation=Distillation(logits=1, top=5, features="online", init="random"),
            ),
        },
        seeds=2,
        device="cpu",
        data=Data(source=str(write_log(folder / "log.txt")), max_history=10),
        backbone=Backbone(source=str(write_backbone(folder / "backbone", config)), prompt="Next:"),
        sasrec=SasRecSettings(width=8, blocks=1, dropout=0.1, recipe=few),
        recipe=few,
        protocol=Protocol(resamples=100),
        cost=Cost(batch_size=16, warmup=1, rounds=3),
    )


@pytest.fixture(scope="session")
def small_run(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_sweep(study, tmp_path_factory.mktemp("runs") / "small", jobs=0, command="test")


@pytest.fixture
def tiny(study: Study) -> Study:
    """Two quick trials."""
    return replace(study, methods=("popularity", "sasrec"), seeds=1)
