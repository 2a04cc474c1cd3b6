"""The matrix products of a recommender, counted while it runs on shapes: no numbers, no memory.

A formula of the configuration (2 x weights x positions + 4 x T^2 x heads x their size) is right for
a Llama and wrong for experts, low-rank attention, indexers, convolutions, chunked recurrences. So
the model's own code is the formula here: it runs on tensors that have a shape and a type alone
(torch's fake tensors), and each product counts what its shapes say. Blocks that are built alike
count alike, so one of each kind runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import Cache
from transformers.integrations import hub_kernels

from depthprobe.cost.kinds import first_alike
from depthprobe.models.blocks import find_blocks, list_at
from depthprobe.models.cutting import PER_BLOCK_WEIGHTS
from depthprobe.models.prompt import shared_prompt
from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import paused_taps

NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class Products:
    """FLOPs of the products of encoding one user: of each block, and of all else."""

    blocks: tuple[int, ...]
    rest: int  # adapters, projections outside the blocks

    def total(self, depth: int | None = None) -> int:
        """With the first blocks alone; None for all."""
        return sum(self.blocks[:depth]) + self.rest


def product_counter(
    model: Recommender, known: MutableMapping[int, Products] | None = None
) -> Callable[[int], Products]:
    """A function that counts the products of encoding one user with so many items.

    The model is neither run nor changed, and may be on the meta device. Where its code asks for
    numbers (how many tokens go to which expert), they are zeros: a block of each kind is computed.

    Args:
        known: counts by items of a model of the same shapes, which are not made again; new ones
            are added.

    Raises:
        ValueError: by that function, if the model can be counted neither way.
    """
    twins: dict[bool, _Twin] = {}  # made when they are asked: copying may fail, too
    made = {} if known is None else known

    def run(items: int, *, on_shapes: bool) -> Products:
        if on_shapes not in twins:
            mode = FakeTensorMode(allow_non_fake_inputs=True) if on_shapes else None
            twins[on_shapes] = _Twin(model, mode)
        return twins[on_shapes].count(items)

    def either(items: int) -> Products:
        with suppress(*NEEDS_NUMBERS):
            return run(items, on_shapes=False not in twins)
        return run(items, on_shapes=False)

    def count(items: int) -> Products:
        try:
            if items not in made:
                made[items] = either(items)
            return made[items]
        except Exception as error:  # whatever an architecture does
            family = type(model.backbone).__name__
            raise ValueError(f"the FLOPs of {family} can't be counted: {error}") from error

    return count


class _Twin:
    """A copy of a recommender that counts as it runs, on shapes alone or on zeros.

    It attends eagerly and computes one expert a token and place, whatever the model does: kernels
    that do the same work hide it from the counter.
    """

    def __init__(self, model: Recommender, mode: FakeTensorMode | None) -> None:
        self._mode = mode
        self._first = first_alike(model.backbone)
        self._model = self._copied(model)
        self._blocks = [0] * len(self._first)  # FLOPs of the latest pass
        self._done: dict[Any, tuple[int, Any]] = {}  # of a kind of block and its call: what it did
        self._chunks = 0  # of the products outside the blocks that make a part for each
        self._counter = FlopCounterMode(display=False)
        self._prompt: Cache | None = None
        self._ready = False

    def count(self, items: int) -> Products:
        """One pass."""
        with self._running():
            if not self._ready:
                self._prompt, self._ready = self._run_prompt(), True
            self._restart()
            histories = torch.ones(1, items, dtype=torch.long)
            lengths = torch.full((1,), items)
            with self._counter:
                self._model.encode(histories, lengths, self._prompt)
        ran = sum(flops for flops, _ in self._done.values())
        rest = self._counter.get_total_flops() - ran - self._chunks
        return Products(tuple(self._blocks), rest)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with (
            torch.device("cpu"),  # the caller may build on another
            torch.inference_mode(False),  # would leave products whole, which count in their parts
            torch.no_grad(),
            paused_taps(),
            plain_kernels(),
            self._mode or nullcontext(),
        ):
            yield

    def _restart(self) -> None:
        self._blocks = [0] * len(self._first)
        self._done = {}
        self._chunks = 0
        flash_for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self._counter = FlopCounterMode(display=False, custom_mapping={flash_for_cpu: _attention})

    def _run_prompt(self) -> Cache | None:
        """What each block reads of the prompt, from the blocks of its kind that run."""
        model = self._model
        if not len(model.prompt) or model.lead:
            return None
        self._restart()
        return shared_prompt(model.backbone, model.prompt, first=model.first, order=self._first)

    def _copied(self, model: Recommender) -> Recommender:
        memo: dict[int, Any] = {}
        blocks = find_blocks(model.backbone)
        path = next(path for path, module in model.named_modules() if module is blocks)
        alike = {blocks[index] for index, first in enumerate(self._first) if index != first}
        memo |= {id(block): nn.Identity() for block in alike}  # never copied
        for _, module in model.named_modules(memo=set(alike)):
            for held in (module._parameters, module._buffers, vars(module)):
                for tensor in held.values():
                    if isinstance(tensor, Tensor) and id(tensor) not in memo:
                        memo[id(tensor)] = self._stand_in(tensor)
        twin: Recommender = copy.deepcopy(model, memo).eval()
        self._unpack(twin)
        with suppress(ValueError):  # it has one way to attend
            twin.backbone.set_attn_implementation("eager")
        twin.backbone.set_experts_implementation("batched_mm" if self._mode else "eager")
        entries = list_at(twin, path)
        kinds = {first: entries[first] for first in self._first}
        for index, first in enumerate(self._first):
            entry = copy.copy(kinds[first])  # whatever the model asks of a block, it has
            vars(entry)["forward"] = partial(self._run_block, index, kinds[first])
            entries[index] = entry
        for name, part in twin.backbone.named_modules():
            if PER_BLOCK_WEIGHTS.search(name) and isinstance(part, nn.Linear):
                vars(part)["forward"] = partial(self._run_chunks, part.forward)
        return twin

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and type, without memory where it is a weight."""
        is_weight = isinstance(tensor, nn.Parameter)
        shape = () if self._mode is None and is_weight else tensor.shape
        with self._mode or nullcontext():
            values = torch.zeros(shape, dtype=tensor.dtype, device="cpu").expand(tensor.shape)
        return nn.Parameter(values, requires_grad=False) if is_weight else values

    def _unpack(self, twin: Recommender) -> None:
        """Linear maps whose weights are packed (4 bits in bytes) as those that they stand for."""
        for name, module in list(twin.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            inner, outer, weight = module.in_features, module.out_features, module.weight
            if tuple(weight.shape) == (outer, inner) and weight.is_floating_point():
                continue
            has_bias, dtype = module.bias is not None, twin.backbone.dtype
            plain = nn.Linear(inner, outer, has_bias, device="meta", dtype=dtype)
            for part, held in list(plain.named_parameters()):
                setattr(plain, part, self._stand_in(held))
            twin.set_submodule(name, plain)

    def _run_block(self, index: int, block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """What the first block of this kind, called like this, returned; its FLOPs once more."""
        named = tuple((name, _outline(value)) for name, value in kwargs.items())
        call = (self._first[index], tuple(map(_outline, args)), named)
        if call not in self._done:
            before = self._counter.get_total_flops()
            output = block(*args, **kwargs)
            self._done[call] = (self._counter.get_total_flops() - before, output)
        flops, output = self._done[call]
        self._blocks[index] += flops
        return output

    def _run_chunks(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A map outside the blocks that makes a part for each of them, and shrinks with a cut."""
        before = self._counter.get_total_flops()
        output = forward(*args, **kwargs)
        flops = self._counter.get_total_flops() - before
        self._chunks += flops
        self._blocks = [own + flops // len(self._blocks) for own in self._blocks]
        return output


def _outline(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The profiler knows the kernels of GPUs alone."""
    return int(sdpa_flop_count(query, key, value))


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Recurrences in plain PyTorch, also where fused kernels are installed.

    Those run on a GPU alone, and no counter sees into them. transformers leaves them aside when a
    model is exported.
    """
    name = "is_torchdynamo_exporting"
    before = getattr(hub_kernels, name, None)
    if before is None:
        yield
        return
    setattr(hub_kernels, name, lambda: True)
    try:
        yield
    finally:
        setattr(hub_kernels, name, before)
