"""Analytic FLOPs of a recommender: encoding users, scoring the catalogue, an epoch of training.

A multiply-add is two. Every matrix of a dense block is used once a position; attention is not
halved for causality; norms, activations and the shared prompt (once a batch) are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender

BACKWARD = 2  # times the forward pass: a gradient for the input and one for the weights


def flops_per_user(model: Recommender, length: int, *, depth: int | None = None) -> int:
    """FLOPs of encoding one user and scoring the catalogue.

    Args:
        length: items in the history.
        depth: how many of the first blocks are used; None for all.
    """
    return encode_flops(model, np.array([length]), depth=depth) + score_flops(model, 1)


def encode_flops(model: Recommender, lengths: Any, *, depth: int | None = None) -> int:
    """FLOPs of encoding users with so many items each, (E,), into one vector a user.

    Args:
        depth: how many of the first blocks are used; None for all.
    """
    items = np.asarray(lengths, dtype=np.float64)
    blocks = list(find_blocks(model.backbone))[:depth]
    matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() == 2)
    config = model.backbone.config.get_text_config(decoder=True)
    varied = getattr(config, "is_heterogeneous", False)
    settings = config.per_layer_config if varied else [config] * len(blocks)
    behind = len(model.suffix)
    computed = items + behind + model.lead  # positions a user
    attended = items + behind + len(model.prompt)
    widths = sum(_attention_width(block) for block in settings[: len(blocks)])
    adapters = items * model.input_adapter.weight.numel()
    if model.output_adapter is not None:
        adapters += model.output_adapter.weight.numel()
    total = 2 * matrices * computed + 4 * computed * attended * widths + 2 * adapters
    return int(total.sum())


def score_flops(model: Recommender, vectors: float) -> int:
    """FLOPs of scoring every item for so many user vectors."""
    items, width = model.item_matrix().shape
    return int(2 * (items - 1) * width * vectors)


def epoch_flops(model: Recommender, lengths: Any, *, scored: float) -> int:
    """FLOPs of an epoch, forward and backward, as if every weight got a gradient.

    Args:
        lengths: items that are read of each training window, (windows,).
        scored: for how many vectors the loss scores the catalogue.
    """
    return (1 + BACKWARD) * (encode_flops(model, lengths) + score_flops(model, scored))


def _attention_width(config: PreTrainedConfig) -> int:
    """Heads times their size; 0 where there is no attention."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))
