"""The guide to a model from the Hub: its study runs, with a tiny model of the same architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from depthprobe.cost.table import Workload, cost_table
from depthprobe.study import Study, load_study, override

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "hub-model.md").read_text(encoding="utf-8")
SHAPES = ROOT / "analyses" / "cost_curve"


@pytest.fixture(scope="session")
def tiny_llama(shared_folder: Callable[..., Path]) -> Path:
    """Llama 3.2 1B with random weights and narrow blocks."""
    import torch

    from depthprobe.cost.table import random_backbone
    from depthprobe.models.backbones import backbone_config
    from depthprobe.models.embedded import embedded_tokenizer

    def make(folder: Path) -> None:
        config = backbone_config(SHAPES / "llama-3.2-1b")
        narrow = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
        few = {"num_attention_heads": 4, "num_key_value_heads": 1}
        config.update(narrow | few | {"vocab_size": 259})  # the embedded tokenizer's
        random_backbone(config, "bfloat16", torch.device("cpu")).save_pretrained(folder)
        embedded_tokenizer().save_pretrained(folder)

    return shared_folder("tiny-llama", make)


@pytest.fixture
def study(tmp_path: Path, small_inputs: Path, tiny_llama: Path) -> Study:
    """The page's own, on a processor, a small log and the tiny model."""
    (text,) = re.findall(r"```toml\n(.*?)```", GUIDE, flags=re.DOTALL)
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    here = {"data.source": str(small_inputs / "log.txt"), "backbone.source": str(tiny_llama)}
    return override(load_study(tmp_path / "study.toml"), device="cpu", **here)


def test_the_study_of_the_page_is_planned(study: Study, tmp_path: Path) -> None:
    from depthprobe.runs.layout import read_inputs

    inputs = read_inputs(study, tmp_path / "run", dry=True)
    assert inputs.blocks == 16
    assert inputs.config.rope_parameters["rope_type"] == "llama3"
    assert {trial.depth for task in inputs.tasks for trial in task.trials} >= {1, 2, 4, 8, 16}


@pytest.mark.slow
def test_the_study_of_the_page_runs(study: Study, tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    import depthprobe as dp
    from depthprobe.runs.export import export_trial

    one = {"recipe.epochs": 1, "sasrec.recipe.epochs": 1, "recipe.learning_rate": 3e-4}
    short = override(study, seeds=1, **one)
    run = dp.run_sweep(short, tmp_path / "run", jobs=0)
    assert run.failed == []
    assert set(run.trials["method"]) == set(study.methods)
    small = dp.load_backbone(export_trial(run.path, "finetune-d04-s0", tmp_path / "small"))
    first, before = (m.model.layers[0] for m in (small, dp.load_backbone(tiny_llama)))
    assert (len(small.model.layers), small.dtype) == (4, torch.bfloat16)
    for part in ("self_attn.q_proj", "mlp.up_proj"):
        assert not torch.equal(first.get_submodule(part).weight, before.get_submodule(part).weight)


@pytest.mark.parametrize(
    "shape", ["llama-3.2-1b", pytest.param("llama-3.1-8b", marks=pytest.mark.slow)]
)
def test_the_memory_of_the_page_is_what_is_counted(shape: str) -> None:
    table = cost_table(str(SHAPES / shape), "4", workload=Workload(tuning="lora", seconds=0))
    for row in table.itertuples():
        small = f"{row.optimizer_bytes / 1e9:.2f}".removeprefix("0")
        parameters = f"{row.parameters / 1e9:.2f} billion".removeprefix("0")
        held = f"{row.bytes / 1e9:.3g} GB"
        assert f"| {row.depth} | {parameters} | {held} | {small} GB |" in GUIDE
