"""Read-outs at every depth of a frozen teacher: fresh output adapters, and tuned lenses.

Early exit reads every depth with the head that was trained after the last block. If it fails,
either the depth does not know the answer yet, or this head can't read it there. A head fitted at
the depth itself tells these apart (a linear probe: Alain and Bengio, arXiv 1610.01644).

A tuned lens keeps the teacher's head and fits a translator in front of it, which turns a depth's
state into what the head expects after the last block: ``U(norm(h + A h + b))`` (Belrose et al.,
arXiv 2303.08112). It learns the teacher's distribution over the items and never sees a target, so
it shows when the teacher has made up its mind; a read-out shows when the target can be known.

Both are affine maps. The states are computed once and kept on disk; then all depths are fitted in
one loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.optim.lr_scheduler import CosineAnnealingLR

from depthprobe.evaluation.ranks import BATCH, EvalSet, Ranks, mean_ndcg
from depthprobe.files import reserve
from depthprobe.probing.passes import CausalEncoder, normed, passes, vectors_of

LENS_USERS = 1024  # users from whom the size of a depth's states is estimated

# model, states (K, B, D), weight (K, D, d), bias (K, 1, d) -> user vectors (K, B, d)
ReadFunction = Callable[[CausalEncoder, Tensor, Tensor, Tensor], Tensor]
# states (L + 1, B, D), targets (B,) -> the goal of `score_gradient`
GoalFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fitting:
    """AdamW whose learning rate falls along half a cosine to 0, the same for all depths."""

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    patience: int = 3  # epochs without a better validation score after which a depth stops


DEFAULT = Fitting()


@dataclass(frozen=True)
class CachedStates:
    """Users, and their states at every depth, at the place where a model reads them out."""

    eval_set: EvalSet
    states: np.ndarray  # (E, L + 1, D), before the final norm, memory-mapped

    def at(self, rows: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The states of some users, (L + 1, B, D)."""
        chosen = torch.from_numpy(np.ascontiguousarray(self.states[rows]))
        return chosen.to(device).to(dtype).transpose(0, 1)


@dataclass(frozen=True)
class Readouts:
    """Fitted maps of each depth, and the epoch of each depth's best score."""

    read: ReadFunction
    weight: Tensor  # (L + 1, D, d)
    bias: Tensor  # (L + 1, 1, d)
    epochs: np.ndarray  # (L + 1,) the epoch of these weights; 0: before the first
    ndcg: np.ndarray  # (L + 1,) validation NDCG@10 by full ranking, after that epoch

    def vectors(self, model: CausalEncoder, states: Tensor) -> Tensor:
        """States (L + 1, B, D), before the final norm, to user vectors (L + 1, B, d)."""
        return self.read(model, states.to(self.weight.dtype), self.weight, self.bias)


@torch.inference_mode()
def cache_states(
    model: CausalEncoder, eval_set: EvalSet, *, path: Path, device: torch.device
) -> CachedStates:
    """Run the model once over the users, into a memory-mapped file of E (L + 1) D numbers.

    In float16, or in float32 if a state does not fit, such as the few huge features of some
    language models. A state that is not finite is refused.
    """
    if not len(eval_set.users):
        raise ValueError("no users to cache the states of")
    for dtype in (torch.float16, torch.float32):
        if _write_states(model, eval_set, path, device, dtype):
            return CachedStates(eval_set, np.load(path, mmap_mode="r"))
    raise ValueError("a state is infinite or NaN")


def _write_states(
    model: CausalEncoder, eval_set: EvalSet, path: Path, device: torch.device, dtype: torch.dtype
) -> bool:
    """Write the states; returns whether all of them fit the dtype."""
    out: np.ndarray | None = None
    for chosen, batch in passes(model, eval_set, device=device):
        states = batch.transpose(0, 1).to(dtype)  # (B, L + 1, D)
        if not torch.isfinite(states).all():
            return False
        rows = states.cpu().numpy()
        if out is None:
            shape = (len(eval_set.users), *rows.shape[1:])
            out = np.lib.format.open_memmap(path, mode="w+", dtype=rows.dtype, shape=shape)
            reserve(path)
        out[chosen] = rows
    return True


def fit_readouts(
    model: CausalEncoder,
    train: CachedStates,
    validation: CachedStates,
    *,
    device: torch.device,
    seed: int,
    settings: Fitting = DEFAULT,
) -> Readouts:
    """Fit a linear map from normed states to user vectors at each depth 0..L.

    Minimises the cross-entropy of the target against the catalogue, scored with the model's own
    item matrix. That is convex in the map, so all start at zero. The model is not changed.
    ``train`` may be the model's own training data, but then the deepest states may know these
    targets better than those of new users; ``validation`` chooses each depth's epoch.
    """
    items = model.item_matrix()
    sample = train.at(np.arange(1), device, torch.promote_types(items.dtype, torch.float32))
    width = _normed(model, sample).shape[-1]
    start = torch.zeros(len(sample), width, items.shape[1]).to(sample)

    cached, goal = (train, validation), lambda _, targets: targets
    return _fit_side_by_side(model, cached, _read_linear, goal, start, seed, settings)


def _read_linear(model: CausalEncoder, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``norm(h) W + b`` at each depth: (K, B, D), (K, D, d), (K, 1, d) -> (K, B, d)."""
    return torch.baddbmm(bias, _normed(model, states), weight)


@torch.no_grad()
def _normed(model: CausalEncoder, states: Tensor) -> Tensor:
    return normed(model, states.to(model.backbone.dtype)).to(states.dtype)


def fit_lenses(
    model: CausalEncoder,
    train: CachedStates,
    validation: CachedStates,
    *,
    device: torch.device,
    seed: int,
    settings: Fitting = DEFAULT,
) -> Readouts:
    """Fit a translator at each depth 0..L - 1; depth L needs none, and keeps the zero one.

    Minimises the KL divergence from the model's own distribution over the items to the translated
    one. All start at zero, which is early exit, and a depth stays there if nothing does better on
    the validation targets. The targets of ``train`` are not used.
    """
    rows = np.arange(min(LENS_USERS, len(train.states)))
    dtype = torch.promote_types(model.item_matrix().dtype, torch.float32)
    sample = train.at(rows, device, dtype)  # (L + 1, B, D)
    # equal steps would move a bias far at depth 0, whose states are small, and hardly
    # after the other blocks
    size = sample.square().mean(dim=(1, 2), keepdim=True).sqrt()  # (L + 1, 1, 1)
    moves = torch.ones_like(size)
    size[-1] = moves[-1] = 0

    def read(model: CausalEncoder, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _read_translated(model, states, moves * weight, size * bias)

    start = sample.new_zeros(len(sample), sample.shape[-1], sample.shape[-1])

    def goal(states: Tensor, _: Tensor) -> Tensor:
        return _unembed(model, states[-1:])[0]

    cached = (train, validation)
    fitted = _fit_side_by_side(model, cached, read, goal, start, seed, settings)
    weight, bias = moves * fitted.weight, size * fitted.bias
    return replace(fitted, read=_read_translated, weight=weight, bias=bias)


def _read_translated(model: CausalEncoder, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``U(norm(h + h A' + b))``: (K, B, D), (K, D, D), (K, 1, D) -> (K, B, d)."""
    return _unembed(model, states + torch.baddbmm(bias, states, weight))


def _unembed(model: CausalEncoder, states: Tensor) -> Tensor:
    return vectors_of(model, states.to(model.backbone.dtype)).to(states.dtype)


def _fit_side_by_side(
    model: CausalEncoder,
    cached: tuple[CachedStates, CachedStates],
    read: ReadFunction,
    goal: GoalFunction,
    weight: Tensor,
    seed: int,
    settings: Fitting,
) -> Readouts:
    """Fit an affine map at each depth, all in one loop over the users: no depth sees another.

    AdamW works element by element and the loss is a sum over depths, so each depth gets the result
    of a separate fit. Each keeps the weights of its best epoch. Weights start at ``weight`` (L + 1,
    D, d), biases at zero.
    """
    device, (train, validation) = weight.device, cached
    table = model.item_matrix().detach()[1:].to(device, weight.dtype)  # (I, d)
    maps = [weight.clone().requires_grad_(), torch.zeros_like(weight[:, :1]).requires_grad_()]
    optimizer = torch.optim.AdamW(
        maps, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batches = math.ceil(len(train.eval_set.users) / settings.batch_size)
    schedule = CosineAnnealingLR(optimizer, T_max=settings.epochs * batches)
    targets = torch.from_numpy(train.eval_set.targets.astype(np.int64))
    best = [each.detach().clone() for each in maps]
    best_ndcg = _validate(model, validation, read, best)  # (L + 1,)
    best_epoch = np.zeros(len(best_ndcg), dtype=np.int64)
    for epoch in range(1, settings.epochs + 1):
        order = np.random.default_rng((seed, epoch)).permutation(len(targets))
        for rows in np.split(order, range(settings.batch_size, len(order), settings.batch_size)):
            rows.sort()  # in ascending order, which the disk reads faster
            states = train.at(rows, device, weight.dtype)  # (L + 1, B, D)
            with torch.no_grad():
                batch_goal = goal(states, targets[torch.from_numpy(rows)].to(device))
            with torch.enable_grad():
                vectors = read(model, states, *maps)  # (L + 1, B, d)
            slope = score_gradient(vectors.detach(), table, batch_goal)
            # not backward(): the model's own weights must get no gradient
            for each, grad in zip(maps, torch.autograd.grad(vectors, maps, slope), strict=True):
                each.grad = grad
            optimizer.step()
            schedule.step()
        ndcg = _validate(model, validation, read, maps)
        # ignore a depth that has run out of patience, as if it had stopped
        better = (ndcg > best_ndcg) & (epoch - best_epoch <= settings.patience)
        best_ndcg[better], best_epoch[better] = ndcg[better], epoch
        depths = torch.from_numpy(better).to(device)
        for each, now in zip(best, maps, strict=True):
            each[depths] = now.detach()[depths]
        if (epoch - best_epoch >= settings.patience).all():
            break
    return Readouts(read, best[0], best[1], best_epoch, best_ndcg)


@torch.no_grad()
def _validate(
    model: CausalEncoder, cached: CachedStates, read: ReadFunction, maps: Sequence[Tensor]
) -> np.ndarray:
    """NDCG@10 of each depth, (L + 1,), by full ranking."""
    eval_set, items, weight = cached.eval_set, model.item_matrix(), maps[0]
    ranks: list[Ranks] = []
    for start in range(0, len(eval_set.users), BATCH):
        chosen = np.arange(start, min(start + BATCH, len(eval_set.users)))
        vectors = read(model, cached.at(chosen, weight.device, weight.dtype), *maps)
        eval_set.rank_models(ranks, chosen, vectors, items)
    return np.array([mean_ndcg(each["full"]) for each in ranks])


@torch.no_grad()
def score_gradient(vectors: Tensor, table: Tensor, goal: Tensor) -> Tensor:
    """The gradient of each depth's mean cross-entropy by its user vectors, (K, B, d).

    With scores ``s = v E'`` it is ``(softmax(s) E - goal) / B``. The first term is attention of
    users to items, and attention kernels go through the catalogue tile by tile (Dao et al., arXiv
    2205.14135): without a graph, and without all scores in memory. ``table`` is the catalogue
    without padding, (I, d). ``goal`` are targets (B,), counted from 1; or user vectors (B, d): then
    it is the gradient of the KL divergence from their shares of the items.
    """
    users = vectors.shape[1]
    # without such a kernel (float64 on a GPU) scores are in memory: so one depth at a time
    depths = len(vectors) if vectors.device.type == "cpu" else 1
    means = torch.cat([_mean_items(part, table) for part in vectors.split(depths)])
    goal = _mean_items(goal, table) if goal.dim() > 1 else table[goal - 1]  # (B, d)
    return means.sub_(goal).div_(users)


def _mean_items(vectors: Tensor, table: Tensor) -> Tensor:
    """``softmax(v E') E``: users (..., d) to the items that they expect, (..., d)."""
    items = table[None, None]
    queries = vectors.flatten(0, -2)[None, None]
    return scaled_dot_product_attention(queries, items, items, scale=1).view_as(vectors)


@torch.inference_mode()
def rank_readouts(
    model: CausalEncoder, fitted: Readouts, eval_set: EvalSet, *, device: torch.device
) -> list[Ranks]:
    """Ranks of every user's target at each depth 0..L, by protocol, each (E,), from one pass."""
    ranks: list[Ranks] = []
    items = model.item_matrix()
    for chosen, states in passes(model, eval_set, device=device):
        eval_set.rank_models(ranks, chosen, fitted.vectors(model, states), items)
    return ranks
