"""Weights in fewer bits, by torchao: the linear maps of the blocks, or the rows of the item table.

With the blocks, the rows of the token embeddings are always rounded to int8 with a scale per token:
in a model of few blocks they are most of the bytes, although items read as vectors need only the
prompt's rows. ``int8``: a scale per row. ``int8-dynamic``: inputs are rounded to 8 bits as well,
with a scale per position. ``int4``: a scale and an offset for each 32 weights of a row; its maps
compute in bfloat16, since torch's float32 kernel takes fifty times as long. ``int8-items``: the
item table, and the matrix that scores it, with a scale per item; the blocks are not rounded.

Nothing is trained or calibrated: the same weights always give the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.models.blocks import find_blocks
from depthprobe.models.build import linear_maps, save_weights
from depthprobe.models.own import OwnRecommender
from depthprobe.models.precision import check_torchao
from depthprobe.models.recommender import Recommender, is_quantized
from depthprobe.models.sources import not_finite

ITEMS = "int8-items"
SCHEMES = ("int8", "int8-dynamic", "int4", ITEMS)
GROUP, ROWS = 32, 16  # int4: weights that share a scale, and the divisor of the number of rows

logger = logging.getLogger(__name__)


def check_scheme(scheme: str, device: torch.device) -> None:
    """Refuse a scheme that this installation or this device lacks."""
    check_torchao("methods", scheme)
    if scheme == "int4" and device.type != "cpu":
        allowed = f"a processor, which has a kernel for it; on {device.type} take int8"
        raise BadInput("methods", scheme, allowed)


@torch.no_grad()
def quantize(model: Recommender, scheme: str, *, bfloat16: bool = False) -> None:
    """Round the weights of a recommender, in place; :func:`make_ready` lets it compute.

    Modules get new weights, so rounding a copy around shared weights (``cut_copy``) does not change
    the original. Some weights stay as they are: those outside linear maps (the fused experts of a
    mixture), and for int4 maps of a size that the kernel does not support.

    Args:
        model: LoRA merged.
        scheme: one of :data:`SCHEMES`.
        bfloat16: its blocks compute in bfloat16, and so do the rounded maps.

    Raises:
        BadInput: if torchao or a kernel is not there, or nothing of the model can be rounded.
    """
    blocks, made = find_blocks(model.backbone), dict[int, nn.Parameter]()
    device = next(blocks.parameters()).device
    check_scheme(scheme, device)
    if scheme == ITEMS:
        _quantize_items(model)
        return
    every = {id(weight): weight for weight in blocks.parameters()}
    for module in maps_to_round(model.backbone, scheme):
        weight: Tensor = module.weight  # type: ignore[assignment]
        if is_quantized(weight) or not weight.is_floating_point():
            raise BadInput("methods", scheme, "weights that are not quantised already")
        if id(weight) not in made:  # two maps may share one
            own = weight.detach().to(torch.bfloat16) if bfloat16 else weight.detach()
            made[id(weight)] = nn.Parameter(_rounded(own, scheme), requires_grad=False)
        module.weight = made[id(weight)]
    rounded = sum(every[key].numel() for key in made)
    # a user's own model may have none; Gemma's scale their rows, and can't be read back
    users_own = isinstance(model, OwnRecommender)
    if not users_own and type(model.token_embeddings).forward is nn.Embedding.forward:
        _round_rows(model.token_embeddings)
    share = rounded / sum(weight.numel() for weight in every.values())
    logger.info("%s: %.1f %% of the weights of the blocks are rounded", scheme, 100 * share)


def maps_to_round(decoder: PreTrainedModel, scheme: str) -> list[nn.Module]:
    """The linear maps of the blocks whose weights a scheme rounds; ``BadInput`` if it rounds none.

    Weights may be on the meta device: only sizes matter.
    """
    found = []
    for module in linear_maps(find_blocks(decoder)).values():
        # Conv1D, and maps with their own product, would read the rounded weight as plain numbers
        if type(module).forward is not nn.Linear.forward:
            continue
        rows, columns = module.weight.shape  # type: ignore[misc]
        if scheme != "int4" or (rows % ROWS == 0 and columns % GROUP == 0):
            found.append(module)
    if not found:
        sizes = f", rows in {ROWS}s and columns in {GROUP}s" if scheme == "int4" else ""
        family = decoder.config.model_type
        allowed = f"blocks with maps of nn.Linear{sizes} (those of this {family} have none)"
        raise BadInput("methods", scheme, allowed)
    return found


def _round_rows(table: nn.Embedding) -> None:
    """Token embeddings as int8 with a scale per row; ``nn.Embedding`` reads them as usual."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization import quantize_ as quantize_in_place
    from torchao.quantization.granularity import PerAxis

    holder = nn.Embedding.from_pretrained(table.weight.detach())
    kind = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_in_place(holder, kind, filter_fn=lambda module, _: module is holder)
    table.weight = nn.Parameter(holder.weight.detach(), requires_grad=False)


def _rounded(weight: Tensor, scheme: str) -> Tensor:
    """A weight (N, K) as torchao's tensor of a scheme."""
    if scheme == "int4":
        return _int4(weight)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from torchao.quantization import quantize_ as quantize_in_place

    kinds = {"int8": Int8WeightOnlyConfig, "int8-dynamic": Int8DynamicActivationInt8WeightConfig}
    holder = nn.Linear(1, 1, bias=False)
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_in_place(holder, kinds[scheme](set_inductor_config=False))
    return holder.weight.detach()


def _int4(weight: Tensor) -> Tensor:
    """Round each group of a row to 16 even steps from its least to its greatest value, (N, K).

    In the layout that torchao writes to disk: two numbers of -8..7 a byte, the first one low;
    ``scale * number + zero_point`` is the weight.
    """
    from torchao.quantization import Int4Tensor

    groups = weight.float().unflatten(1, (-1, GROUP))  # (N, K / G, G)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6).to(torch.bfloat16)  # as they are kept
    zero = (low + 8 * scale.float()).to(torch.bfloat16)
    numbers = ((groups - zero.float()) / scale.float()).round().clamp(-8, 7).to(torch.int8)
    numbers = numbers.flatten(1)  # (N, K)
    packed = (numbers[:, 1::2] << 4) | (numbers[:, ::2] & 15)
    beside = (each[..., 0].T.contiguous() for each in (scale, zero))  # (K / G, N)
    rounded: Tensor = Int4Tensor(packed, *beside, [1, GROUP], weight.shape)
    return rounded


@torch.no_grad()
def make_ready(backbone: nn.Module) -> None:
    """Prepare rounded maps for their device: int4 in the layout of the processor's kernel.

    Maps rounded in bfloat16 get bfloat16 inputs. Their outputs are bfloat16 under autocast, and in
    the backbone's precision otherwise.

    Raises:
        BadInput: for int4 on an accelerator.
    """
    packed: dict[int, nn.Parameter] = {}
    weights = (w for w in backbone.parameters() if w.is_floating_point() and not is_quantized(w))
    around = next(weights).dtype
    for module in find_blocks(backbone).modules():
        if not isinstance(module, nn.Linear) or not is_quantized(weight := module.weight):
            continue
        if weight.dtype == torch.bfloat16:
            module.register_forward_pre_hook(_in_bfloat16)
            module.register_forward_hook(partial(_as_others, around))
        if type(weight).__name__ == "Int4Tensor":
            if id(weight) not in packed:
                packed[id(weight)] = nn.Parameter(_for_kernel(weight), requires_grad=False)
            module.weight = packed[id(weight)]


def _in_bfloat16(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].to(torch.bfloat16), *inputs[1:])


def _as_others(around: torch.dtype, _: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output if torch.is_autocast_enabled(output.device.type) else output.to(around)


def _for_kernel(weight: Any) -> Tensor:
    """Torchao's int4 from disk in the layout of torch's CPU kernel: the same bytes."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    packed = weight.qdata
    numbers = torch.stack([packed << 4 >> 4, packed >> 4], dim=2).flatten(1)  # (N, K), -8..7
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int() + 8, 1)
    beside = torch.stack([weight.scale, weight.zero_point], dim=2).contiguous()  # (K / G, N, 2)
    return Int4OpaqueTensor(data, beside, weight.block_size, weight.shape)  # type: ignore[no-any-return]


# --- the item table ------------------------------------------------------------------------------


class Int8Rows(nn.Module):
    """An item table of int8 rows with a scale per row, in place of an ``nn.Embedding``."""

    def __init__(self, table: Tensor) -> None:
        """Round a table, (I + 1, d), or take a rounded one."""
        super().__init__()
        self.weight = nn.Parameter(int8_rows(table), requires_grad=False)

    def forward(self, items: Tensor) -> Tensor:
        """Dequantised rows, (B, T) -> (B, T, d)."""
        table: Any = self.weight
        numbers: Tensor = table.qdata[items] * table.scale[items]
        return numbers.to(table.dtype)


def int8_rows(table: Tensor) -> Tensor:
    """A matrix (I, d) as int8 with a scale per row: ``table ~ scale * rows``, symmetric."""
    if is_quantized(table):
        return table
    from torchao.quantization import Int8Tensor
    from torchao.quantization.granularity import PerRow

    return Int8Tensor.from_hp(table.detach(), PerRow())  # type: ignore[no-any-return]


def _quantize_items(model: Recommender) -> None:
    if isinstance(model, OwnRecommender):
        raise BadInput("methods", ITEMS, "a recommender of ours (this one keeps its own items)")
    model.items = Int8Rows(model.items.weight)
    if model.head is not None:
        model.head.weight = nn.Parameter(int8_rows(model.head.weight), requires_grad=False)


# --- on disk -------------------------------------------------------------------------------------


def mark(model: PreTrainedModel) -> None:
    """Let ``save_pretrained`` write rounded weights as such, and record that in ``config.json``.

    The result is a quantised checkpoint of transformers: safetensors, read by ``AutoModel`` if
    torchao is installed. A model without rounded weights is not changed.
    """
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    maps = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    rounded = [m.weight for m in maps.values() if is_quantized(m.weight)]
    if not rounded:
        return
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
    )

    own: Any = rounded[0]
    kind: Any = Int8WeightOnlyConfig(set_inductor_config=False)
    if type(own).__name__ == "Int4Tensor":
        kind = Int4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    elif own.act_quant_kwargs is not None:
        kind = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    plain = [name for name, m in maps.items() if not is_quantized(m.weight)]
    tokens = is_quantized(model.get_input_embeddings().weight)
    config: Any = TorchAoConfig(
        kind, modules_to_not_convert=plain, include_input_output_embeddings=tokens
    )
    if tokens:  # reading ties a tied head to them again
        tied = [*(getattr(model, "all_tied_weights_keys", None) or {})]
        model.register_state_dict_post_hook(partial(_without, tied))
    model.config.quantization_config = config
    vars(model)["hf_quantizer"] = AutoHfQuantizer.from_config(config, pre_quantized=True)


def _without(names: list[str], _: nn.Module, held: dict[str, Tensor], *__: Any) -> None:
    for name in names:
        held.pop(name, None)


def save_parts(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write weights of any device, also views; rounded ones as numbers and scales."""
    rounded = {name: w.detach() for name, w in weights.items() if is_quantized(w)}
    held = {name: w for name, w in weights.items() if name not in rounded}
    told: dict[str, str] = {}
    if rounded:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        parts, told = flatten_tensor_state_dict(rounded)
        held |= parts
    save_weights(held, file, told)


def load_parts(file: Path) -> dict[str, Tensor]:
    """Read what :func:`save_parts` wrote; ``BadInput`` if rounded weights need torchao."""
    with safe_open(file, framework="pt") as opened:
        held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        told = opened.metadata() or {}
    if "tensor_names" not in told:
        return held
    check_torchao("recommender", str(file.parent))
    if (name := not_finite(held.items())) is not None:
        raise ValueError(f"{name} holds NaN or infinity")
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    rounded, plain = unflatten_tensor_state_dict(held, told)
    return {**plain, **rounded}


def put_back(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the rounded ones among some weights into a model; returns the others.

    ``ValueError`` if it has no weight of that name and shape.
    """
    for name, weight in weights.items():
        if is_quantized(weight):
            old = dict(model.named_parameters()).get(name)
            if old is None or old.shape != weight.shape:
                raise ValueError(f"it does not fit the model: {name}")
            new = nn.Parameter(weight, requires_grad=False)
            for module in model.modules():
                held = vars(module)["_parameters"]
                held.update({own: new for own, each in held.items() if each is old})
    return {name: weight for name, weight in weights.items() if not is_quantized(weight)}
