"""Run full sweeps, every depth with five seeds, for replay.py to search in.

    python analyses/find/record.py path/to/logs path/to/backbones runs/find [NAME ...]

The logs and backbones of shared folders; a sweep that is there already is continued. Two hours on
one core.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from depthprobe.methods import METHODS
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import override, study_from_dict

# name: log, backbone, users at most, other settings
RECORDINGS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "office-plaintext": ("office", "plaintext-3M", 600, {}),
    "embedded-12": ("embedded", "embedded", 600, {"recipe.learning_rate": 0.006}),
    "ml-100k-babyllama": ("ml-100k", "babyllama-1M", 943, {}),
    "embedded-random24": ("embedded", "random-24", 600, {"recipe.learning_rate": 0.004}),
    "ml-latest-plaintext": ("ml-latest-small", "plaintext-3M", 400, {}),
    "ml-100k-stories": ("ml-100k", "stories260K", 943, {}),
    "beauty-babyllama": ("amazon-beauty", "babyllama-1M", 2000, {}),
    "ml-1m-stories": ("ml-1m", "stories260K", 600, {}),
    "embedded-stories": ("embedded", "stories260K", 1500, {"recipe.learning_rate": 0.006}),
    "ml-latest-titles": ("ml-latest-small", "stories260K", 150, {"backbone.reads": "titles"}),
    "office-titles": ("office", "stories260K", 600, {"backbone.reads": "titles"}),
    "toys-babyllama": ("amazon-toys", "babyllama-1M", 2000, {}),
    "ml-100k-plaintext": ("ml-100k", "plaintext-3M", 300, {}),
    "embedded-plaintext": ("embedded", "plaintext-3M", 400, {}),
}
METHODS_RUN = ["popularity", "sasrec", "full", "early-exit", "readout", "finetune"]


def first_seed(name: str) -> None:
    """Let a probe look at the first seed alone: a search asks for no more of it."""
    method = METHODS[name]
    METHODS[name] = replace(method, trials=lambda r: [] if r.seed else method.trials(r))


def main() -> None:
    for probe in ("early-exit", "readout"):
        first_seed(probe)
    logs, backbones, output = (Path(name) for name in sys.argv[1:4])
    for name in sys.argv[4:] or RECORDINGS:
        log, backbone, users, more = RECORDINGS[name]
        source = backbone
        if backbone == "random-24":
            source = str(random_backbone(output / backbone, backbones / "stories260K"))
        elif backbone != "embedded":
            source = str(backbones / backbone)
        study = study_from_dict(
            {
                "name": name,
                "layers": "all",
                "methods": METHODS_RUN,
                "seeds": 5,
                "data": {
                    "source": log if log == "embedded" else str(logs / log),
                    "max_history": 8 if "titles" in name else 15,
                    "cleaning": {"users": users},
                },
                "backbone": {"source": source, "title_tokens": 8},
                "sasrec": {"recipe": {"epochs": 20, "patience": 4}},
                "recipe": {"epochs": 3, "batch_size": 64, "patience": 3, "learning_rate": 2e-3},
                "protocol": {"sampled": False},
                "cost": {"seconds": 2},
            }
        )
        run_sweep(
            override(study, **more), output / name, jobs=0
        )  # in this process: the methods are changed here
        print(name, flush=True)


def random_backbone(folder: Path, tokenizer: Path) -> Path:
    """A Llama of 24 narrow blocks that was never trained."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=96, num_hidden_layers=24,
            num_attention_heads=4, num_key_value_heads=4,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
