"""How a backbone computes: the dtype of its weights, its attention, weights of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.import_utils import (
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
)

from depthprobe.errors import BadInput
from depthprobe.models.blocks import find_blocks
from depthprobe.models.parts import restore_forward
from depthprobe.study import ATTENTIONS, QUANTIZATIONS

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
# what transformers says on a quantised model; accelerate and peft ask for it
MARKS = (
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "quantization_method",
    "hf_quantizer",
)


def check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """``"auto"``, or the torch dtype of a name.

    Raises:
        BadInput: for another name.
    """
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise BadInput("dtype", dtype, ", ".join(DTYPES))
    found: torch.dtype = getattr(torch, dtype)
    return found


def check_attention(attention: str | None) -> str | None:
    """What transformers is asked for; None leaves it the choice.

    Raises:
        BadInput: for what is not one of transformers' own implementations (it would take another
            name for that of a kernel to download), or a package that is absent (it would download
            a kernel in its place).
    """
    if attention is None or attention == "auto":
        return None
    if attention not in ATTENTIONS:
        raise BadInput("attention", attention, f"one of {', '.join(ATTENTIONS)}")
    found = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
    }
    if attention in found and not found[attention]():
        allowed = "the package flash-attn installed and a CUDA GPU, or eager, sdpa, flex_attention"
        raise BadInput("attention", attention, allowed)
    return attention


def can_quantize() -> bool:
    """Whether bitsandbytes and a CUDA GPU are here."""
    return is_bitsandbytes_available() and torch.cuda.is_available()


def quantization(quantize: str | None) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the weights of linear maps; None leaves them as they are.

    8 bits: LLM.int8 (arXiv 2208.07339). 4 bits: NF4, computed in bfloat16 (arXiv 2305.14314).

    Raises:
        BadInput: for another value, or where bitsandbytes or a CUDA GPU is absent.
    """
    if quantize is None or quantize == "none":
        return None
    if quantize not in QUANTIZATIONS:
        raise BadInput("quantize", quantize, f"one of {', '.join(QUANTIZATIONS)}")
    if not can_quantize():
        allowed = "bitsandbytes (pip install 'depthprobe[quantize]') and a CUDA GPU"
        raise BadInput("quantize", quantize, allowed)
    make: Any = BitsAndBytesConfig  # untyped in transformers
    config: BitsAndBytesConfig = (
        make(load_in_8bit=True)
        if quantize == "8bit"
        else make(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    )
    return config


def placement() -> dict[str, int]:
    """Where quantised weights are loaded: whole, on the GPU that ``cuda`` means here."""
    return {"": torch.cuda.current_device()}


def mark_quantized(model: PreTrainedModel) -> None:
    """Say on the base model too that its weights are quantised, as transformers does on the model.

    A recommender holds the base model alone; without the mark, LoRA would treat packed bytes as
    weights.
    """
    for name in MARKS:
        if hasattr(model, name):
            setattr(model.base_model, name, getattr(model, name))


def plain_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The model with quantised weights turned back into ordinary ones of the same values."""
    if not getattr(model, "is_quantized", False):
        return model
    base = model.base_model
    plain: PreTrainedModel = model.dequantize(dtype=model.dtype)
    for name in MARKS:
        vars(base).pop(name, None)
    return plain


# Gradient checkpointing of the blocks that leaves a shared prompt where it is.
#
# A layer of transformers that checkpoints itself drops the cache it is given, with a warning and no
# error, so the items would no longer see the prompt. Here each block is run again as it was called,
# cache included: ``torch.utils.checkpoint`` in its non-reentrant form, because gradients must reach
# keys and values that no block has among its arguments.


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """Passes inside keep what enters a block; the backward pass, inside or after, runs it again.

    Same numbers, dropout included: the random state is the first run's. Hooks on the blocks, a tap
    among them, fire once. A cache must be one that a second run doesn't change.

    Args:
        model: a Hugging Face decoder, also under PEFT.
    """
    blocks = find_blocks(model)
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = _run_again(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            restore_forward(block, forward)


def take_over(model: PreTrainedModel) -> bool:
    """Switch transformers' own checkpointing off; returns whether it was on.

    Somebody else may have switched it on: peft does where it prepares quantised weights.
    """
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    return bool(on)


def _run_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
