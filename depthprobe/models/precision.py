"""How a backbone computes: the dtype of its weights, its attention, weights of 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.import_utils import (
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
)

from depthprobe.errors import BadInput, one_of
from depthprobe.study import ATTENTIONS, QUANTIZATIONS

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
# what transformers says on a quantised model; accelerate and peft look for it
MARKS = (
    "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer",
)  # fmt: skip


def check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """``"auto"``, or the torch dtype of a name."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    one_of("dtype", dtype, DTYPES)
    named: torch.dtype = getattr(torch, dtype)
    return named


def check_attention(attention: str | None) -> str | None:
    """The implementation that transformers is to use; None leaves it the choice."""
    if attention is None or attention == "auto":
        return None
    one_of("attention", attention, ATTENTIONS)
    absent = {
        "flash_attention_2": not is_flash_attn_2_available(),
        "flash_attention_3": not is_flash_attn_3_available(),
    }
    if absent.get(attention):
        allowed = "the package flash-attn installed and a CUDA GPU, or eager, sdpa, flex_attention"
        raise BadInput("attention", attention, allowed)
    return attention


def can_quantize() -> bool:
    """Whether bitsandbytes and a CUDA GPU are here."""
    return is_bitsandbytes_available() and torch.cuda.is_available()


def quantization(quantize: str | None) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the weights of linear maps; None leaves them as they are.

    8 bits: LLM.int8 (arXiv 2208.07339). 4 bits: NF4, computed in bfloat16 (arXiv 2305.14314).
    """
    if quantize is None or quantize == "none":
        return None
    one_of("quantize", quantize, QUANTIZATIONS)
    if not can_quantize():
        allowed = "bitsandbytes (pip install 'depthprobe[quantize]') and a CUDA GPU"
        raise BadInput("quantize", quantize, allowed)
    options: dict[str, Any] = {"load_in_8bit": True}
    if quantize == "4bit":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options["bnb_4bit_compute_dtype"] = torch.bfloat16
    make: Any = BitsAndBytesConfig  # untyped in transformers
    config: BitsAndBytesConfig = make(**options)
    return config


def placement() -> dict[str, int]:
    """Where quantised weights are loaded: all of them on the GPU that ``cuda`` means here."""
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
