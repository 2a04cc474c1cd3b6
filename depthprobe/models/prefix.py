"""The prompt computed once and shared by every user of a batch, with gradients.

The prompt is the same for all users and a causal model's keys and values of it don't depend on what
follows, so they are computed at batch size 1 and broadcast. The gradient of the shared
prompt is then the sum over the users, which is what the padded layout computes too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from depthprobe.models.blocks import input_device
from depthprobe.models.sublayers import evaluating
from depthprobe.models.tap import paused_taps

SHAREABLE = (DynamicLayer, DynamicSlidingWindowLayer)


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
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    backbone(
        inputs_embeds=embeddings, position_ids=positions, past_key_values=filled, use_cache=True
    )
    layers: list[Any] = filled.layers
    return Cache(layers=[_SharedLayer(layer.keys, layer.values) for layer in layers])


def can_share_prompt(decoder: PreTrainedModel) -> bool:
    """Whether all that a decoder remembers of a prompt is keys and values, one pair a block.

    A recurrence or a convolution keeps a state that every user changes, some families have caches
    of their own, and some ignore the cache they are given. Found out with one pass over one token;
    the model's random state, mode and taps stay as they are.
    """
    config = decoder.config.get_text_config(decoder=True)
    if any(type(layer) not in SHAREABLE for layer in DynamicCache(config=config).layers):
        return False
    filled = DynamicCache()
    embeddings: Any = decoder.get_input_embeddings()
    width, device = embeddings.weight.shape[1], input_device(decoder)
    token = torch.zeros(1, 1, width, dtype=decoder.dtype, device=device)
    with torch.no_grad(), evaluating(decoder), paused_taps():
        try:
            decoder(inputs_embeds=token, past_key_values=filled, use_cache=True)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return False  # it has no such cache
    layers: list[Any] = filled.layers
    lengths = [layer.get_seq_length() for layer in layers if layer.is_initialized]
    return lengths == [1] * config.num_hidden_layers
