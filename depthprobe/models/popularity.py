"""The popularity baseline: every user gets the items that the training parts hold most often."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class Popularity(nn.Module):
    """Scores are counts in the training interactions; nothing is learned from the history."""

    counts: Tensor

    def __init__(self, items: np.ndarray, n_items: int) -> None:
        """Count training interactions, item ids 1..I of shape (N,)."""
        super().__init__()
        counts = np.bincount(items, minlength=n_items + 1).astype(np.float32)
        self.register_buffer("counts", torch.from_numpy(counts)[:, None])

    def item_matrix(self) -> Tensor:
        """Counts, (I + 1, 1)."""
        return self.counts

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """One for every user, (B, 1)."""
        return torch.ones(len(histories), 1, device=histories.device)
