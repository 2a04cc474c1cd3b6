"""Parameters, split into what depth changes and what it doesn't, and FLOPs a user."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

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


def flops_per_user(model: Recommender, length: int) -> int:
    """Analytic FLOPs of encoding one user and scoring the catalogue; a multiply-add is two.

    Every matrix of a dense block is used once a position; attention is not halved for causality;
    norms, activations and the shared prompt (once a batch) are left out.

    Args:
        length: items in the history.
    """
    blocks = find_blocks(model.backbone)
    matrices = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    config = model.backbone.config.get_text_config(decoder=True)
    varied = getattr(config, "is_heterogeneous", False)
    settings = config.per_layer_config if varied else [config] * len(blocks)
    behind = len(model.suffix)
    computed = length + behind + model.lead  # positions a user
    attended = length + behind + len(model.prompt)
    attention = sum(4 * computed * attended * _attention_width(block) for block in settings)
    adapters = length * model.input_adapter.weight.numel()
    if model.output_adapter is not None:
        adapters += model.output_adapter.weight.numel()
    scores = (len(model.items.weight) - 1) * model.item_matrix().shape[1]
    return int(2 * matrices * computed + attention + 2 * adapters + 2 * scores)


def _attention_width(config: PreTrainedConfig) -> int:
    """Heads times their size; 0 where there is no attention."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))
