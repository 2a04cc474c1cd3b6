"""The prompt computed once and shared by every user of a batch, with gradients.

The prompt is the same for all users and a causal model's keys and values of it don't depend on what
follows, so they are computed at batch size 1 and broadcast. The gradient of the shared prompt is
then the sum over the users, which is what the padded layout computes too.

One thing differs in training: where a backbone has dropout (GPT-2's is 0.1), a pass draws one mask
for the prompt, the same for all its users; repeated prompts draw one each. The expected gradient is
the same, its variance larger.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from depthprobe.models.blocks import input_device, per_layer
from depthprobe.models.parts import evaluating
from depthprobe.models.taps import paused_taps

SHAREABLE = (DynamicLayer, DynamicSlidingWindowLayer)
# what a model calls its cache: from transformers 5.24 on, before, and before where it recurs
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class _Recorder(DynamicLayer):
    """Keeps the first keys and values it is given, (1, H, P, d), and says it is empty.

    So a block does the same when checkpointing runs it a second time.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """0, before and after."""
        return 0


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


def shared_prompt(
    backbone: PreTrainedModel, prompt: Tensor, *, first: int, order: Iterable[int] | None = None
) -> Cache:
    """Run the prompt once; returns a cache that any number of users can be appended to.

    Args:
        backbone: a causal decoder without its language-model head.
        prompt: token ids, (P,).
        first: the position id of the first token.
        order: as for :func:`sharing_cache`.
    """
    filled = recording_cache()
    embeddings: Any = backbone.get_input_embeddings()
    backbone(
        inputs_embeds=embeddings(prompt)[None],  # (1, P, D)
        position_ids=first + torch.arange(len(prompt), device=prompt.device)[None],
        **{cache_argument(backbone): filled},
        use_cache=True,
        **per_layer(backbone, prompt[None]),
    )
    return sharing_cache(filled, order)


def cache_argument(decoder: nn.Module) -> str:
    """The name of the argument by which a decoder is given a cache."""
    taken = inspect.signature(decoder.forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), "past_key_values")


def recording_cache() -> Cache:
    """A cache that keeps what a pass over a prompt puts into it, however often that is repeated."""
    return Cache(layer_class_to_replicate=_Recorder)


def sharing_cache(recorded: Cache, order: Iterable[int] | None = None) -> Cache:
    """What a recording cache has kept, for any number of users, each time as if for the first.

    Args:
        order: which of its blocks each block reads; None: its own.
    """
    layers: list[Any] = recorded.layers
    chosen = layers if order is None else [layers[index] for index in order]
    return Cache(layers=[_SharedLayer(layer.keys, layer.values) for layer in chosen])


def first_position(decoder: PreTrainedModel) -> int:
    """The position id that a decoder gives to the first token of a text, if none is given to it.

    0, but where a table of learned positions has a row for padding: the one after it (RoBERTa's).
    """
    config = decoder.config.get_text_config(decoder=True)
    tables = sum(isinstance(module, nn.Embedding) for module in decoder.modules())
    device = input_device(decoder)
    if tables < 2 or config.pad_token_id is None or device.type == "meta":
        return 0
    embeddings: Any = decoder.get_input_embeddings()
    width = embeddings.weight.shape[1]
    token = torch.ones(1, 1, width, dtype=decoder.dtype, device=device)
    beside = per_layer(decoder, torch.zeros(1, 1, dtype=torch.long, device=device))
    starts = [None, torch.tensor([[0]]), torch.tensor([[config.pad_token_id + 1]])]
    with torch.no_grad(), evaluating(decoder), paused_taps():
        own, zero, behind = (
            decoder(
                inputs_embeds=token,
                position_ids=None if start is None else start.to(device),
                use_cache=False,
                **beside,
            )[0]
            for start in starts
        )
    same = torch.equal(own, behind) and not torch.equal(own, zero)
    return int(config.pad_token_id) + 1 if same else 0


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
    given: dict[str, Any] = {cache_argument(decoder): filled}
    given |= per_layer(decoder, torch.zeros(1, 1, dtype=torch.long, device=device))
    with torch.no_grad(), evaluating(decoder), paused_taps():
        try:
            decoder(inputs_embeds=token, **given, use_cache=True)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return False  # it has no such cache
    layers: list[Any] = filled.layers
    lengths = [layer.get_seq_length() for layer in layers if layer.is_initialized]
    return lengths == [1] * config.num_hidden_layers
