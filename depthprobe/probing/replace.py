"""A span of blocks replaced by a linear map, folded into the weights of the block before it.

ReplaceMe (Shopkhoev et al., arXiv 2505.02819). Let block ``start - 1`` write ``M`` as its MLP's
output, so that the stream after it is ``h_start = r + M``. The span [start, end) is removed, and a
map T, (D, D), is put after that MLP: the stream is then ``r + M T = h_start - M + M T``, and T is
fitted to make that ``h_end``: least squares of ``M T`` on ``h_end + M - h_start``. The MLP ends in
a linear map, so T is folded into its weights: what is left is an ordinary, shallower checkpoint.

Only M is mapped. The rest of the stream, r, passes as in a plain cut.

The paper's other objective is the mean cosine distance of the two states. It has no closed form:
:func:`fit_cosine` begins at the least squares and descends.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers.pytorch_utils import Conv1D

from depthprobe.evaluation.ranks import EvalSet, shared_prompt
from depthprobe.models.blocks import find_blocks
from depthprobe.models.build import intact
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.parts import check_readable, find_projection
from depthprobe.models.taps import Plan, removed_after, tap_blocks
from depthprobe.probing.passes import CausalEncoder, exact

# Of M's mean square in a direction. On users not fitted on, with 1, 5 and 100 positions for each of
# D, the error was least at 1, 0.1 and 0.01; 0.1 was always below plain removal, 0.01 was not.
RIDGE = 0.1
BATCH = 64  # states of every position are in memory, not only of the last
# For the cosine objective, whose positions are all in memory: 3 D numbers each.
POSITIONS = 20_000
STEPS, PATIENCE = 100, 5  # most steps of L-BFGS; and steps without a gain on the held-out users

T = TypeVar("T")
Sums = dict[tuple[str, int, int], Tensor]  # what is summed, start, end


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
    model: CausalEncoder,
    eval_set: EvalSet,
    spans: Sequence[tuple[int, int]],
    *,
    device: torch.device,
    ridge: float = RIDGE,
    batch_size: int = BATCH,
) -> list[Replacement]:
    """Fit the map of each span [start, end), in one pass over the users for all of them.

    With ``E = h_end - h_start`` and ``G = M'M`` over all real positions,
    ``T = I + (G + a I)^-1 M'E``: the minimum of ``||M T - (M + E)||^2 + a ||T - I||^2``. The ridge
    (a in units of ``trace(G) / D``) pulls T to the identity, which is plain removal, so that on
    these users the map is never worse than no map. The paper's pulls T to zero: the same for
    a -> 0, but it also deletes what M writes in directions that these users hardly show.

    Positions are those of a user's items, up to the one that is read out, without padding and
    prompt. Sums are float64; memory is two (D, D) matrices for each span and each start. A block
    whose MLP takes no map (see ``find_projection``) is refused with ``ValueError``.
    """
    total: Sums = {}
    for sums in _by_batch(
        model, eval_set, spans, partial(_normal_equations, spans), device=device, size=batch_size
    ):
        for key, value in sums.items():
            total[key] = total[key].add_(value) if key in total else value
    return [_solve(total, span, ridge) for span in spans]


class _Batch(NamedTuple):
    """Recorded for a batch: M by start, and the states around all blocks, (B, T, D)."""

    written: dict[int, Tensor]
    states: list[Tensor]
    inside: Tensor  # (B, T): which positions are real

    def real(self, values: Tensor) -> Tensor:
        """The values at real positions, in float64, (N, D)."""
        if values.numel() != self.states[0].numel():
            raise ValueError("an MLP's last linear map did not see every position (experts?)")
        return exact(values.reshape(self.states[0].shape)[self.inside])


def _by_batch(
    model: CausalEncoder,
    eval_set: EvalSet,
    spans: Sequence[tuple[int, int]],
    work: Callable[[_Batch], T],
    *,
    device: torch.device,
    size: int,
) -> Iterator[T]:
    """Do the work on each batch of users, again in halves if memory runs out."""
    if not len(eval_set.users):
        raise ValueError("no users to fit a map on")
    for start, end in spans:
        _check_span(model, start, end)
    check_readable(model.backbone)
    written: dict[int, Tensor] = {}  # M by start, as the projection returned it

    def keep(start: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            written[start] = output.clone()  # some blocks add to it in place

        return hook

    starts = {start for start, _ in spans}
    projections = {start: find_projection(model.backbone, start - 1) for start in starts}
    hooks = [each.register_forward_hook(keep(start)) for start, each in projections.items()]
    first = int(getattr(model, "lead", 0))  # after a prompt that is repeated in each row
    batches = eval_set.batches(device=device, size=size, model=model)
    prompt = shared_prompt(model)
    with tap_blocks(model.backbone) as tap, removed_after(hooks):
        for _, histories, lengths in batches:
            with batches.retry():
                model.encode(histories, lengths, *prompt)
                states, last = tap.states, model.last_place(histories, lengths)
                places = torch.arange(states[0].shape[-2], device=states[0].device)
                inside = (places >= first) & (places <= last.to(places.device)[:, None])  # (B, T)
                yield work(_Batch(written, states, inside))


def _normal_equations(spans: Sequence[tuple[int, int]], batch: _Batch) -> Sums:
    """Sums over the real positions of a batch for the least squares.

    By start: the Gram matrix ``M'M``; by span: ``M'(h_end - h_start)``, and the squared sizes of
    the change and of h_end.
    """
    sums: Sums = {}
    for start, end in sorted(set(spans)):
        output, after = batch.real(batch.written[start]), batch.real(batch.states[end])
        moved = after - batch.real(batch.states[start])
        if ("gram", start, start) not in sums:
            sums["gram", start, start] = output.T @ output
        sums["cross", start, end] = output.T @ moved
        sums["moved", start, end] = moved.square().sum()
        sums["size", start, end] = after.square().sum()
    return sums


def _solve(sums: Sums, span: tuple[int, int], ridge: float) -> Replacement:
    gram = sums["gram", span[0], span[0]]
    cross, moved, size_after = (sums[name, *span] for name in ("cross", "moved", "size"))
    size = gram.diagonal().mean()
    # the MLP wrote nothing: any positive a gives the identity
    shift = ridge * size if size > 0 else torch.ones_like(size)
    factor = torch.linalg.cholesky(gram + shift * torch.eye(len(gram)).to(gram))
    change = torch.cholesky_solve(cross, factor)  # T - I
    # ||M (T - I) - E||^2 from the sums alone
    left = (change * (gram @ change - 2 * cross)).sum() + moved
    return Replacement(
        start=span[0],
        end=span[1],
        map=np.eye(len(gram)) + change.cpu().numpy(),
        error=float((left.clamp_min(0) / size_after).sqrt()),
        error_without=float((moved / size_after).sqrt()),
    )


class Activations(NamedTuple):
    """Of N positions, each (N, D): the stream in front of a span is ``rest + written``."""

    written: Tensor  # M
    rest: Tensor  # h_start - M
    after: Tensor  # h_end


def fit_cosine(
    model: CausalEncoder,
    eval_set: EvalSet,
    spans: Sequence[tuple[int, int]],
    *,
    device: torch.device,
    seed: int,
    positions: int = POSITIONS,
    batch_size: int = BATCH,
) -> list[Replacement]:
    """Fit the map of each span to the direction of h_end: the least mean cosine distance.

    Users are drawn with the seed, up to a total number of positions, which are in memory for one
    span at a time. Every fifth user is held out. :func:`descend` begins at the least-squares map of
    the other users, and ``error`` is of that map. Refuses the same blocks as
    :func:`fit_replacements`.
    """
    lengths = getattr(model, "positions", lambda _: eval_set.lengths)(eval_set.histories)
    order = np.random.default_rng(seed).permutation(len(lengths))
    drawn = order[: max(1, np.sum(np.cumsum(np.asarray(lengths)[order]) <= positions))]
    held = drawn[4::5] if len(drawn) > 4 else drawn
    fitting = np.setdiff1d(drawn, drawn[4::5])
    users, others = (_users_of(eval_set, chosen) for chosen in (fitting, held))
    fitted = []
    for start in fit_replacements(model, users, spans, device=device, batch_size=batch_size):
        own, judged = (
            _activations(model, each, (start.start, start.end), device=device, size=batch_size)
            for each in (users, others)
        )
        found = descend(torch.from_numpy(start.map).to(own.written), own, judged)
        error = (own.rest + own.written @ found - own.after).norm() / own.after.norm()
        fitted.append(replace(start, map=found.double().cpu().numpy(), error=float(error)))
    return fitted


def _users_of(eval_set: EvalSet, chosen: np.ndarray) -> EvalSet:
    histories = [eval_set.histories[user] for user in chosen]
    return EvalSet(eval_set.users[chosen], histories, eval_set.targets[chosen], None, None)


@torch.no_grad()
def _activations(
    model: CausalEncoder,
    eval_set: EvalSet,
    span: tuple[int, int],
    *,
    device: torch.device,
    size: int,
) -> Activations:
    def held(batch: _Batch) -> Activations:
        written = batch.real(batch.written[span[0]])
        before, after = (batch.real(batch.states[depth]) for depth in span)
        dtype = torch.promote_types(batch.states[0].dtype, torch.float32)
        return Activations(written.to(dtype), (before - written).to(dtype), after.to(dtype))

    each = _by_batch(model, eval_set, [span], held, device=device, size=size)
    return Activations(*map(torch.cat, zip(*each, strict=True)))


def cosine_distance(linear: Tensor, states: Activations) -> Tensor:
    """The mean of ``1 - cos(h_start - M + M T, h_end)`` over positions, of a map T, (D, D)."""
    mapped = states.rest + states.written @ linear  # (N, D)
    return 1 - cosine_similarity(mapped, states.after, dim=-1).mean()


def descend(
    start: Tensor, states: Activations, held_out: Activations, *, steps: int = STEPS
) -> Tensor:
    """Descend from a map to the one with the least cosine distance on held-out positions, (D, D).

    Each step of L-BFGS lowers the distance on ``states``, by its line search. It ends after a
    number of steps, or after some without a gain on the held-out positions.
    """
    best, least, since = start, float(cosine_distance(start, held_out)), 0

    def as_map(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).reshape(start.shape).to(start)

    def distance(values: np.ndarray) -> tuple[float, np.ndarray]:
        linear = as_map(values).requires_grad_()
        found = cosine_distance(linear, states)
        (gradient,) = torch.autograd.grad(found, linear)
        return found.item(), gradient.double().cpu().numpy().ravel()

    def look(intermediate_result: OptimizeResult) -> None:
        nonlocal best, least, since
        linear, since = as_map(intermediate_result.x.copy()), since + 1
        now = float(cosine_distance(linear, held_out))
        if now < least:
            best, least, since = linear, now, 0
        if since == PATIENCE:
            raise StopIteration

    # the gradient of a mean over positions is small: no tolerance may end it
    options = {"maxiter": steps, "ftol": 0, "gtol": 0}
    first = start.double().cpu().numpy().ravel()
    minimize(distance, first, jac=True, method="L-BFGS-B", callback=look, options=options)
    return best


@torch.no_grad()
def fold_map(model: CausalEncoder, replacement: Replacement, *, cut: bool = False) -> None:
    """Fold the map into the block before the span, in place; with ``cut`` the span is removed.

    Without ``cut`` the map takes effect once the span is skipped. The product is computed in
    float64 and rounded once. Refuses a model that :func:`fit_replacements` refuses, a map of
    another width, or a cut that ``keep_blocks`` refuses; the model is then unchanged.
    """
    projection, folded = _folded(model, replacement)
    if cut:  # before the weights change, since it may be refused
        span = range(replacement.start, replacement.end)
        depth = len(find_blocks(model.backbone))
        keep_blocks(model.backbone, [b for b in range(depth) if b not in span])
    projection.load_state_dict(folded.state_dict())


def plan_fold(model: CausalEncoder, replacement: Replacement) -> Plan:
    """Plan to fold the map in temporarily, with :func:`depthprobe.models.taps.standing_in`."""
    projection, folded = _folded(model, replacement)
    return [(projection, folded.forward)]


@torch.no_grad()
def _folded(model: CausalEncoder, replacement: Replacement) -> tuple[nn.Module, nn.Module]:
    """The linear map that ends the MLP before the span, and a copy with the map folded in."""
    _check_span(model, replacement.start, replacement.end)
    projection = find_projection(model.backbone, replacement.start - 1)
    transposed = isinstance(projection, Conv1D)
    outputs = projection.weight.shape[1 if transposed else 0]
    if replacement.map.shape != (outputs, outputs):
        raise ValueError(f"the map is {replacement.map.shape}, and the stream {outputs} wide")
    # y = x W' + b (`nn.Linear`): y T = x (T'W)' + T'b; y = x W + b (`Conv1D`): y T = x (W T) + T'b
    turned = torch.from_numpy(replacement.map).T  # T'
    old, folded = exact(projection.weight).cpu(), copy.deepcopy(projection)
    folded.weight.copy_((turned @ old.T).T if transposed else turned @ old)
    if folded.bias is not None:
        folded.bias.copy_(turned @ exact(projection.bias).cpu())
    return projection, folded


def _check_span(model: CausalEncoder, start: int, end: int) -> None:
    depth = len(find_blocks(model.backbone))
    if not 0 < start < end <= depth:
        raise ValueError(f"[{start}, {end}) is no span of {depth} blocks behind the first")


FILE, MAP = "replacement.safetensors", "map"


def save_replacement(replacement: Replacement, folder: Path) -> None:
    """Write the fitted map; with the teacher's weights it gives the model again."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in vars(replacement).items() if name != MAP}
    save_file({MAP: replacement.map}, folder / FILE, metadata={"of": json.dumps(rest)})


def load_replacement(folder: Path) -> Replacement:
    """Read what :func:`save_replacement` wrote."""
    with intact(folder / FILE), safe_open(folder / FILE, framework="numpy") as file:
        return Replacement(map=file.get_tensor(MAP), **json.loads(file.metadata()["of"]))
