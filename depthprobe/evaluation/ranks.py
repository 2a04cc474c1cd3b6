"""Ranks of targets among all items, tie-aware; the scores of the catalogue exist in chunks only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from depthprobe.data.batches import length_buckets, pad
from depthprobe.data.splits import Part, Split
from depthprobe.evaluation.metrics import LISTS, TOP
from depthprobe.models.recommender import best_columns

CHUNK_BYTES = 64 * 2**20
SMALLEST_BLOCK = 16


@torch.no_grad()
def rank_targets(scores: Any, targets: Any, exclude: Any = None) -> Tensor:
    """Mean rank over ties of each row's target, 1-based.

    ``1 + #(s > s_t) + #(s == s_t, other items) / 2``: what a random order of the tied items gives
    on average, so constant scores put the target in the middle and not on top.

    Args:
        scores: (B, I); infinities are allowed.
        targets: (B,), column indices.
        exclude: (B, I) bool, items that are never counted; the target itself always is.

    Returns:
        (B,) float64, on the CPU. Each argument may be a tensor, an array or nested lists.

    Raises:
        ValueError: if shapes disagree, a target is no column, or a score is NaN.
    """
    table = torch.as_tensor(scores)
    wanted = torch.as_tensor(targets, device=table.device)
    if table.dim() != 2 or wanted.shape != table.shape[:1]:
        raise ValueError(
            f"expected scores (B, I) and targets (B,), got {tuple(table.shape)}"
            f" and {tuple(wanted.shape)}"
        )
    if not wanted.numel():
        return torch.zeros(0, dtype=torch.float64)
    if wanted.is_floating_point() or wanted.dtype == torch.bool:
        raise ValueError(f"targets are {wanted.dtype}, expected integers")
    wanted = wanted.long()
    _check_range(wanted, 0, table.shape[1] - 1)
    _check_nan(table)
    at_target = table.gather(1, wanted[:, None])  # (B, 1)
    above, tied = table > at_target, table == at_target  # (B, I)
    if exclude is not None:
        left_out = torch.as_tensor(exclude, device=table.device)
        if left_out.shape != table.shape or left_out.dtype != torch.bool:
            raise ValueError(
                f"expected exclude {tuple(table.shape)} bool,"
                f" got {tuple(left_out.shape)} {left_out.dtype}"
            )
        above &= ~left_out
        tied &= ~left_out
    tied.scatter_(1, wanted[:, None], False)
    return 1 + above.sum(1).cpu().double() + tied.sum(1).cpu().double() / 2


@torch.no_grad()
def rank_users(
    vectors: Tensor,
    item_matrix: Tensor,
    targets: Any,
    *,
    seen: Sequence[np.ndarray] | None = None,
    negatives: np.ndarray | Tensor | None = None,
    top: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """Rank each user's target by ``vectors @ item_matrix.T + bias``, in chunks of users.

    The scores of a chunk are made once, for both protocols. The target's score is read out of
    them: a dot product made apart can differ in the last bit, and an item tied with the target
    would then count as above or below it. Half precision is raised to float32 for the same
    reason, as it ties items that are not equal.

    Args:
        vectors: (E, d), one a user.
        item_matrix: (I + 1, d); row 0 is padding and never ranked.
        targets: (E,), items 1..I.
        seen: for each user the items to leave out (any number, repeats allowed); the target is
            ranked even if it is among them. None ranks against the whole catalogue.
        negatives: (E, n), items 1..I, for the sampled protocol.
        top: how many of each user's best items to tell as well, as :func:`top_items` would; seen
            ones are left out, the target too if it is among them.
        chunk_bytes: most memory that the scores of a chunk take, and again for working on them;
            one user's row at least.
        bias: (I + 1,), added to the scores.

    Returns:
        ``{"full": (E,)}`` and, with negatives, ``"sampled-<n>"``: float64 on the CPU. With
        ``top``, ``"top-<k>"``: items, int64 (E, k), best first, 0 where none is left.

    Raises:
        ValueError: if shapes disagree, an item is not in 1..I, or a score is NaN.
    """
    vectors, table, shift = _operands(vectors, item_matrix, bias)
    wanted = torch.as_tensor(targets).to(vectors.device).long()
    n_users, n_items = len(vectors), len(table)
    if wanted.shape != (n_users,):
        raise ValueError(f"expected targets ({n_users},), got {tuple(wanted.shape)}")
    if seen is not None and len(seen) != n_users:
        raise ValueError(f"expected seen items of {n_users} users, got {len(seen)}")
    if negatives is not None and (negatives.ndim != 2 or len(negatives) != n_users):
        raise ValueError(f"expected negatives ({n_users}, n), got {tuple(negatives.shape)}")
    _check_range(wanted, 1, n_items)
    full = torch.empty(n_users, dtype=torch.float64)
    ranks = {"full": full}
    if negatives is not None:
        ranks[f"sampled-{negatives.shape[1]}"] = torch.empty_like(full)
    if top:
        ranks[f"top-{top}"] = torch.empty((n_users, top), dtype=torch.int64)
    parts = _chunks(n_users, n_items, vectors.element_size(), chunk_bytes)
    # used again for every chunk: fresh memory of this size costs as much as half the product
    room = vectors.new_empty((parts[0].stop if parts else 0, n_items))
    marks = torch.empty_like(room, dtype=torch.float32)
    for part in parts:
        scores = _score(vectors[part], table, shift, out=room)  # (C, I)
        mark = marks[: len(scores)]
        # one pass: a sum is NaN where a score is; inf - inf is too, so look again before refusing
        if not torch.isfinite(scores.sum()):
            _check_nan(scores, first=part.start)
        column = wanted[part, None] - 1  # (C, 1)
        at_target = scores.gather(1, column)  # (C, 1)
        above = _count(torch.gt(scores, at_target, out=mark))
        level = _count(torch.ge(scores, at_target, out=mark))  # tied ones and the target too
        if seen is not None:
            pairs = _pairs(seen[part], n_items, vectors.device)
            other = pairs[1] != column[pairs[0], 0]
            rows, left_out = pairs[0][other], pairs[1][other]
            apart, limit = scores[rows, left_out], at_target[rows, 0]
            above -= torch.bincount(rows[apart > limit], minlength=len(scores))
            level -= torch.bincount(rows[apart >= limit], minlength=len(scores))
        # above + 1 .. level are the places of the tied items
        full[part] = (above + level + 1).cpu().double() / 2
        if negatives is not None:
            drawn = torch.as_tensor(negatives[part]).to(vectors.device).long() - 1  # (C, n)
            _check_range(drawn + 1, 1, n_items)
            among = scores.gather(1, drawn)
            other = drawn != column
            above = ((among > at_target) & other).sum(1)
            level = ((among >= at_target) & other).sum(1) + 1
            ranks[f"sampled-{drawn.shape[1]}"][part] = (above + level + 1).cpu().double() / 2
        if top:
            if seen is not None:
                scores[pairs] = -torch.inf
            ranks[f"top-{top}"][part] = top_lists(scores, top).cpu()
    return ranks


@torch.no_grad()
def top_items(
    vectors: Tensor,
    item_matrix: Tensor,
    *,
    k: int,
    seen: Sequence[np.ndarray] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` best items of each user, best first, the lower item first on ties.

    Arguments as for :func:`rank_users`; ``seen`` items are left out, and those that score -inf.

    Returns:
        Items 1..I, int64 (E, k), and their scores (E, k), on the CPU. Where a user has fewer than
        ``k`` items left, the last are 0, with the score -inf.

    Raises:
        ValueError: if ``k`` is not in 1..I, shapes disagree, or a score is NaN.
    """
    vectors, table, shift = _operands(vectors, item_matrix, bias)
    n_users, n_items = len(vectors), len(table)
    if not 1 <= k <= n_items:
        raise ValueError(f"k is {k}, expected 1 to {n_items}, the number of items")
    if seen is not None and len(seen) != n_users:
        raise ValueError(f"expected seen items of {n_users} users, got {len(seen)}")
    items = torch.empty((n_users, k), dtype=torch.int64)
    best = torch.empty((n_users, k), dtype=vectors.dtype)
    for part in _chunks(n_users, n_items, vectors.element_size(), chunk_bytes):
        scores = _score(vectors[part], table, shift)
        _check_nan(scores, first=part.start)
        if seen is not None:
            rows, left_out = _pairs(seen[part], n_items, vectors.device)
            scores[rows, left_out] = -torch.inf
        columns, values = best_in_blocks(scores, k)  # (C, k)
        items[part] = (columns + 1).masked_fill_(values == -torch.inf, 0).cpu()
        best[part] = values.cpu()
    return items, best


def best_in_blocks(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same as ``best_columns``, for little more than the price of a maximum.

    A row is cut into blocks of neighbouring columns. Its ``k`` best all lie in the ``k`` blocks
    with the highest maxima, of equal ones the first: any other block has ``k`` columns before it.
    So only these blocks are sorted, about ``2 sqrt(k I)`` numbers in place of I.

    Args:
        scores: (C, I), floating point, without NaN.
        k: from 1 to I.

    Returns:
        Columns, int64 (C, k), best first, the lower one first on ties, and their scores (C, k).
        Where fewer than ``k`` score above -inf, the last columns are any, even past the end.
    """
    width = scores.shape[1]
    block = max(SMALLEST_BLOCK, 2 ** round(math.log2(math.sqrt(width / k))))
    whole = width // block
    if whole <= 2 * k:
        return best_columns(scores, k)
    highest = scores[:, : whole * block].unflatten(1, (whole, block)).amax(2)  # (C, blocks)
    if whole * block < width:
        rest = scores[:, whole * block :].amax(1, keepdim=True)
        highest = torch.cat([highest, rest], dim=1)
    # in the order of the columns, so that of equal scores the lower column comes first below
    chosen = best_columns(highest, k)[0].sort(dim=1).values  # (C, k)
    places = torch.arange(block, device=scores.device)
    columns = (chosen[:, :, None] * block + places).flatten(1)  # (C, k * block)
    found = scores.gather(1, columns.clamp(max=width - 1))
    found.masked_fill_(columns >= width, -torch.inf)  # past the end of the last block
    order, values = best_columns(found, k)
    return columns.gather(1, order), values


def top_lists(scores: Tensor, k: int) -> Tensor:
    """The best items 1..I of each row, best first, int64 (C, k); 0 where none is left.

    Args:
        scores: (C, I) of items 1..I, without NaN; -inf is never recommended.
    """
    most = min(k, scores.shape[1])
    columns, values = best_in_blocks(scores, most)
    lists = torch.zeros((len(scores), k), dtype=torch.int64, device=scores.device)
    lists[:, :most] = (columns + 1).masked_fill_(values == -torch.inf, 0)
    return lists


def _operands(
    vectors: Tensor, item_matrix: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(E, d), (I, d) and (I,) without padding, in one precision of float32 at least."""
    if vectors.dim() != 2 or item_matrix.dim() != 2 or vectors.shape[1] != item_matrix.shape[1]:
        raise ValueError(
            f"expected vectors (E, d) and an item matrix (I + 1, d), got {tuple(vectors.shape)}"
            f" and {tuple(item_matrix.shape)}"
        )
    if len(item_matrix) < 2:
        raise ValueError("the item matrix has no items besides padding")
    if bias is not None and bias.shape != item_matrix.shape[:1]:
        raise ValueError(f"expected bias ({len(item_matrix)},), got {tuple(bias.shape)}")
    dtype = torch.promote_types(
        torch.promote_types(vectors.dtype, item_matrix.dtype), torch.float32
    )
    table = item_matrix[1:].to(vectors.device, dtype)
    return vectors.to(dtype), table, None if bias is None else bias[1:].to(vectors.device, dtype)


def _score(
    vectors: Tensor, table: Tensor, shift: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    into = None if out is None else out[: len(vectors)]
    scores = torch.mm(vectors, table.T, out=into)  # (C, I)
    return scores if shift is None else scores.add_(shift)


def _count(marks: Tensor) -> Tensor:
    """The number of ones in each row: many times faster than over booleans on a CPU."""
    # whole numbers in float32 are exact up to 2^24
    wide = marks.shape[1] > 2**24
    return marks.sum(1, dtype=torch.float64 if wide else torch.float32).long()


def _chunks(n_users: int, n_items: int, itemsize: int, chunk_bytes: int) -> list[slice]:
    size = max(1, chunk_bytes // (n_items * itemsize))
    return [slice(start, min(start + size, n_users)) for start in range(0, n_users, size)]


def _pairs(seen: Sequence[np.ndarray], n_items: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distinct (row, column) pairs of what a chunk of users has seen."""
    rows = np.repeat(np.arange(len(seen), dtype=np.int64), [len(items) for items in seen])
    items = np.concatenate([np.empty(0, np.int64), *(np.asarray(one, np.int64) for one in seen)])
    if len(items) and not (items.min() >= 1 and items.max() <= n_items):
        raise ValueError(f"seen items are {items.min()}..{items.max()}, expected 1..{n_items}")
    pairs = np.unique(rows * n_items + items - 1)  # a repeated item is left out once
    return (
        torch.from_numpy(pairs // n_items).to(device),
        torch.from_numpy(pairs % n_items).to(device),
    )


def _check_range(items: Tensor, low: int, high: int) -> None:
    if items.numel() and not (low <= int(items.min()) and int(items.max()) <= high):
        raise ValueError(
            f"targets or negatives are {int(items.min())}..{int(items.max())},"
            f" expected {low}..{high}"
        )


def _check_nan(scores: Tensor, *, first: int = 0) -> None:
    bad = torch.isnan(scores).any(dim=1)
    if bad.any():
        raise ValueError(f"the scores of row {first + int(bad.nonzero()[0, 0])} hold NaN")


# Rank each evaluated user's target with a trained model: the same users and negatives for all.

BATCH = 256


class Encoder(Protocol):
    """What can be evaluated: histories to user vectors, scored by dot product with the items."""

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) right-padded item ids and (B,) lengths -> (B, d) user vectors."""
        ...

    def item_matrix(self) -> Tensor:
        """(I + 1, d); row 0 is padding."""
        ...


@dataclass(frozen=True)
class EvalSet:
    """Users, what they had taken before, and the target that a model must find.

    With ``lists``, each user's :data:`~depthprobe.evaluation.metrics.TOP` best items are told too.
    """

    users: np.ndarray  # (E,)
    histories: list[np.ndarray]  # E arrays of item ids, the latest last
    targets: np.ndarray  # (E,) item ids
    seen: list[np.ndarray] | None  # items excluded from a user's ranking
    negatives: np.ndarray | None  # (E, 999)
    lists: bool = False

    def batches(
        self, size: int, device: torch.device
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Indices, histories (B, T) and lengths (B,), users of like length together."""
        lengths = np.array([len(history) for history in self.histories])
        for chosen in length_buckets(lengths, size):
            histories = torch.from_numpy(pad([self.histories[i] for i in chosen]))
            yield chosen, histories.to(device), torch.from_numpy(lengths[chosen]).to(device)

    def rank(self, chosen: np.ndarray, vectors: Tensor, items: Tensor) -> dict[str, np.ndarray]:
        """Ranks of the chosen users' targets by protocol, from user vectors (B, d).

        With ``lists``, ``"top-10"`` has their best items, (B, 10).
        """
        ranks = rank_users(
            vectors,
            items,
            torch.from_numpy(self.targets[chosen].astype(np.int64)),
            seen=None if self.seen is None else [self.seen[i] for i in chosen],
            negatives=None
            if self.negatives is None
            else torch.from_numpy(self.negatives[chosen].astype(np.int64)),
            top=TOP if self.lists else 0,
        )
        return {protocol: values.cpu().numpy() for protocol, values in ranks.items()}


def make_eval_set(
    split: Split,
    part: Part,
    *,
    max_history: int,
    filter_seen: bool,
    negatives: np.ndarray | None = None,
    limit: int | None = None,
) -> EvalSet:
    """The evaluation questions of ``validation`` or ``test``.

    Args:
        limit: at most so many users, drawn once with a fixed seed so that every model of a study
            answers the same ones.
        negatives: (E, n) item ids aligned with the part's users, for the sampled protocol.
    """
    users = split.part(part).users
    chosen = np.arange(len(users))
    if limit is not None and limit < len(chosen):
        chosen = np.sort(np.random.default_rng(0).permutation(len(chosen))[:limit])
    return EvalSet(
        users=users[chosen],
        histories=[split.history(part, place, max_history) for place in chosen.tolist()],
        targets=split.targets(part)[chosen],
        seen=[split.history(part, place) for place in chosen.tolist()] if filter_seen else None,
        negatives=None if negatives is None else negatives[chosen],
    )


class Ranks:
    """Ranks by protocol, and lists of items beside them, filled batch by batch."""

    def __init__(self, users: int) -> None:
        self._users = users
        self.values: dict[str, np.ndarray] = {}

    def put(self, chosen: np.ndarray, ranks: dict[str, np.ndarray]) -> None:
        """Store a batch's ranks and lists at the places of its users."""
        for name, values in ranks.items():
            if name not in self.values:
                empty = (0, np.int32) if name == LISTS else (np.nan, np.float64)
                self.values[name] = np.full((self._users, *values.shape[1:]), *empty)
            self.values[name][chosen] = values


@torch.inference_mode()
def evaluate(model: Encoder, eval_set: EvalSet, *, device: torch.device) -> dict[str, np.ndarray]:
    """Rank of every user's target by protocol, each (E,); the model must be in eval mode.

    Where the questions ask for lists, ``"top-10"`` has each user's best items, int32 (E, 10): 0
    where none is left.
    """
    ranks = Ranks(len(eval_set.users))
    items = model.item_matrix()
    for chosen, histories, lengths in eval_set.batches(BATCH, device):
        ranks.put(chosen, eval_set.rank(chosen, model.encode(histories, lengths), items))
    return ranks.values


def mean_ndcg(ranks: Sequence[float] | np.ndarray, k: int = 10) -> float:
    """NDCG@K of ranks, the score that early stopping watches."""
    values = np.asarray(ranks, dtype=np.float64)
    return float(np.where(values <= k, 1 / np.log2(values + 1), 0.0).mean())
