"""SASRec (Kang and McAuley, 2018): the non-LLM baseline, and the source of the item embeddings.

Pre-norm blocks and full cross-entropy over the catalogue, which is what makes it a strong baseline
(gSASRec, RecSys 2023; eSASRec, RecSys 2025). Unlike theirs, attention weights are not dropped out:
the kernel that never holds them all is then used, and validation on Beauty was better without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from depthprobe.models.recommender import states_at

LEVELS = 2**16  # of the draws that dropout compares with its share


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """Zero a share of the entries and scale up the rest, any shape; the share is exact to 1/65,536.

    On a CPU five times as fast as torch's, which draws on one core, a 64-bit number an entry.
    """
    if not training or not share:
        return x
    if x.device.type != "cpu":
        return torch.nn.functional.dropout(x, share)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    words.random_(-(2**63), None)  # all 64 bits: the draws of four entries
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)
    keep = draws >= round(share * LEVELS) - LEVELS // 2
    return x * keep.to(x.dtype).mul_(1 / (1 - share))


class SasRecBlock(nn.Module):
    """Causal self-attention and a two-layer MLP, each on a normed input."""

    def __init__(self, width: int, heads: int, drop: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, drop
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        b, t, d = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        a = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + dropout(self.out(a.transpose(1, 2).reshape(b, t, d)), self.drop, self.training)
        h = self.down(gelu(self.up(self.norm_mlp(x))))
        return x + dropout(h, self.drop, self.training)


class SASRec(nn.Module):
    """Item and position embeddings, causal blocks, dot product with the same item table."""

    def __init__(
        self, n_items: int, *, width: int, blocks: int, heads: int, drop: float, longest: int
    ) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items + 1, width, padding_idx=0)
        self.positions = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList([SasRecBlock(width, heads, drop) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.drop = drop
        nn.init.normal_(self.positions.weight, std=0.02)
        with torch.no_grad():
            self.items.weight[1:].normal_(std=0.02)

    def item_matrix(self) -> Tensor:
        """What user vectors are scored against, (I + 1, width); row 0 is padding."""
        return self.items.weight

    def forward(self, histories: Tensor, lengths: Tensor | None = None) -> Tensor:
        """User vectors (B, T, width) at every position; (B, width) at the last if lengths say.

        Args:
            histories: (B, T) item ids, right-padded with 0.
            lengths: (B,), or None.
        """
        # positions count back from nothing but the window's start: right padding keeps them aligned
        positions = torch.arange(histories.shape[1], device=histories.device)
        x = self.items(histories) * self.items.embedding_dim**0.5 + self.positions(positions)
        x = dropout(x, self.drop, self.training)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x if lengths is None else states_at(x, lengths - 1))
        return normed

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """User vectors after the last item, (B, T) and (B,) -> (B, width)."""
        vectors: Tensor = self(histories, lengths)
        return vectors
