"""How a backbone computes: its device, precision, attention, and weights packed in fewer bits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.import_utils import (
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_torchao_available,
)

from depthprobe.errors import BadInput, one_of
from depthprobe.models.blocks import find_blocks
from depthprobe.study import ATTENTIONS, QUANTIZATIONS

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
LARGE = 20_000_000  # parameters from which on bfloat16 is the faster one, see analyses/real_llm


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``mps`` names here."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has.get(name):
        here = ", ".join(kind for kind in has if has[kind])
        raise BadInput("device", name, f"auto or one of those on this machine: {here}")
    return torch.device(name)


def precision_on(device: torch.device, parameters: int) -> Literal["float32", "bfloat16"]:
    """What ``precision = "auto"`` means on a device, for a backbone with ``parameters`` parameters.

    Decided by the hardware's features and not by a measurement, so that runs on a machine agree.
    """
    has = False
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        has = bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    elif device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has and parameters >= LARGE else "float32"


def compute_in_bfloat16(backbone: nn.Module) -> None:
    """Let every block compute in bfloat16; weights and states keep their type.

    It uses hooks, so a block computes the same however it is called, and also in a cut or copy.
    """
    entered: list[torch.autocast] = []  # of blocks that are running

    def enter(block: nn.Module, _: Any) -> None:
        context = torch.autocast(next(block.parameters()).device.type, torch.bfloat16)
        context.__enter__()
        entered.append(context)

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    for block in find_blocks(backbone):
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)


def resolve_dtype(dtype: str | torch.dtype) -> Any:
    """``"auto"``, or the torch dtype of a name."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    one_of("dtype", dtype, DTYPES)
    return getattr(torch, dtype)


def check_attention(attention: str | None) -> str | None:
    """The attention implementation for transformers; None leaves the choice to it."""
    if attention is None or attention == "auto":
        return None
    one_of("attention", attention, ATTENTIONS)
    flash = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
    }
    if attention in flash and not flash[attention]():
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
    make: Any = BitsAndBytesConfig  # untyped in transformers
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config: BitsAndBytesConfig = make(
        load_in_8bit=quantize == "8bit", load_in_4bit=quantize == "4bit", **four
    )
    return config


def check_torchao(field: str, value: object) -> None:
    """Refuse a value that needs torchao if torchao is not installed."""
    if not is_torchao_available():
        allowed = "torchao, which is not installed: pip install 'depthprobe[quantize]'"
        raise BadInput(field, value, allowed, fault=True)
