"""FLOPs of a recommender: encoding users, scoring the catalogue, an epoch of training.

torch's ``FlopCounterMode`` counts a pass over a copy of the model whose tensors have a shape and no
numbers (torch's fake tensors). No weight is read and nothing is computed, so a 7B model takes
seconds, and every family is counted by its own code. The conventions:

- A multiply-add is two. What counts are products: linear maps, attention, convolutions. Norms,
  activations, softmax, and what a recurrence does element by element (scans) are left out.
- What is computed counts, needed or not: causal attention is not halved, a sliding window is a
  masked full one, a recurrence that works in chunks fills its last one.
- Of experts those that tokens go to count, top-k of them a token, and those that all tokens go to.
- A shared prompt is computed once for all users and left out; that users attend to it is not. A
  prompt that is repeated for each user counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import Cache
from transformers.integrations import hub_kernels

from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import PER_BLOCK_WEIGHTS
from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import paused_taps
from depthprobe.models.words import Words

BACKWARD = 2  # times the forward pass: a gradient for the input and one for the weights
FEW = 5  # a range of so many lengths is counted one by one
SMALL = 20_000_000  # weights: zeros run through so few in less time than shapes are inferred


class UncountableError(ValueError):
    """A kernel of the model runs neither on shapes nor on the processor."""


@dataclass(frozen=True)
class Products:
    """FLOPs of encoding one user: of each block, and of all else."""

    blocks: tuple[int, ...]
    rest: int  # adapters, projections outside the blocks

    def total(self, depth: int | None = None) -> int:
        """With the first blocks alone; None for all."""
        return sum(self.blocks[:depth]) + self.rest


Known = MutableMapping[int, Products]  # counts of models of the same shapes, by items


def flops_per_user(
    model: Recommender, length: int, *, depth: int | None = None, known: Known | None = None
) -> int:
    """FLOPs of encoding one user with so many positions and scoring the catalogue; see below."""
    encoding = encode_flops(model, np.array([length]), depth=depth, known=known)
    return encoding + score_flops(model, 1)


def encode_flops(
    model: Recommender, lengths: Any, *, depth: int | None = None, known: Known | None = None
) -> int:
    """FLOPs of encoding users with so many positions each, (E,), into one vector per user.

    A position is an item, or a token where histories are read in words.

    The model may be on the meta device, and is neither run nor changed.

    Args:
        lengths: 0 for a user who is not encoded.
        depth: how many of the first blocks are used; None for all.
        known: counts of a model of the same shapes, which are not made again; new ones are added.

    Raises:
        UncountableError: if the model has a kernel that can't run without numbers or a GPU.
    """
    items, users = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    items, users = items[items > 0], users[items > 0]
    count = product_counter(model, known)
    each = at_lengths(lambda length: count(length).total(depth), items.tolist())
    return sum(flops * many for flops, many in zip(each, users.tolist(), strict=True))


def score_flops(model: Recommender, vectors: float) -> int:
    """FLOPs of scoring every item for so many user vectors."""
    items, width = model.item_matrix().shape
    return int(2 * (items - 1) * width * vectors)


def epoch_flops(
    model: Recommender, lengths: Any, *, scored: float, known: Known | None = None
) -> int:
    """FLOPs of an epoch, forward and backward, as if every weight got a gradient.

    Args:
        lengths: positions that are read of each training window, (windows,).
        scored: for how many vectors the loss scores the catalogue.
        known: as for :func:`encode_flops`.
    """
    forward = encode_flops(model, lengths, known=known) + score_flops(model, scored)
    return (1 + BACKWARD) * forward


def product_counter(model: Recommender, known: Known | None = None) -> Callable[[int], Products]:
    """A function that counts the products of encoding one user with so many items.

    Where the model is small, or its code asks for numbers (how many tokens go to which expert),
    the copy computes with zeros on the processor instead.
    """
    made: Known = {} if known is None else known
    copies: dict[bool, tuple[Recommender, Cache | None]] = {}  # by whether it is one of shapes
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    small = sum(weight.numel() for weight in model.parameters()) <= SMALL

    def run(items: int, *, on_shapes: bool) -> Products:
        with _counting(), shapes if on_shapes else nullcontext():
            if on_shapes not in copies:
                copied = _copied(model, on_shapes=on_shapes)
                copies[on_shapes] = copied, copied.prepare_prompt()
            return _count(*copies[on_shapes], items)

    def count(items: int) -> Products:
        if items not in made:
            try:
                if small or False in copies:  # shapes were not enough before
                    raise NotImplementedError
                made[items] = run(items, on_shapes=True)
            except (NotImplementedError, RuntimeError):
                try:
                    made[items] = run(items, on_shapes=False)
                except NotImplementedError as error:
                    family = type(model.backbone).__name__
                    raise UncountableError(f"{family} has a kernel of its own: {error}") from error
        return made[items]

    return count


def _count(model: Recommender, prompt: Cache | None, items: int) -> Products:
    """One pass, the prompt having run before; products by the module that they belong to."""
    flash_for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={flash_for_cpu: _attention}) as counter:
        model.encode(
            torch.ones(1, items, dtype=torch.long),
            torch.full((1,), items, dtype=torch.long),
            prompt,
        )
    by_module = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    blocks = find_blocks(model.backbone)
    path = next(path for path, module in model.backbone.named_modules() if module is blocks)
    root = type(model.backbone).__name__
    own = [by_module.get(f"{root}.{path}.{index}", 0) for index in range(len(blocks))]
    # maps outside the blocks that make a part for each of them shrink with a cut
    shared = sum(n for name, n in by_module.items() if PER_BLOCK_WEIGHTS.search(name))
    rest = counter.get_total_flops() - sum(own) - shared
    return Products(tuple(flops + shared // len(own) for flops in own), rest)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Torch's counter knows the attention kernels of GPUs alone."""
    return int(sdpa_flop_count(query, key, value))


def _copied(model: Recommender, *, on_shapes: bool) -> Recommender:
    """The model on the processor with other tensors: of shapes alone, or zeros without memory.

    It attends eagerly and computes one expert a token and place, whatever the model does: kernels
    that do the same work hide it from the counter.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]
        for tensors in held:
            for tensor in tensors.values():
                if isinstance(tensor, Tensor) and id(tensor) not in memo:
                    memo[id(tensor)] = _stand_in(tensor, on_shapes=on_shapes)
    twin: Recommender = copy.deepcopy(model, memo).eval()
    if twin.words is not None:  # as many items of one token as there are positions
        twin.words = Words([[0]])
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Linear) and _is_packed(module):
            inner, outer, dtype = module.in_features, module.out_features, twin.backbone.dtype
            plain = nn.Linear(inner, outer, module.bias is not None, device="meta", dtype=dtype)
            for part, weight in list(plain.named_parameters()):
                setattr(plain, part, _stand_in(weight, on_shapes=on_shapes))
            twin.set_submodule(name, plain)
    with suppress(ValueError):  # it has one way to attend
        twin.backbone.set_attn_implementation("eager")
    twin.backbone.set_experts_implementation("batched_mm" if on_shapes else "eager")
    return twin


def _stand_in(tensor: Tensor, *, on_shapes: bool) -> Tensor:
    is_weight = isinstance(tensor, nn.Parameter)
    shape = () if is_weight and not on_shapes else tensor.shape
    values = torch.zeros(shape, dtype=tensor.dtype, device="cpu").expand(tensor.shape)
    return nn.Parameter(values, requires_grad=False) if is_weight else values


def _is_packed(linear: nn.Linear) -> bool:
    """Whether several weights share a byte (bitsandbytes' 4 bits), or are whole numbers."""
    shape = (linear.out_features, linear.in_features)
    return tuple(linear.weight.shape) != shape or not linear.weight.is_floating_point()


@contextmanager
def _counting() -> Iterator[None]:
    with (
        torch.device("cpu"),  # the caller may build on another
        torch.inference_mode(False),  # would leave products whole, which count in their parts
        torch.no_grad(),
        paused_taps(),
        plain_kernels(),
    ):
        yield


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Recurrences in plain PyTorch, also where fused kernels are installed.

    Those run on a GPU alone, and no counter sees into them. transformers leaves them aside when a
    model is exported.
    """
    name = "is_torchdynamo_exporting"
    before = getattr(hub_kernels, name, None)
    if before is not None:
        setattr(hub_kernels, name, lambda: True)
    try:
        yield
    finally:
        if before is not None:
            setattr(hub_kernels, name, before)


def at_lengths(count: Callable[[int], int], lengths: Sequence[int]) -> list[int]:
    """``count`` of each increasing length, exact, calling it for few of them.

    The products of a pass are a quadratic of its length: T positions go through the weights, T^2
    pairs through attention. It is laid through the ends and the middle, and believed if it meets
    the lengths next to the ends: a function with equal steps (a recurrence that works in chunks of
    64 positions) never does. What is no quadratic is halved until its pieces are.
    """
    known = cache(count)

    def between(start: int, end: int) -> list[int]:
        part = lengths[start:end]
        if len(part) <= FEW:
            return [known(length) for length in part]
        places = (part[0], (part[0] + part[-1]) // 2, part[-1])
        values = [known(place) for place in places]
        beside = (part[0] + 1, part[-1] - 1)
        if all(_through(places, values, length) == known(length) for length in beside):
            return [int(_through(places, values, length)) for length in part]
        middle = (start + end) // 2
        return between(start, middle) + between(middle, end)

    return between(0, len(lengths))


def _through(places: Sequence[int], values: Sequence[int], x: int) -> Fraction:
    """The quadratic through three points, at x (Lagrange)."""
    total = Fraction(0)
    for own, value in zip(places, values, strict=True):
        weight = Fraction(value)
        for other in places:
            if other != own:
                weight *= Fraction(x - other, own - other)
        total += weight
    return total
