"""A SASRec of plain PyTorch, trained with a loss of its own: one random item against the next one.

SASREC=FOLDER depthprobe sweep --recommender examples.sasrec:build --data LOG
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid


class Block(nn.Module):
    """Causal attention and an MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class SASRec(nn.Module):
    """What depthprobe asks of a recommender; `blocks` is the list that is cut."""

    def __init__(
        self,
        item_ids: list[str],
        *,
        width: int = 32,
        blocks: int = 4,
        heads: int = 2,
        longest: int = 50,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.item_ids = item_ids
        self.items = nn.Embedding(len(item_ids) + 1, width, padding_idx=0)
        self.places = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    @property
    def backbone(self) -> nn.Module:
        """The module with the blocks: it is all one."""
        return self

    def states(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """States behind the final norm, (B, T) items, 0 pads on the right -> (B, T, D)."""
        t = histories.shape[1]
        x = self.items(histories) + self.places(torch.arange(t, device=histories.device))
        mask = torch.ones(t, t, dtype=torch.bool, device=histories.device).triu(1)  # True: unseen
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def item_matrix(self) -> Tensor:
        """What states are scored against, (items + 1, D)."""
        return self.items.weight

    def loss(self, histories: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        """The loss of its training: each target, (B, T), against one random item; 0 is none."""
        states = self.states(histories, lengths)
        others = torch.randint_like(targets, 1, len(self.items.weight))
        ahead = states * (self.items(targets) - self.items(others))  # (B, T, D)
        return -logsigmoid(ahead.sum(-1))[targets != 0].mean()

    def save(self, folder: Path) -> None:
        """Write what ``build`` reads."""
        save_file(self.state_dict(), folder / "sasrec.safetensors")
        shape = {"blocks": len(self.blocks), "width": self.items.weight.shape[1]}
        content = {"items": self.item_ids, "shape": shape}
        (folder / "sasrec.json").write_text(json.dumps(content), encoding="utf-8")


def build() -> SASRec:
    """The trained recommender."""
    folder = Path(os.environ.get("SASREC", "build/sasrec"))
    content = json.loads((folder / "sasrec.json").read_text(encoding="utf-8"))
    model = SASRec(content["items"], **content["shape"])
    model.load_state_dict(load_file(folder / "sasrec.safetensors"))
    return model
