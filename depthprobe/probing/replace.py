"""A span of blocks replaced by a linear map, folded into the weights of the block before it.

ReplaceMe (Shopkhoev et al., arXiv 2505.02819). Let block ``start - 1`` write ``M`` as its MLP's
output, so that the stream after it is ``h_start = r + M``. The span [start, end) is removed, and a
map T, (D, D), is put behind that MLP: the stream is then ``r + M T = h_start - M + M T``, and T is
fitted to make that ``h_end``: least squares of ``M T`` on ``h_end + M - h_start``. The MLP ends in
a linear map, so T is folded into its weights: what is left is an ordinary, shallower checkpoint.

Only M is mapped. What attention and the blocks before wrote, r, passes as it does in a plain cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from depthprobe.evaluation.ranks import EvalSet, shared_prompt
from depthprobe.models.blocks import find_blocks
from depthprobe.models.build import intact
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.parts import check_readable, find_projection
from depthprobe.models.taps import removed_after, tap_blocks
from depthprobe.probing.passes import CausalEncoder, exact

# Of M's mean square in a direction. On users not fitted on, with 1, 5 and 100 positions for each of
# D, the error was least at 1, 0.1 and 0.01; 0.1 was always below plain removal, 0.01 was not.
RIDGE = 0.1
BATCH = 64  # states of every position are held, not only of the last

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

    Positions are those of a user's items, up to the one that is read out; neither padding nor a
    prompt counts. Sums are float64; memory is two (D, D) matrices for each span and each start. A
    block whose MLP takes no map (see ``find_projection``) is refused with ``ValueError``.
    """
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
    first = int(getattr(model, "lead", 0))  # behind a prompt that is repeated in each row
    batches = eval_set.batches(device=device, size=batch_size, model=model)
    prompt = shared_prompt(model)
    total: Sums = {}
    with tap_blocks(model.backbone) as tap, removed_after(hooks):
        for _, histories, lengths in batches:
            with batches.retry():
                model.encode(histories, lengths, *prompt)
                last = model.last_place(histories, lengths)
                for key, value in _normal_equations(
                    spans, tap.states, written, first, last
                ).items():
                    total[key] = total[key].add_(value) if key in total else value
    return [_solve(total, span, ridge) for span in spans]


def _normal_equations(
    spans: Sequence[tuple[int, int]],
    states: list[Tensor],
    written: dict[int, Tensor],
    first: int,
    last: Tensor,
) -> Sums:
    """Sums over the real positions of a batch, ``first`` to ``last`` (B,), for the least squares.

    States are (B, T, D), and M by start is of their size. By start: the Gram matrix ``M'M``; by
    span: ``M'(h_end - h_start)``, and the squared sizes of the change and of h_end.
    """
    places = torch.arange(states[0].shape[-2], device=states[0].device)
    inside = (places >= first) & (places <= last.to(places.device)[:, None])  # (B, T)

    def real(values: Tensor) -> Tensor:
        """In float64, (N, D)."""
        if values.numel() != states[0].numel():
            raise ValueError("an MLP's last linear map did not see every position (experts?)")
        return exact(values.reshape(states[0].shape)[inside])

    sums: Sums = {}
    for start, end in sorted(set(spans)):
        output, after = real(written[start]), real(states[end])
        moved = after - real(states[start])
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
    # an MLP that wrote nothing: any positive a gives the identity
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


@torch.no_grad()
def fold_map(model: CausalEncoder, replacement: Replacement, *, cut: bool = False) -> None:
    """Fold the map into the block before the span, in place; with ``cut`` the span is removed.

    Else what it is worth shows once the span is left out. The product is taken in float64 and
    rounded once. A model that :func:`fit_replacements` refuses, a map of another width, or a cut
    that ``keep_blocks`` refuses is refused, and the model is then unchanged.
    """
    _check_span(model, replacement.start, replacement.end)
    projection = find_projection(model.backbone, replacement.start - 1)
    transposed = isinstance(projection, Conv1D)
    outputs = projection.weight.shape[1 if transposed else 0]
    if replacement.map.shape != (outputs, outputs):
        raise ValueError(f"the map is {replacement.map.shape}, and the stream {outputs} wide")
    # y = x W' + b (`nn.Linear`): y T = x (T'W)' + T'b; y = x W + b (`Conv1D`): y T = x (W T) + T'b
    turned = torch.from_numpy(replacement.map).T  # T'
    old, bias = exact(projection.weight).cpu(), projection.bias
    value = (turned @ old.T).T if transposed else turned @ old
    if cut:  # before the weights change: it may be refused
        span = range(replacement.start, replacement.end)
        depth = len(find_blocks(model.backbone))
        keep_blocks(model.backbone, [b for b in range(depth) if b not in span])
    projection.weight.copy_(value)
    if bias is not None:
        bias.copy_(turned @ exact(bias).cpu())


def _check_span(model: CausalEncoder, start: int, end: int) -> None:
    depth = len(find_blocks(model.backbone))
    if not 0 < start < end <= depth:
        raise ValueError(f"[{start}, {end}) is no span of {depth} blocks behind the first")


FILE, MAP = "replacement.safetensors", "map"


def save_replacement(replacement: Replacement, folder: Path) -> None:
    """Write the map as it was fitted; with the teacher's weights it makes the model again."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in vars(replacement).items() if name != MAP}
    save_file({MAP: replacement.map}, folder / FILE, metadata={"of": json.dumps(rest)})


def load_replacement(folder: Path) -> Replacement:
    """Read what :func:`save_replacement` wrote."""
    with intact(folder / FILE), safe_open(folder / FILE, framework="numpy") as file:
        return Replacement(map=file.get_tensor(MAP), **json.loads(file.metadata()["of"]))
