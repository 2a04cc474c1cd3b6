"""SASRec (Kang and McAuley, 2018): the non-LLM baseline, and the source of the item embeddings.

Pre-norm blocks and full cross-entropy over the catalogue, which is what makes it a strong baseline
(gSASRec, RecSys 2023; eSASRec, RecSys 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, scaled_dot_product_attention

from depthprobe.models.recommender import last_positions


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
        drop = self.drop if self.training else 0.0
        a = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
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

    def forward(self, histories: Tensor) -> Tensor:
        """User vectors at every position, (B, T) right-padded item ids -> (B, T, width)."""
        # positions count back from nothing but the window's start: right padding keeps them aligned
        positions = torch.arange(histories.shape[1], device=histories.device)
        x = self.items(histories) * self.items.embedding_dim**0.5 + self.positions(positions)
        x = dropout(x, self.drop, self.training)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """User vectors after the last item, (B, T) and (B,) -> (B, width)."""
        return last_positions(self(histories), lengths)
