"""Parameters, split into what depth changes and what it doesn't."""

from __future__ import annotations

from torch import nn

from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of weights: blocks, token_embeddings, adapters, item_table, total, trainable.

    Adapters are everything of a recommender that is none of the other three: a linear head and the
    final norm included. Weights that two modules share count once.
    """
    total = {id(p): p.numel() for p in model.parameters()}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts: dict[str, nn.Module | None] = {"blocks": None, "token_embeddings": None}
    if isinstance(model, Recommender):
        parts["blocks"] = find_blocks(model.backbone)
        parts["token_embeddings"] = model.backbone.get_input_embeddings()
    elif isinstance(getattr(model, "blocks", None), nn.Module):
        parts["blocks"] = model.blocks  # type: ignore[assignment]
    items = getattr(model, "items", None)
    parts["item_table"] = items if isinstance(items, nn.Module) else None
    counts = {
        name: 0 if part is None else sum(total.pop(id(p), 0) for p in part.parameters())
        for name, part in parts.items()
    }
    everything = sum(p.numel() for p in model.parameters())
    return {
        "blocks": counts["blocks"],
        "token_embeddings": counts["token_embeddings"],
        "adapters": sum(total.values()),
        "item_table": counts["item_table"],
        "total": everything,
        "trainable": trainable,
    }
