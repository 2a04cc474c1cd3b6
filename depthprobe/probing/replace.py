"""A span of blocks replaced by a linear map, folded into the weights of the block before it.

ReplaceMe (Shopkhoev et al., arXiv 2505.02819). Let block ``start - 1`` write ``M`` as its MLP's
output, so that the stream after it is ``h_start = r + M``. The span [start, end) is removed, and a
map T, (D, D), is put behind that MLP: the stream is then ``r + M T = h_start - M + M T``, and T is
fitted to make that ``h_end``: least squares of ``M T`` on ``h_end + M - h_start``. The MLP ends in
a linear map, so T is folded into its weights: what is left is an ordinary, shallower checkpoint.

Only M is mapped. What attention and the blocks before wrote, r, passes as it does in a plain cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from depthprobe.evaluation.evaluate import Questions
from depthprobe.models.blocks import find_blocks, unwrap
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.sublayers import (
    TOKENS,
    calls_on_few_tokens,
    evaluating,
    find_sublayers,
    original_forwards,
)
from depthprobe.models.tap import first_tensor, paused_taps, tap_blocks
from depthprobe.probing.passes import Probed, encode, exact, prepare_prompt

# Of M's mean square in a direction. On users not fitted on, with 1, 5 and 100 positions for each of
# D, the error was least at 1, 0.1 and 0.01; 0.1 was always below plain removal, 0.01 was not.
RIDGE = 0.1
CALIBRATION_BATCH = 64  # states of every position are held, not only of the last


@dataclass(frozen=True)
class Replacement:
    """The map in place of blocks [start, end), and how well it predicts the state after them."""

    start: int
    end: int
    map: np.ndarray  # (D, D) float64: M T
    error: float  # ||h_start - M + M T - h_end|| / ||h_end|| on the calibration users
    error_without: float  # ||h_start - h_end|| / ||h_end||: the span removed, and no map


@torch.inference_mode()
def fit_replacements(
    model: Probed,
    asked: Questions,
    spans: Sequence[tuple[int, int]],
    *,
    device: torch.device,
    ridge: float = RIDGE,
    batch_size: int = CALIBRATION_BATCH,
) -> list[Replacement]:
    """Fit the map of each span, in one pass over the users for all of them.

    With ``E = h_end - h_start`` and ``G = M'M`` over all real positions,
    ``T = I + (G + a I)^-1 M'E``: the minimum of ``||M T - (M + E)||^2 + a ||T - I||^2``. The ridge
    pulls T to the identity, which is plain removal, so that on these users the map is never worse
    than no map. The paper's ridge pulls T to zero: ``(G + a I)^-1 M'(M + E)``, the same for a -> 0,
    but it also deletes what M writes in directions that these users hardly show.

    Positions are those of a user's items, up to the one that is read out (with what follows the
    items before it); neither padding nor a prompt counts. Sums are float64; memory is a (D, D)
    matrix for each span and each start, however many users there are.

    Args:
        model: in evaluation mode.
        asked: the calibration users; their targets are not used.
        spans: blocks [start, end), 0-based; start at least 1, as block start - 1 takes the map.
        ridge: a in units of ``trace(G) / D``, more than 0. It matters where there are few
            positions for the width: from some 100 D of them on, 0.01 and less do the same.
        batch_size: users at once; the result is the same, memory and time are not.

    Returns:
        one :class:`Replacement` a span, in their order.

    Raises:
        ValueError: without questions; for no such span; or if what the block before a span writes
            is not, as it is, the output of one plain linear map of its own: a norm or a factor
            between them, a mixture of experts, quantised, shared or low-rank adapted weights.
    """
    if not len(asked.users):
        raise ValueError("no questions to fit a map on")
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}: it must be more than 0")
    for start, end in spans:
        _check_span(model, start, end)
    starts = {start for start, _ in spans}
    projections = {start: find_projection(model.backbone, start - 1) for start in starts}
    sums = _Sums(spans)
    prompt = prepare_prompt(model)
    with (
        tap_blocks(model.backbone, consume=sums.take),
        _listening(projections, sums.written),
    ):
        for _, histories, lengths in asked.batches(batch_size, device):
            sums.first = int(getattr(model, "lead", 0))  # a prompt repeated in each row
            sums.last = model.last_place(lengths)
            encode(model, histories, lengths, prompt)
    factors = {start: _factor(sums.gram[start], ridge) for start in starts}
    return [_solve(sums, span, factors[span[0]]) for span in spans]


@torch.no_grad()
def apply_replacement(model: Probed, replacement: Replacement) -> None:
    """Fold the map into the block before the span and remove the span, in place.

    The backbone is then a plain model of fewer blocks, as after ``keep_blocks``. The product is
    taken in float64 and rounded once to the weights' dtype. With y = x W' + b (``nn.Linear``)
    y T = x (T'W)' + T'b; with y = x W + b (GPT-2's ``Conv1D``) y T = x (W T) + T'b.

    Raises:
        ValueError: as :func:`fit_replacements`, if the map is of another width, or if the
            architecture cannot be cut so; the model is unchanged.
    """
    start, end = replacement.start, replacement.end
    _check_span(model, start, end)
    projection = find_projection(model.backbone, start - 1)
    weight, bias = projection.weight, projection.bias
    outputs = weight.shape[1 if isinstance(projection, Conv1D) else 0]
    if replacement.map.shape != (outputs, outputs):
        raise ValueError(f"the map is {replacement.map.shape}, and the stream {outputs} wide")
    keep_blocks(model.backbone, [b for b in range(_depth(model)) if not start <= b < end])
    turned = torch.from_numpy(replacement.map).T  # T'
    old = exact(weight).cpu()
    weight.copy_((turned @ old.T).T if isinstance(projection, Conv1D) else turned @ old)
    if bias is not None:
        bias.copy_(turned @ exact(bias).cpu())


def find_projection(model: nn.Module, index: int) -> Any:
    """The linear map whose output is the last thing that a block adds to the stream.

    Proved on a pass over a few tokens: its output is its weights times its input, it is what the
    block's MLP returns, and if Z takes its place, ``h - M + Z`` is what the block returns.

    Args:
        model: a Hugging Face decoder.
        index: of the block.

    Returns:
        an ``nn.Linear`` or transformers' ``Conv1D``.

    Raises:
        ValueError: if there is none, or its weights can't be changed.
    """
    inner = unwrap(model)
    if getattr(inner, "is_quantized", False):
        raise ValueError("quantised weights take no map: probe the unquantised model")
    block = find_blocks(inner)[index]
    branches = [branch for branch in find_sublayers(inner, [index])[0] if not branch.mixes]
    if len(branches) != 1:
        raise ValueError(f"block {index} has {len(branches)} MLPs, not one to fold a map into")
    branch = block.get_submodule(branches[0].path)
    with torch.no_grad(), paused_taps(), evaluating(inner), original_forwards(inner):
        again = _replay(inner, index)
        seen, before = _observe(branch, again)
        written = seen[branch][1]  # M
        same = [m for m, (_, out) in seen.items() if _equal(out, written)]
        if any(hasattr(module, "base_layer") for module in same):
            raise ValueError(f"the MLP of block {index} is under an adapter: merge it first")
        linear = [module for module in same if isinstance(module, nn.Linear | Conv1D)]
        if not linear:
            raise ValueError(
                f"the MLP of block {index} does not end in one linear map (mixture of experts?)"
            )
        projection = linear[-1]
        _check_weights(inner, projection, index)
        _check_linear(projection, *seen[projection], index)
        _check_added(projection, written, before, again, index)
    return projection


def _depth(model: Probed) -> int:
    return len(find_blocks(model.backbone))


def _check_span(model: Probed, start: int, end: int) -> None:
    depth = _depth(model)
    if start == 0:
        raise ValueError(f"span [0, {end}): no block before it could take the map")
    if not 0 < start < end <= depth:
        raise ValueError(f"[{start}, {end}) is no span of {depth} blocks")


def _replay(model: PreTrainedModel, index: int) -> Callable[[], Tensor]:
    """The block's output (B, T, D), computed again on the same few tokens."""
    block, calls = find_blocks(model)[index], calls_on_few_tokens(model)
    state = calls.states[index].clone()

    def again() -> Tensor:
        # some blocks add to their input in place
        found: Tensor = first_tensor(calls.repeat(block, index, state.clone()))
        return found

    return again


_Seen = dict[nn.Module, tuple[Tensor, Tensor]]  # a module's first input and output


def _observe(branch: nn.Module, again: Callable[[], Tensor]) -> tuple[_Seen, Tensor]:
    seen: _Seen = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = first_tensor(output)
        if isinstance(found, Tensor) and args:
            seen[module] = (args[0].clone(), found.clone())

    handles = [module.register_forward_hook(hook) for module in branch.modules()]
    try:
        output = again()
    finally:
        for handle in handles:
            handle.remove()
    return seen, output


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def _check_weights(model: nn.Module, projection: Any, index: int) -> None:
    where = f"the MLP's last linear map in block {index}"
    for name in ("weight", "bias"):
        value = getattr(projection, name)
        if value is None and name == "bias":
            continue
        if projection._parameters.get(name) is None:
            raise ValueError(f"{where} computes its {name} from others: it takes no map")
        # the 8-bit floats are for storage only
        if value.is_meta or not value.is_floating_point() or value.element_size() < 2:
            raise ValueError(f"{where} is quantised or offloaded: it takes no map")
        users = [p for _, p in model.named_parameters(remove_duplicate=False) if p is value]
        if len(users) > 1:
            raise ValueError(f"{where} shares its {name} with another module: it takes no map")


def _check_linear(projection: Any, source: Tensor, output: Tensor, index: int) -> None:
    matrix = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
    found = source @ matrix
    found = found if projection.bias is None else found + projection.bias
    error = exact(found - output).norm() / exact(output).norm().clamp_min(1e-300)
    if not float(error) <= 64 * torch.finfo(output.dtype).eps:
        raise ValueError(f"the MLP of block {index} does more than its last weights times an input")


def _check_added(
    projection: nn.Module,
    written: Tensor,
    before: Tensor,
    again: Callable[[], Tensor],
    index: int,
) -> None:
    """That the stream takes M as it is, and that nothing else in the block reads it."""
    # another size at each position: a norm would return a normed state as it was
    wave = torch.arange(written.numel(), dtype=torch.float64).sin().reshape(TOKENS, -1)
    wave *= torch.arange(1, TOKENS + 1)[:, None] * float(before.double().square().mean().sqrt())
    other = wave.reshape(written.shape).to(written)  # Z
    handle = projection.register_forward_hook(lambda *_: other.clone())
    try:
        after = again()
    finally:
        handle.remove()
    change = exact(other).reshape(before.shape) - exact(written).reshape(before.shape)
    found = exact(after) - exact(before)
    terms = exact(before).abs() + exact(after).abs() + change.abs()
    if bool(((found - change).abs() <= 16 * torch.finfo(before.dtype).eps * terms).all()):
        return
    factor = (found * change).sum() / change.square().sum()
    scaled = (found - factor * change).norm() <= 1e-2 * found.norm()
    between = f"a factor of {float(factor):.3g}" if scaled else "a norm, or more than a sum,"
    raise ValueError(f"block {index} has {between} between its MLP and the stream: no map fits in")


@contextmanager
def _listening(projections: Mapping[int, nn.Module], written: dict[int, Tensor]) -> Iterator[None]:
    """What each projection returns, under the start of the span behind it."""

    def keep(start: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            written[start] = output.clone()  # some blocks add to it in place

        return hook

    handles = [m.register_forward_hook(keep(start)) for start, m in projections.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """What the fits need of all positions, added up as the states of a pass come in."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self.first, self.last = 0, torch.empty(0)  # a row's real places: first to last (B,)
        self.written: dict[int, Tensor] = {}  # M by start, as the projection returned it
        self.gram: dict[int, Tensor] = {}  # by start: M'M, (D, D)
        self.cross: dict[tuple[int, int], Tensor] = {}  # by span: M'(h_end - h_start), (D, D)
        self.moved: dict[tuple[int, int], Tensor] = {}  # ||h_end - h_start||^2
        self.size: dict[tuple[int, int], Tensor] = {}  # ||h_end||^2
        self._spans = sorted(set(spans))
        self._until = dict(self._spans)  # by start: the largest end
        self._places = {place for span in spans for place in span}
        self._open: dict[int, tuple[Tensor, Tensor]] = {}  # by start: M and h_start, (N, D)

    def take(self, k: int, state: Tensor) -> None:
        """Add what the state (B, T, D) after k blocks tells."""
        if k not in self._places:
            return
        here = self._real(state, state)
        for span in self._spans:
            if span[1] == k:
                output, before = self._open[span[0]]
                moved = here - before
                self.cross[span] = self.cross.get(span, 0) + output.T @ moved
                self.moved[span] = self.moved.get(span, 0) + moved.square().sum()
                self.size[span] = self.size.get(span, 0) + here.square().sum()
        self._open = {s: kept for s, kept in self._open.items() if k < self._until[s]}
        if k in self._until:
            output = self._real(self.written.pop(k), state)
            self.gram[k] = self.gram.get(k, 0) + output.T @ output
            self._open[k] = (output, here)

    def _real(self, values: Tensor, state: Tensor) -> Tensor:
        """The real positions of values like the state, in float64, (N, D)."""
        if values.numel() != state.numel():
            raise ValueError("an MLP's last linear map did not see every position (experts?)")
        places = torch.arange(state.shape[-2], device=values.device)
        real = (places >= self.first) & (places <= self.last.to(values.device)[:, None])  # (B, T)
        return exact(values.reshape(state.shape)[real])


def _factor(gram: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of G + a I, (D, D)."""
    size = gram.diagonal().mean()
    # an MLP that wrote nothing: any positive a gives the identity
    shift = ridge * size if size > 0 else torch.ones_like(size)
    factor: Tensor = torch.linalg.cholesky(gram + shift * torch.eye(len(gram)).to(gram))
    return factor


def _solve(sums: _Sums, span: tuple[int, int], factor: Tensor) -> Replacement:
    gram, cross = sums.gram[span[0]], sums.cross[span]
    change = torch.cholesky_solve(cross, factor)  # T - I
    # ||M (T - I) - E||^2 from the sums alone
    left = (change * (gram @ change - 2 * cross)).sum() + sums.moved[span]
    size = sums.size[span]
    return Replacement(
        start=span[0],
        end=span[1],
        map=np.eye(len(gram)) + change.cpu().numpy(),
        error=float((left.clamp_min(0) / size).sqrt()),
        error_without=float((sums.moved[span] / size).sqrt()),
    )
