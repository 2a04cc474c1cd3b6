"""Size: parameters and their bytes by part of the model, and memory at its peak."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender, is_quantized

PARTS = ("blocks", "token_embeddings", "adapters", "item_table")
EVERY = 0.002  # seconds between looks at the process; a shorter peak may be missed


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of weights: blocks, token_embeddings, adapters, item_table, total, trainable.

    Token embeddings are all tables of the backbone outside its blocks: of tokens, of positions.
    Adapters are everything of a recommender that is none of the other three: a linear head and the
    final norm included. Weights that two modules share count once; packed ones (4 bits) as the
    weights that they stand for.
    """
    sizes = _packed(model)

    def size(weight: nn.Parameter) -> int:
        return sizes.get(id(weight), weight.numel())

    trainable = sum(size(p) for p in model.parameters() if p.requires_grad)
    return _by_part(model, size) | {"trainable": trainable}


def count_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights as they are held: the same parts, their total, and by dtype.

    ``float32``, ``bfloat16``, ``uint8``, ... add up to the total as well. Quantised weights come
    with their scales. ``optimizer``: of gradients and AdamW's two moments, in a training.
    """
    by_dtype: Counter[str] = Counter()
    for weight in model.parameters():
        for tensor in _stored(weight):
            by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    parts = _by_part(model, lambda weight: sum(tensor.nbytes for tensor in _stored(weight)))
    optimizer = 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return parts | {"optimizer": optimizer} | dict(by_dtype)


def served_bytes(model: nn.Module, *, bfloat16: bool = False) -> dict[str, int]:
    """Bytes of the weights as they are served: the parts of :func:`count_parameters`, and total.

    Blocks that compute in bfloat16 are served in it, whatever their training held beside it;
    quantised weights come with their scales.
    """
    (_, modules), *_ = _parts(model)
    halved = {id(weight) for module in modules for weight in module.parameters() if bfloat16}

    def size(weight: nn.Parameter) -> int:
        held = _stored(weight)
        half = id(weight) in halved and len(held) == 1 and weight.is_floating_point()
        return min(held[0].nbytes, 2 * weight.numel()) if half else sum(h.nbytes for h in held)

    return _by_part(model, size)


def bytes_of(counts: Mapping[str, int], dtype: str, *, bfloat16: bool = False) -> dict[str, int]:
    """The same from numbers of weights by part, of a model that is part of another.

    Args:
        counts: what :func:`count_parameters` gives.
        dtype: of the backbone; adapters and item table are in float32.
        bfloat16: its blocks compute in bfloat16.
    """
    own = int(getattr(torch, dtype).itemsize)
    sizes = {"blocks": min(own, 2) if bfloat16 else own, "token_embeddings": own}
    parts = {name: counts.get(name, 0) * sizes.get(name, 4) for name in PARTS}
    return parts | {"total": sum(parts.values())}


def parameters_by_block(model: Recommender) -> list[int]:
    """Numbers of weights of each block, (L,); what two blocks share counts for the first."""
    sizes, seen = _packed(model), set[int]()
    counts = []
    for block in find_blocks(model.backbone):
        own = [weight for weight in block.parameters() if id(weight) not in seen]
        seen.update(map(id, own))
        counts.append(sum(sizes.get(id(weight), weight.numel()) for weight in own))
    return counts


def _by_part(model: nn.Module, size: Callable[[nn.Parameter], int]) -> dict[str, int]:
    """The sizes of each part's weights, each weight once, and their total."""
    left = {id(weight): size(weight) for weight in model.parameters()}
    total = sum(left.values())
    counts = dict.fromkeys(PARTS, 0)
    for part, modules in _parts(model):
        for module in modules:
            counts[part] += sum(left.pop(id(weight), 0) for weight in module.parameters())
    counts["adapters"] = sum(left.values())
    return counts | {"total": total}


def _parts(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    items = getattr(model, "items", None)
    table: list[nn.Module] = [items] if isinstance(items, nn.Module) else []
    if isinstance(model, Recommender):
        tables: list[nn.Module] = [
            module for module in model.backbone.modules() if isinstance(module, nn.Embedding)
        ]
        return [
            ("blocks", [find_blocks(model.backbone)]),
            ("item_table", table),  # before the tokens': of a user's own model both may be one
            ("token_embeddings", tables),
        ]
    blocks = getattr(model, "blocks", None)
    return [("blocks", [blocks] if isinstance(blocks, nn.Module) else []), ("item_table", table)]


def _packed(model: nn.Module) -> dict[int, int]:
    """How many weights are packed into a parameter, by its id, where several share a byte."""
    return {
        id(module.weight): module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.weight.numel() != module.in_features * module.out_features
    }


def _stored(weight: Tensor) -> list[Tensor]:
    """A weight and, where bitsandbytes or torchao has quantised it, its scales."""
    if is_quantized(weight):  # of which it shows no part
        own: Any = weight
        names = (*own.tensor_data_names, *getattr(own, "optional_tensor_data_names", ()))
        parts = (getattr(own, name, None) for name in names)
        return [part for part in parts if isinstance(part, Tensor)]
    held: list[Any] = [weight, getattr(weight, "SCB", None)]  # 8 bits
    state = getattr(weight, "quant_state", None)  # 4 bits; scales may be quantised once more
    while state is not None:
        held += [getattr(state, name, None) for name in ("absmax", "code", "offset")]
        state = getattr(state, "state2", None)
    return [tensor for tensor in held if isinstance(tensor, Tensor)]


LIBRARIES = 0.6e9  # bytes of a process that has done nothing yet


def training_memory(
    config: PreTrainedConfig,
    parameters: int,
    *,
    positions: int,
    trained: bool,
    checkpointing: bool,
) -> float:
    """Bytes of a process that trains all blocks of a decoder in float32, about.

    Weights, where they are trained gradients and AdamW's two moments, and what each block keeps of
    so many positions for the backward pass: some six states in its width, and three in its MLP's.
    """
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    kept = width if checkpointing else 6 * width + 3 * inner
    states = positions * int(config.num_hidden_layers) * kept
    return LIBRARIES + 4.0 * ((4 if trained else 1) * parameters + states)


def free_memory(device: torch.device) -> int:
    """Bytes that may be had on a GPU, or of the host, which others share: half of what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // 2


def release_memory() -> None:
    """Give memory that is free again back to the system: glibc keeps gigabytes of a model."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Bytes at the worst moment of the block that it wraps, in the yielded dict when that ends.

    ``allocated`` (what tensors took) and ``reserved`` (what torch's allocator held for them) on a
    GPU, without the driver's context; elsewhere ``rss``, what the whole process had of the host's
    memory, interpreter and libraries included. What else is there at that time is in it.
    """
    peak: dict[str, float] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak["allocated"] = float(torch.cuda.max_memory_allocated(device))
        peak["reserved"] = float(torch.cuda.max_memory_reserved(device))
        return
    release_memory()  # what was kept would hide the peak
    process, done = psutil.Process(), threading.Event()

    def look() -> None:
        while not done.wait(EVERY):
            peak["rss"] = max(peak["rss"], float(process.memory_info().rss))

    peak["rss"] = float(process.memory_info().rss)
    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield peak
    finally:
        peak["rss"] = max(peak["rss"], float(process.memory_info().rss))
        done.set()
        watch.join()
