"""Taylor+: how much a block's weights matter to the loss, from one backward pass over users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.evaluation.ranks import EvalSet, shared_prompt
from depthprobe.models.blocks import find_blocks
from depthprobe.probing.passes import CausalEncoder
from depthprobe.probing.readout import score_gradient

BATCH = 32  # a backward pass keeps activations, unlike an evaluation pass
QUANTISED = "quantised weights have no gradient, probe the unquantised model"


def taylor_importance(
    model: CausalEncoder, eval_set: EvalSet, *, device: torch.device, batch_size: int = BATCH
) -> np.ndarray:
    """``sum |W * dL/dW|`` over the weights of each block, (L,): higher is more important.

    The first-order estimate of how much the loss rises if a weight becomes 0, as in Shortened LLaMA
    (Kim et al., arXiv 2402.02834, "Taylor+"; Ma et al., LLM-Pruner, arXiv 2305.11627). L is the
    mean cross-entropy of the target against the whole catalogue, over all users: gradients are
    added up over the batches in float32 or better, and only then multiplied. All weights of the
    blocks count, frozen ones too, and low-rank adapters besides what they adapt. The model is not
    changed: neither weights, nor gradients, nor which weights are trained.

    Raises:
        ValueError: without users, or if a weight is quantised, so that it has no gradient.
    """
    total = weight_slopes(model, eval_set, device=device, batch_size=batch_size)
    importance = [
        sum(float((p.detach() * total[p]).abs().sum()) for p in block.parameters() if p in total)
        for block in find_blocks(model.backbone)
    ]
    return np.array(importance, dtype=np.float64) / len(eval_set.users)


def weight_slopes(
    model: CausalEncoder, eval_set: EvalSet, *, device: torch.device, batch_size: int = BATCH
) -> dict[Tensor, Tensor]:
    """The gradients of the blocks' weights, in float32 or better; of a loss summed over users.

    Raises:
        ValueError: without users, or if a weight is quantised, so that it has no gradient.
    """
    if not len(eval_set.users):
        raise ValueError("no users to take a gradient of")
    blocks = find_blocks(model.backbone)
    _check_weights(model, blocks)
    weights = list(dict.fromkeys(blocks.parameters()))
    total: dict[Tensor, Tensor] = {}
    batches = eval_set.batches(device=device, size=batch_size, model=model)
    # the caller may be in inference mode, whose tensors remember no gradient
    with torch.inference_mode(False), torch.enable_grad(), _requiring_gradients(weights):
        table = model.item_matrix().detach()[1:]  # (I, d)
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        for chosen, histories, lengths in batches:
            slopes: tuple[Tensor | None, ...] = ()
            with batches.retry():
                # run the prompt again: the backward pass frees its part of the graph
                vectors = model.encode(histories, lengths, *shared_prompt(model))  # (B, d)
                own = torch.from_numpy(eval_set.targets[chosen].astype(np.int64)).to(device)
                slope = score_gradient(vectors.detach().to(table.dtype)[None], table, own)[0]
                # the sum over users, not the mean: half precision loses small values
                slope = (len(chosen) * slope).to(vectors.dtype)
                # not backward(): the model's own gradients must not change
                slopes = torch.autograd.grad(vectors, weights, slope, allow_unused=True)
            for weight, each in zip(weights, slopes, strict=False):  # none if out of memory
                if each is not None:  # an expert may have had no user
                    wide = torch.promote_types(weight.dtype, torch.float32)
                    total[weight] = total.get(weight, 0) + each.to(wide)
    return total


def _check_weights(model: CausalEncoder, blocks: nn.ModuleList) -> None:
    for name, weight in blocks.named_parameters():
        # the 8-bit floats are for storage only
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(f"block weight {name} is {weight.dtype}: {QUANTISED}")
    # packed weights may be no parameters; the mark may be only on the model with the head
    marked = getattr(model.backbone, "is_quantized", False)
    if marked or getattr(model.backbone.config, "quantization_config", None) is not None:
        raise ValueError(f"block weights are packed: {QUANTISED}")


@contextmanager
def _requiring_gradients(weights: Sequence[Tensor]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
