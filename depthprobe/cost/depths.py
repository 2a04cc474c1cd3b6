"""The shape of every depth of a backbone: numbers of weights, bytes, FLOPs; from no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from depthprobe.cost.actions import (
    dtype_of,
    plain_recommender,
    random_backbone,
    recommender,
    shared_copy,
)
from depthprobe.cost.flops import score_flops
from depthprobe.cost.parameters import count_parameters
from depthprobe.cost.shapes import product_counter
from depthprobe.cost.workload import Workload
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender


@dataclass(frozen=True)
class Shape:
    """What of a depth its cost follows from. FLOPs of one user, bytes, numbers of weights."""

    depth: int
    parameters: int  # without the item table
    blocks: int
    weights: int  # bytes of all, items included
    block_weights: int  # bytes
    trained: int  # bytes
    positions: int  # computed for a user
    prompt_positions: int  # computed once a batch
    ports: int  # numbers that all matrices of the blocks read and write for a position
    flops_encode: float
    flops_prompt: float
    flops_score: float
    items: int
    dtype: str
    tuning: str


def depth_shapes(
    config: PreTrainedConfig, depths: Sequence[int], workload: Workload
) -> list[Shape]:
    """The shape of every depth, in the order of depths, from models without weights.

    FLOPs are NaN where the model's code can't be counted without weights.

    Raises:
        ValueError: if the architecture can't be cut.
    """
    backbone = random_backbone(config, workload, torch.device("meta"))
    whole = _whole(shared_copy(backbone), workload)
    prompt = len(whole.prompt) - whole.lead  # positions that are computed once a batch
    of_user, of_prompt = _flops(whole, workload.length), _flops(whole, prompt)
    trained = recommender(shared_copy(backbone), replace(workload, prompt=0))
    found = {}
    for depth in sorted(depths, reverse=True):  # from the deepest on, cutting the same one
        keep_blocks(backbone, range(depth))
        model = plain_recommender(backbone, replace(workload, prompt=0))
        counts, blocks = count_parameters(model), find_blocks(backbone)
        found[depth] = Shape(
            depth=depth,
            parameters=counts["blocks"] + counts["token_embeddings"] + counts["adapters"],
            blocks=counts["blocks"],
            weights=_bytes(model.parameters()),
            block_weights=_bytes(blocks.parameters()),
            trained=_trained_bytes(trained, depth),
            positions=workload.length + whole.lead,
            prompt_positions=prompt,
            ports=sum(sum(p.shape) for p in blocks.parameters() if p.dim() == 2),
            flops_encode=of_user(depth),
            flops_prompt=of_prompt(depth),
            flops_score=score_flops(whole, 1),
            items=workload.items,
            dtype=dtype_of(config, workload),
            tuning=workload.tuning,
        )
    return [found[depth] for depth in depths]


def _whole(backbone: PreTrainedModel, workload: Workload) -> Recommender:
    """A recommender without weights, with the prompt.

    Whether that can be shared is found out with a pass, if the backbone's caches don't rule it out.
    Where the pass asks for numbers (which expert a token goes to), it is taken to be so.
    """
    try:
        return plain_recommender(backbone, workload)
    except RuntimeError:
        model = plain_recommender(backbone, replace(workload, prompt=0))
        model.prompt = torch.zeros(workload.prompt, dtype=torch.long, device="meta")
        return model


def _flops(model: Recommender, positions: int) -> Callable[[int], float]:
    """A function that tells the FLOPs of so many positions at a depth, counted once for all."""
    if not positions:
        return lambda depth: 0
    try:
        found = product_counter(model)(positions)
    except ValueError:
        return lambda depth: float("nan")
    return found.total


def _trained_bytes(whole: Recommender, depth: int) -> int:
    """Bytes of what is trained of a depth, from the whole model."""
    cut = {id(p) for block in find_blocks(whole.backbone)[depth:] for p in block.parameters()}
    return _bytes(p for p in whole.parameters() if p.requires_grad and id(p) not in cut)


def _bytes(weights: Iterable[torch.nn.Parameter]) -> int:
    return sum(weight.nbytes for weight in weights)
