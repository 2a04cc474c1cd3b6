"""The prompt computed once and shared by every user of a batch, with gradients.

The prompt is the same for all users and a causal model's keys and values of it don't depend on what
follows, so they are computed at batch size 1 and broadcast. The gradient of the shared
prompt is then the sum over the users, which is what the padded layout computes too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class _SharedLayer(DynamicLayer):
    """Keys and values of the prompt, (1, H, P, d); an update joins them and stores nothing.

    Storing nothing makes a pass over the blocks repeatable: probing replays blocks on the same
    prompt, and a plain cache would grow at every replay.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Prompt and new keys and values, (B, H, P + T, d)."""
        users = key_states.shape[0]
        prompt = cast("tuple[Tensor, Tensor]", (self.keys, self.values))
        keys, values = (part.expand(users, -1, -1, -1) for part in prompt)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def shared_prompt(backbone: nn.Module, embeddings: Tensor) -> Cache:
    """Run the prompt once; returns a cache that any number of users can be appended to.

    Args:
        backbone: a causal decoder without its language-model head.
        embeddings: the prompt's token embeddings, (1, P, D).
    """
    filled = DynamicCache()
    backbone(inputs_embeds=embeddings, past_key_values=filled, use_cache=True)
    layers: list[Any] = filled.layers
    return Cache(layers=[_SharedLayer(layer.keys, layer.values) for layer in layers])
