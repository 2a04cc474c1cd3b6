"""Tiny random models of many families, in float64, with weights large enough to matter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import PreTrainedModel

from depthprobe.models.families import family_config
from depthprobe.models.tiny import tiny_model

BLOCKS = 6
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"] * 2
# Families whose every subset of blocks can be cut. The self-test's slow run covers all others.
FREE = (
    "llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "gpt_neo", "falcon", "bloom",
    "mpt", "gptj", "phi", "gemma2", "gemma3_text", "olmo2", "stablelm", "starcoder2", "cohere",
    "mixtral", "gemma", "granitemoe", "nemotron", "gpt_bigcode", "codegen", "biogpt", "qwen2_moe",
    "qwen3_moe", "deepseek_v3", "smollm3", "llama4_text",
)  # fmt: skip
# Families where some cuts must be refused.
BOUND = ("gpt2_scaled", "qwen3_next", "mamba", "lfm2", "bert", "jamba", "gemma3n_text")
# Of six blocks, those that differ.
CHANGES: dict[str, dict[str, Any]] = {
    "bloom": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 4},
    "gemma3_text": {"layer_types": PATTERN},
    "qwen2_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [0, 3]},
    "deepseek_v3": {"first_k_dense_replace": 2},
    "smollm3": {"no_rope_layer_interval": 3},
    "llama4_text": {"moe_layers": [1, 3, 5]},
    "gpt2_scaled": {"scale_attn_by_inverse_layer_idx": True},
    "qwen3_next": {"layer_types": (["linear_attention"] * 2 + ["full_attention"]) * 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2},
    "gemma3n_text": {"layer_types": PATTERN, "num_kv_shared_layers": 2,
      "activation_sparsity_pattern": [0.0] * BLOCKS},
}  # fmt: skip


# Run with every change. The other families are slow: ``make test-all`` runs them.
ALWAYS = {"llama", "gpt2", "opt", "gemma2", "gemma3n_text", "qwen3_moe", "mamba", "falcon"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with a ``family`` argument once for each family that can be cut freely."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", sorted(FREE))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is parametrized with one of the other families as slow."""
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent == Path(__file__).parent:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            names = {params.get("family"), params.get("name")}
            if names & ({*FREE, *BOUND} - ALWAYS):
                item.add_marker("slow")


@cache
def _build(family: str, seed: int) -> PreTrainedModel:
    changes = {"num_hidden_layers": BLOCKS} | CHANGES[family] if family in CHANGES else {}
    model = tiny_model(family_config(family.removesuffix("_scaled"), **changes), depth=BLOCKS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + seed)
    return model


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """``make_model(family, seed=0)``: a fresh copy of the tiny model."""
    return lambda family, seed=0: copy.deepcopy(_build(family, seed))


@pytest.fixture
def saved(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint of Qwen 3 in a folder, float32."""
    folder = tmp_path / "saved"
    make_model("qwen3").float().save_pretrained(folder)
    return folder


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """``edit_config(folder, field=value)``: a configuration as somebody else wrote it."""

    def edit(folder: Path, **changes: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids, (2, 9): longer than the sliding windows."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 60, (2, 9), generator=generator)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Its state is one a process: none comes in from other tests, none goes out to them."""
    for last in (False, True):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # accelerate has no public way
        if not last:
            yield
