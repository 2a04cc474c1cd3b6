"""Find the decoder blocks of any Hugging Face model, by structure and not by name."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from depthprobe.errors import BadInput


def refusal(model: nn.Module, reason: str) -> BadInput:
    """The one-line error for an architecture that can't be cut, skipped or read out."""
    return BadInput("backbone", type(model).__name__, reason, fault=True)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside PEFT, ``torch.compile`` and data-parallel wrappers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        outer = inner
        inner = extract_model_from_parallel(inner, keep_torch_compile=False)
        if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        if inner is outer:
            raise ValueError(f"{type(model).__name__} is not a Hugging Face PreTrainedModel")
    return inner


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a Hugging Face model, in order, found by structure and not by name.

    They are the only ``ModuleList`` of composite modules under the base model (not inside another
    candidate) that is as long as the text configuration's ``num_hidden_layers``. Sees through PEFT.

    Raises:
        BadInput: if there is no such list, more than one, or the model is no plain decoder.
    """
    owner, name = locate(unwrap(model))
    blocks = owner.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)  # noqa: S101 - what locate looks for
    return blocks


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """The decoder without its language-model head: embeddings, blocks, final norm."""
    inner = unwrap(model)
    if inner.base_model is not inner:
        return inner.base_model  # type: ignore[return-value]
    if inner.get_output_embeddings() is None:
        return inner
    # some classes name a base model that they lack: take the innermost model around the blocks
    owner, name = locate(inner)
    parts = name.split(".")
    around = [owner.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    return next(module for module in reversed(around) if isinstance(module, PreTrainedModel))


def token_embeddings(decoder: PreTrainedModel) -> nn.Embedding:
    """A decoder's token embeddings; ``BadInput`` if it has none of its own."""
    try:
        return cast("nn.Embedding", decoder.get_input_embeddings())
    except NotImplementedError:
        raise refusal(decoder, "it has no token embeddings of its own") from None


def check_tokens(field: str, value: object, tokens: Iterable[int], model: PreTrainedModel) -> None:
    """Refuse a field's text if the model has no embedding for one of its tokens."""
    rows, highest = len(token_embeddings(find_decoder(model)).weight), max(tokens, default=0)
    if highest >= rows:
        allowed = f"text of the {rows:,} tokens that the backbone has embeddings of"
        raise BadInput(field, value, f"{allowed} (its tokenizer makes token {highest} of it)")


def input_device(model: PreTrainedModel) -> torch.device:
    """The device for a model's token ids, also if accelerate keeps its weights elsewhere."""
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    # accelerate has no public way to ask where an offloaded module computes
    execution = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(execution) if device.type == "meta" and execution is not None else device


def block_indices(field: str, indices: Iterable[int], depth: int) -> tuple[int, ...]:
    """The indices as plain numbers; ``BadInput`` if one is no block's."""
    try:
        chosen = tuple(operator.index(index) for index in indices)
    except TypeError:
        chosen = (-1,)
    if any(not 0 <= index < depth for index in chosen):
        raise BadInput(field, indices, f"block indices from 0 to {depth - 1}")
    return chosen


def locate(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The base model and the path of the blocks in it; raises as :func:`find_blocks`."""
    if model.config.is_encoder_decoder:
        raise refusal(model, "it is an encoder-decoder: only decoders can be cut")
    if named := getattr(model.config, "blocks_path", ""):  # not a Hugging Face decoder
        return model, named
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    base: nn.Module = model.base_model
    paths = _candidates(base, depth)
    if len(paths) > 1:
        # A vision tower may be as deep as the text decoder.
        base = model.get_decoder()
        paths = _candidates(base, depth)
    if len(paths) != 1:
        what = "no list of blocks" if not paths else f"more than one list of blocks ({paths})"
        reason = f"it has {what} as long as its configuration says (num_hidden_layers={depth})"
        raise refusal(model, reason)
    return base, paths[0]


def _candidates(base: nn.Module, depth: int | None) -> list[str]:
    """Paths of lists of composite modules as long as the model is deep, outermost first."""
    paths: list[str] = []
    for name, module in base.named_modules():
        nested = any(name.startswith(outer + ".") for outer in paths)
        as_long = isinstance(module, nn.ModuleList) and len(module) == depth
        # a block has sub-modules, unlike the entries of a list of projections or rotary tables
        if as_long and not nested and all(any(part.children()) for part in module):
            paths.append(name)
    return paths


def keys_are_read(blocks: nn.ModuleList) -> bool:
    """Whether some blocks read the keys and values of earlier ones (Gemma 3n, 4).

    Since transformers 5.24 blocks are marked as storing theirs even if none does.
    """
    return any(getattr(module, "is_kv_shared_layer", False) for module in blocks.modules())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# Per-layer embeddings (Gemma 3n and 4): besides the stream, every block reads embeddings of the
# token. A pass over embeddings has no tokens, so it is given their ids.


def has_per_layer(decoder: nn.Module) -> bool:
    """Whether the blocks of a decoder read per-layer embeddings."""
    return bool(getattr(decoder, "hidden_size_per_layer_input", 0))


def per_layer(decoder: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The argument of a pass over the embeddings of tokens (B, T); none for other decoders."""
    if not has_per_layer(decoder):
        return {}
    known: Any = decoder
    return {"per_layer_inputs": known.get_per_layer_inputs(ids)}  # (B, T, L, width of each)


def no_token(decoder: nn.Module) -> int:
    """The id for positions that are no token: padding, as these families use for images."""
    config: Any = decoder.config
    return int(config.get_text_config(decoder=True).pad_token_id or 0)


# A decoder in plain PyTorch: the blocks of a user's own recommender.


class PlainConfig(PreTrainedConfig):
    """The configuration of a decoder in plain PyTorch."""

    model_type = "own"

    def __init__(
        self, num_hidden_layers: int = 1, hidden_size: int = 1, blocks_path: str = "", **more: Any
    ) -> None:
        super().__init__(**more)
        self.num_hidden_layers, self.hidden_size = num_hidden_layers, hidden_size
        self.blocks_path = blocks_path  # path of the list of blocks


class PlainDecoder(PreTrainedModel):
    """Wraps a plain PyTorch recommender as the decoder that probes expect: histories to states."""

    config_class = PlainConfig

    def __init__(self, own: Any) -> None:
        blocks = _plain_blocks(own)
        path = next(name for name, module in own.named_modules() if module is blocks)
        place = own.item_matrix().device
        one = torch.ones(1, dtype=torch.long, device=place)
        with torch.no_grad():
            width = own.eval().states(one[None], one).shape[-1]
        config: Any = PlainConfig(len(blocks), width, f"own.{path}")
        super().__init__(config)
        self.own = own

    def get_input_embeddings(self) -> Any:
        """The module whose size is the number of items."""
        return SimpleNamespace(weight=self.own.item_matrix())

    def get_output_embeddings(self) -> None:
        """It has no language-model head."""

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        """States behind the final norm, (B, T) rows of items -> (B, P, D)."""
        if lengths is None:
            lengths = torch.full_like(input_ids[:, 0], input_ids.shape[1])
        more = () if past_key_values is None else (past_key_values,)
        return (self.own.states(input_ids, lengths, *more),)


def _plain_blocks(own: Any) -> nn.ModuleList:
    """The blocks of a plain PyTorch decoder: its ``blocks``, or its only list of modules."""
    named = getattr(own, "blocks", getattr(own.backbone, "blocks", None))
    if isinstance(named, nn.ModuleList):
        return named
    lists = [
        module
        for module in own.backbone.modules()
        if isinstance(module, nn.ModuleList) and all(any(part.children()) for part in module)
    ]
    if len(lists) != 1:
        reason = f"{len(lists)} lists of modules in its backbone: name the one of blocks `blocks`"
        raise refusal(own, reason)
    return lists[0]
