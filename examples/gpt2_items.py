"""A GPT-2 whose tokens are items: token 0 pads, token i + 1 is the i-th item of a vocabulary.

python -m examples.gpt2_items LOG FOLDER
GPT2_ITEMS=FOLDER depthprobe sweep --recommender examples.gpt2_items:build --data LOG
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

import depthprobe as dp


class GPT2OverItems(nn.Module):
    """What depthprobe asks of a recommender."""

    def __init__(self, model: GPT2LMHeadModel, item_ids: list[str]) -> None:
        super().__init__()
        self.backbone = model
        self.item_ids = item_ids

    def states(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """States behind the final norm, (B, T) tokens -> (B, T, D)."""
        return self.backbone.transformer(input_ids=histories).last_hidden_state

    def item_matrix(self) -> Tensor:
        """What states are scored against, (items + 1, D)."""
        return self.backbone.lm_head.weight

    def save(self, folder: Path) -> None:
        """Write what ``build`` reads."""
        self.backbone.save_pretrained(folder)
        (folder / "items.json").write_text(json.dumps(self.item_ids), encoding="utf-8")


def build() -> GPT2OverItems:
    """The trained recommender."""
    folder = Path(os.environ.get("GPT2_ITEMS", "build/gpt2-items"))
    items = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    return GPT2OverItems(GPT2LMHeadModel.from_pretrained(folder), items)


def train(log: str, folder: Path, *, blocks: int = 6, epochs: int = 20) -> None:
    """Stand for a training of your own: the next item, on all but each user's last two."""
    torch.manual_seed(0)
    data = dp.prepare_data(log)
    config = GPT2Config(
        vocab_size=data.n_items + 1, n_positions=50, n_embd=64, n_layer=blocks, n_head=2
    )
    model = GPT2LMHeadModel(config)
    pairs = zip(data.offsets, data.offsets[1:], strict=False)
    histories = [data.items[start : end - 2][-51:] for start, end in pairs]
    histories = [torch.from_numpy(each.astype(np.int64)) for each in histories if len(each) > 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(histories)).split(64):
            rows = pad_sequence([histories[i] for i in chosen.tolist()], batch_first=True)
            logits = model(input_ids=rows[:, :-1]).logits
            loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1}: {total / len(histories):.4f}")
    folder.mkdir(parents=True, exist_ok=True)
    GPT2OverItems(model, [str(raw) for raw in data.item_ids]).save(folder)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
