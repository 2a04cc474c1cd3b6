"""The prompt computed once and shared by every user of a batch, with gradients.

The prompt is the same for all users and a causal model's keys and values of it don't depend on what
follows, so they are computed at batch size 1 and broadcast. The gradient of the shared prompt is
then the sum over the users, which is what the padded layout computes too.

Training differs in one point: if a backbone has dropout (GPT-2's is 0.1), a pass draws one mask for
the prompt of all its users, where repeated prompts would draw one each. The expected gradient is
the same, its variance larger.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from depthprobe.models.blocks import evaluating, find_blocks, input_device, per_layer
from depthprobe.models.taps import paused_taps, standing_in

SHAREABLE = (DynamicLayer, DynamicSlidingWindowLayer)
# names of the cache argument: since transformers 5.24, before, and before for recurrent models
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

logger = logging.getLogger(__name__)


class _Recorder(DynamicLayer):
    """Keeps the first keys and values it is given, (1, H, P, d), but reports that it is empty.

    So a block computes the same when checkpointing runs it a second time.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values unchanged."""
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
        keys, values = (part.expand(users, -1, -1, -1) for part in prompt)  # (B, H, P, d)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def shared_prompt(backbone: PreTrainedModel, prompt: Tensor, *, first: int) -> Cache:
    """Run the prompt, token ids (P,), once; any number of users can continue from the cache.

    ``first`` is the position id of the first token.
    """
    recorded = recording_cache()
    embeddings: Any = backbone.get_input_embeddings()
    backbone(
        inputs_embeds=embeddings(prompt)[None],  # (1, P, D)
        position_ids=first + torch.arange(len(prompt), device=prompt.device)[None],  # (1, P)
        **{cache_argument(backbone): recorded},
        use_cache=True,
        **per_layer(backbone, prompt[None]),
    )
    return sharing_cache(recorded)


def cache_argument(decoder: nn.Module) -> str:
    """The name of a decoder's argument for the cache."""
    taken = inspect.signature(decoder.forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), "past_key_values")


def recording_cache() -> Cache:
    """A cache that keeps a prompt's keys and values, even if the pass is repeated."""
    return Cache(layer_class_to_replicate=_Recorder)


def sharing_cache(recorded: Cache, order: Iterable[int] | None = None) -> Cache:
    """A cache with what a recording cache has kept, which any number of passes can use.

    ``order`` says which of its blocks each block reads; None: its own.
    """
    layers: list[Any] = recorded.layers
    chosen = layers if order is None else [layers[index] for index in order]
    return Cache(layers=[_SharedLayer(layer.keys, layer.values) for layer in chosen])


class PromptOfStep:
    """A prompt that the parts of a training step share, although each has its own backward pass.

    The gradients of the parts stop at its keys and values and are added up there, in float32 at
    least; :meth:`backward` sends the sums through the prompt.
    """

    def __init__(self, cache: Cache) -> None:
        layers: list[Any] = cache.layers
        self._outputs: list[Tensor] = [each for one in layers for each in (one.keys, one.values)]
        self._stops = [
            each.detach().to(torch.promote_types(each.dtype, torch.float32))
            for each in self._outputs
        ]
        for output, stop in zip(self._outputs, self._stops, strict=True):
            stop.requires_grad_(output.requires_grad)
        pairs = zip(self._outputs, self._stops, strict=True)
        parts = iter([stop.to(output.dtype) for output, stop in pairs])
        #: what the parts continue from
        self.cache = Cache(layers=[_SharedLayer(*pair) for pair in zip(parts, parts, strict=True)])

    def backward(self) -> None:
        """Add the prompt's share to the gradients of the weights."""
        pairs = zip(self._outputs, self._stops, strict=True)
        sums = [(out, stop.grad.to(out.dtype)) for out, stop in pairs if stop.grad is not None]
        if sums:
            outputs, gradients = zip(*sums, strict=True)
            torch.autograd.backward(outputs, gradients)


def first_position(decoder: PreTrainedModel) -> int:
    """The position id that a decoder gives to the first token of a text, if none is given to it.

    0, but where a table of learned positions has a row for padding: the one after it (RoBERTa's).
    """
    config = decoder.config.get_text_config(decoder=True)
    tables = sum(isinstance(module, nn.Embedding) for module in decoder.modules())
    if tables < 2 or config.pad_token_id is None or input_device(decoder).type == "meta":
        return 0
    behind = int(config.pad_token_id) + 1
    # the same token without a position, at 0, and after the padding's row
    own, zero, after_padding = (_run_one_token(decoder, start)[0] for start in (None, 0, behind))
    same = torch.equal(own, after_padding) and not torch.equal(own, zero)
    return behind if same else 0


def can_share_prompt(decoder: PreTrainedModel) -> bool:
    """Whether a decoder remembers only keys and values of a prompt, one pair per block.

    If not, the reason is logged.
    """
    reason = _obstacle_to_sharing(decoder)
    if reason:
        logger.info("%s: the prompt is repeated for every user: %s", type(decoder).__name__, reason)
    return not reason


def _obstacle_to_sharing(decoder: PreTrainedModel) -> str:
    """Why a prompt can't be shared; empty if it can.

    A recurrence or a convolution keeps a state that every user changes, some families have caches
    of their own, and some ignore the cache they are given. Proved with one pass over one token.
    """
    config = decoder.config.get_text_config(decoder=True)
    own = DynamicCache(config=config).layers
    others = {type(layer).__name__ for layer in own if type(layer) not in SHAREABLE}
    if others:
        return f"its cache has layers that are no keys and values ({', '.join(sorted(others))})"
    cache = DynamicCache()
    try:
        _run_one_token(decoder, None, cache)
    except AttributeError as error:
        # a family with its own cache class reads attributes that a DynamicCache lacks (xLSTM)
        if error.obj is not cache:
            raise
        return f"it wants a cache of its own ({error})"
    layers: list[Any] = cache.layers
    lengths = [layer.get_seq_length() for layer in layers if layer.is_initialized]
    if lengths != [1] * config.num_hidden_layers:
        return f"one token left {lengths} tokens in the layers of the cache"
    return ""


def _run_one_token(
    decoder: PreTrainedModel, position: int | None, cache: Cache | None = None
) -> Any:
    """The output of one pass over one token in evaluation mode; the cache is filled."""
    embeddings: Any = decoder.get_input_embeddings()
    width, device = embeddings.weight.shape[1], input_device(decoder)
    given: dict[str, Any] = per_layer(decoder, torch.zeros(1, 1, dtype=torch.long, device=device))
    if position is not None:
        given["position_ids"] = torch.tensor([[position]], device=device)
    if cache is not None:
        given[cache_argument(decoder)] = cache
    token = torch.ones(1, 1, width, dtype=decoder.dtype, device=device)
    with torch.no_grad(), evaluating(decoder), paused_taps():
        return decoder(inputs_embeds=token, use_cache=cache is not None, **given)


# Gradient checkpointing of the blocks that keeps a shared prompt.
#
# A layer of transformers that checkpoints itself drops the cache it is given, with a warning and no
# error, so the items would no longer see the prompt. Here each block is run again as it was called,
# cache included: ``torch.utils.checkpoint`` in its non-reentrant form, because gradients must reach
# keys and values that no block has among its arguments.


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """Passes inside store only each block's input; the backward pass computes blocks again.

    The numbers are the same, dropout included: the second run restores the first one's random
    state. Hooks on the blocks, such as taps, fire once. A second run must not change the cache.
    """
    again = partial(checkpoint, use_reentrant=False)
    with standing_in([(block, partial(again, block.forward)) for block in find_blocks(model)]):
        yield


class ExactAttention(TorchFunctionMode):
    """Within it, attention computes in float32 even under autocast to bfloat16.

    On a CPU, bfloat16 attention takes up to three times as long, above all in the backward pass.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # as torch calls it
        """Call the function, attention in float32."""
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        wide = [each.float() if _is_half(each) else each for each in args]
        named = {name: v.float() if _is_half(v) else v for name, v in (kwargs or {}).items()}
        with torch.autocast("cpu", enabled=False):
            return func(*wide, **named).to(args[0].dtype)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def take_over(model: PreTrainedModel) -> bool:
    """Switch transformers' own checkpointing off; returns whether it was on.

    Other code may have switched it on: peft does when it prepares quantised weights.
    """
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    return bool(on)
