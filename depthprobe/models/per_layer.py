"""Per-layer embeddings (Gemma 3n and 4): what every block reads of a token beside the stream.

They are looked up by token; a pass over embeddings has none to look up, so it is given the ids.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def has_per_layer(decoder: nn.Module) -> bool:
    """Whether the blocks of a decoder read embeddings of their own."""
    return bool(getattr(decoder, "hidden_size_per_layer_input", 0))


def per_layer(decoder: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The argument of a pass over the embeddings of tokens (B, T); none for other decoders."""
    if not has_per_layer(decoder):
        return {}
    known: Any = decoder
    return {"per_layer_inputs": known.get_per_layer_inputs(ids)}  # (B, T, L, width of each)


def no_token(decoder: nn.Module) -> int:
    """The id that stands for what is no token: padding, as for images in these families."""
    config: Any = decoder.config
    return int(config.get_text_config(decoder=True).pad_token_id or 0)
