"""SASRec (Kang and McAuley, 2018): the non-LLM baseline, and the source of the item embeddings.

The blocks are the authors', not today's pre-norm ones. It is trained with a softmax over the whole
catalogue, which makes it a strong baseline (gSASRec, RecSys 2023; arXiv 2402.06216). A window is
read as if padded in front to ``longest`` items, as the authors do, but no padding is computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from depthprobe.models.recommender import states_at

LEVELS = 2**16  # range of the draws that dropout compares with its share


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """Zero a share of the entries and scale up the rest, any shape; the share is exact to 1/65,536.

    On a CPU five times as fast as torch's, which draws a 64-bit number per entry on one core.
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
    """Causal self-attention with a norm only on the queries, and an MLP on normed states."""

    def __init__(self, width: int, heads: int, drop: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, drop
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        # a bias of keys would raise all scores of a query equally
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_normal_(linear.weight)
        for linear in (self.query, self.value, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(B, T, D), and the number of padding items before each window, (B,) -> (B, T, D)."""
        b, t, d = x.shape
        q, k, v = (
            each.view(b, t, self.heads, d // self.heads).transpose(1, 2)  # (B, H, T, d)
            for each in (self.query(self.norm_attention(x)), self.key(x), self.value(x))
        )
        later = torch.full((t, t), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // self.heads) + later  # (B, H, T, T)
        # Padding is attended to in the original: its states are 0, so its keys are 0 and its values
        # the bias. n equal keys are one, whose score is raised by log n; no padding by log 0.
        at_padding = padding.to(scores.dtype).log().view(b, 1, 1, 1).expand(b, self.heads, t, 1)
        v_pad = self.value.bias.view(self.heads, 1, -1)  # (H, 1, d)
        weights = torch.cat([at_padding, scores], dim=-1).softmax(-1)  # (B, H, T, 1 + T)
        weights = dropout(weights, self.drop, self.training)
        a = weights[..., 1:] @ v + weights[..., :1] * v_pad
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        x = self.norm_mlp(x)
        h = dropout(self.up(x), self.drop, self.training)
        return x + dropout(self.down(relu(h)), self.drop, self.training)


class SASRec(nn.Module):
    """Item and position embeddings, causal blocks, dot product with the same item table.

    With a ``table``, (I + 1, D), items are its frozen rows, mapped by a trained linear map.
    """

    def __init__(
        self,
        n_items: int,
        *,
        width: int,
        blocks: int,
        heads: int,
        drop: float,
        longest: int,
        table: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.items = nn.Embedding(n_items + 1, width, padding_idx=0)
        self.adapter: nn.Module = nn.Identity()
        self.positions = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList([SasRecBlock(width, heads, drop) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.drop = drop
        for own in (self.items, self.positions):
            nn.init.xavier_normal_(own.weight)
        with torch.no_grad():
            self.items.weight[0] = 0
        if table is not None:
            # a bias would add the same to all scores of a user, and to all positions
            self.adapter = nn.Linear(table.shape[1], width, bias=False)
            # so that rows of length 1 start as large as SASRec's own embeddings
            nn.init.normal_(self.adapter.weight, std=math.sqrt(2 / (n_items + 1 + width)))
            self.items = nn.Embedding.from_pretrained(table, freeze=True, padding_idx=0)

    def item_matrix(self) -> Tensor:
        """What user vectors are scored against, (I + 1, width); row 0 is padding."""
        matrix: Tensor = self.adapter(self.items.weight)
        return matrix

    def forward(self, histories: Tensor, lengths: Tensor | None = None) -> Tensor:
        """User vectors (B, T, width) at every position; (B, width) at the last if lengths say.

        Args:
            histories: (B, T) item ids, right-padded with 0.
            lengths: (B,), or None.
        """
        given = (histories != 0).sum(dim=1) if lengths is None else lengths
        padding = self.positions.num_embeddings - given  # (B,)
        # positions count back from the window's end, so its last item always has the same one
        places = torch.arange(histories.shape[1], device=histories.device) + padding[:, None]
        places = places.clamp(max=self.positions.num_embeddings - 1)  # right padding
        x = self.adapter(self.items(histories)) * self.width**0.5 + self.positions(places)
        x = dropout(x, self.drop, self.training)
        for block in self.blocks:
            x = block(x, padding)
        normed: Tensor = self.norm(x if lengths is None else states_at(x, lengths - 1))
        return normed

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """User vectors after the last item, (B, T) and (B,) -> (B, width)."""
        vectors: Tensor = self(histories, lengths)
        return vectors
