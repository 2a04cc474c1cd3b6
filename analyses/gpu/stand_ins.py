"""What a rehearsal has in place of SmolLM2 and the logs: 30 tiny random blocks, sixty users.

    python analyses/gpu/stand_ins.py KIT

A log's items are drawn at random: nothing can be learnt from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.models.embedded import embedded_tokenizer


def main() -> None:
    kit = Path(sys.argv[1])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=259, max_position_embeddings=64, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(kit / "smollm2")
    embedded_tokenizer().save_pretrained(kit / "smollm2")
    random = np.random.default_rng(0)
    for name in ("ml-100k", "office"):
        folder = kit / "data" / name
        folder.mkdir(parents=True)
        users = [random.integers(1, 40, size=random.integers(5, 12)) for _ in range(60)]
        lines = [f"{user} {' '.join(map(str, items))}\n" for user, items in enumerate(users)]
        (folder / "sequences.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
