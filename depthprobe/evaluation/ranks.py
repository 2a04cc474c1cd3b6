"""Ranks of targets among all items, tie-aware; the scores of the catalogue exist in chunks only."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from depthprobe.data.batches import length_buckets, pad
from depthprobe.data.splits import Part, Split
from depthprobe.evaluation.metrics import LISTS, TOP
from depthprobe.models.recommender import best_columns

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK_BYTES = 64 * 2**20
SMALLEST_BLOCK = 16
BATCH = 256


@torch.no_grad()
def rank_targets(scores: Any, targets: Any, exclude: Any = None) -> Tensor:
    """Mean rank over ties of each row's target, 1-based.

    ``1 + #(s > s_t) + #(s == s_t, other items) / 2``: what a random order of the tied items gives
    on average, so constant scores put the target in the middle and not on top.

    Args:
        scores: (B, I), a tensor, an array or nested lists, as the others; infinities are allowed.
        targets: (B,), column indices.
        exclude: (B, I) bool, items that are never counted; the target itself always is.

    Returns:
        (B,) float64, on the CPU.

    Raises:
        ValueError: if shapes disagree, a target is no column, or a score is NaN.
    """
    table = torch.as_tensor(scores)
    column = torch.as_tensor(targets, device=table.device)
    if table.dim() != 2 or column.shape != table.shape[:1]:
        shapes = f"{tuple(table.shape)} and {tuple(column.shape)}"
        raise ValueError(f"expected scores (B, I) and targets (B,), got {shapes}")
    if not column.numel():
        return torch.zeros(0, dtype=torch.float64)
    if column.is_floating_point() or column.dtype == torch.bool:
        raise ValueError(f"targets are {column.dtype}, expected integers")
    column = column.long()[:, None]  # (B, 1)
    _check_range("targets", column, 0, table.shape[1] - 1)
    _check_nan(table)
    at_target = table.gather(1, column)  # (B, 1)
    above, tied = table > at_target, table == at_target  # (B, I)
    if exclude is not None:
        excluded = torch.as_tensor(exclude, device=table.device)
        if excluded.shape != table.shape or excluded.dtype != torch.bool:
            shape = f"{tuple(excluded.shape)} {excluded.dtype}"
            raise ValueError(f"expected exclude {tuple(table.shape)} bool, got {shape}")
        above &= ~excluded
        tied &= ~excluded
    tied.scatter_(1, column, False)
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
) -> dict[str, Tensor]:
    """Rank each user's target by ``vectors @ item_matrix.T``, in chunks of users.

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
        top: how many of each user's best items to return as well; seen ones are left out, the
            target too if it is among them.
        chunk_bytes: most memory that the scores of a chunk take, and again for working on them;
            one user's row at least.

    Returns:
        ``{"full": (E,)}`` and, with negatives, ``"sampled-<n>"``: float64 on the CPU. With
        ``top``, ``"top-<k>"``: see :func:`top_lists`.

    Raises:
        ValueError: if shapes disagree, an item is not in 1..I, or a score is NaN.
    """
    n_users, n_items = len(vectors), len(item_matrix) - 1
    if vectors.dim() != 2 or item_matrix.dim() != 2 or vectors.shape[1] != item_matrix.shape[1]:
        shapes = f"{tuple(vectors.shape)} and {tuple(item_matrix.shape)}"
        raise ValueError(f"expected vectors (E, d) and an item matrix (I + 1, d), got {shapes}")
    for name, values in (("targets", targets), ("seen", seen), ("negatives", negatives)):
        if values is not None and len(values) != n_users:
            raise ValueError(f"expected {name} of {n_users} users, got {len(values)}")
    dtype = torch.promote_types(vectors.dtype, item_matrix.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    vectors, device = vectors.to(dtype), vectors.device
    table = item_matrix[1:].to(device, dtype)  # (I, d), so column c is item c + 1
    columns = torch.as_tensor(targets).to(device).long() - 1  # (E,)
    _check_range("targets", columns + 1, 1, n_items)
    full = torch.empty(n_users, dtype=torch.float64)
    ranks = {"full": full}
    if negatives is not None:
        ranks[f"sampled-{negatives.shape[1]}"] = torch.empty_like(full)
    if top:
        ranks[f"top-{top}"] = torch.empty((n_users, top), dtype=torch.int64)
    size = min(max(1, chunk_bytes // (n_items * vectors.element_size())), n_users)
    # used again for every chunk: fresh memory of this size costs as much as half the product
    room = vectors.new_empty((size, n_items))
    marks = torch.empty_like(room, dtype=torch.float32)
    for start in range(0, n_users, max(size, 1)):
        part = slice(start, min(start + size, n_users))
        scores = torch.mm(vectors[part], table.T, out=room[: part.stop - start])  # (C, I)
        # one pass: a sum is NaN where a score is; inf - inf is too, so look again before refusing
        if not torch.isfinite(scores.sum()):
            _check_nan(scores, first=start)
        column, mark = columns[part, None], marks[: len(scores)]  # (C, 1), (C, I)
        at_target = scores.gather(1, column)  # (C, 1)
        # all items first, then less the seen ones: they are few, and a mask would be (C, I)
        above = _count(torch.gt(scores, at_target, out=mark))
        level = _count(torch.ge(scores, at_target, out=mark))  # tied ones and the target too
        if seen is not None:
            pairs = _pairs(seen[part], n_items, device)
            other = pairs[1] != column[pairs[0], 0]
            rows, left_out = pairs[0][other], pairs[1][other]
            apart, limit = scores[rows, left_out], at_target[rows, 0]
            above -= torch.bincount(rows[apart > limit], minlength=len(scores))
            level -= torch.bincount(rows[apart >= limit], minlength=len(scores))
        # above + 1 .. level are the places of the tied items
        full[part] = (above + level + 1).cpu().double() / 2
        if negatives is not None:
            drawn = torch.as_tensor(negatives[part]).to(device).long() - 1  # (C, n)
            _check_range("negatives", drawn + 1, 1, n_items)
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


def _count(marks: Tensor) -> Tensor:
    """The number of ones in each row: many times faster than over booleans on a CPU."""
    # whole numbers in float32 are exact up to 2^24
    wide = marks.shape[1] > 2**24
    return marks.sum(1, dtype=torch.float64 if wide else torch.float32).long()


def _pairs(seen: Sequence[np.ndarray], n_items: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distinct (row, column) pairs of what a chunk of users has seen."""
    rows = np.repeat(np.arange(len(seen), dtype=np.int64), [len(items) for items in seen])
    items = np.concatenate([np.empty(0, np.int64), *(np.asarray(one, np.int64) for one in seen)])
    _check_range("seen items", torch.from_numpy(items), 1, n_items)
    # a repeated item is left out once
    pairs = torch.from_numpy(np.unique(rows * n_items + items - 1)).to(device)
    return pairs // n_items, pairs % n_items


def _check_range(name: str, items: Tensor, low: int, high: int) -> None:
    if items.numel() and not (low <= int(items.min()) and int(items.max()) <= high):
        given = f"{int(items.min())}..{int(items.max())}"
        raise ValueError(f"{name} are {given}, expected {low}..{high}")


def _check_nan(scores: Tensor, *, first: int = 0) -> None:
    bad = torch.isnan(scores).any(dim=1)
    if bad.any():
        raise ValueError(f"the scores of row {first + int(bad.nonzero()[0, 0])} hold NaN")


def top_lists(scores: Tensor, k: int) -> Tensor:
    """The best items 1..I of each row, best first, the lower one first on ties.

    What ``best_columns`` finds, for little more than the price of a maximum. A row is cut into
    blocks of neighbouring columns. Its ``k`` best all lie in the ``k`` blocks with the highest
    maxima, of equal ones the first: any other block has ``k`` columns before it. So only these
    blocks are sorted, about ``2 sqrt(k I)`` numbers in place of I.

    ``scores`` (C, I) of items 1..I hold no NaN, and -inf is never recommended. The lists are int64
    (C, k), 0 where no item is left; k may be more than I.
    """
    width = scores.shape[1]
    most = min(k, width)
    block = max(SMALLEST_BLOCK, 2 ** round(math.log2(math.sqrt(width / most))))
    n_full = width // block
    if n_full <= 2 * most:
        columns, values = best_columns(scores, most)
    else:
        highest = scores[:, : n_full * block].unflatten(1, (n_full, block)).amax(2)  # (C, blocks)
        if n_full * block < width:  # the last block is shorter
            rest = scores[:, n_full * block :].amax(1, keepdim=True)
            highest = torch.cat([highest, rest], dim=1)
        # in the order of the columns, so that of equal scores the lower column comes first below
        chosen = best_columns(highest, most)[0].sort(dim=1).values  # (C, k)
        places = torch.arange(block, device=scores.device)
        columns = (chosen[:, :, None] * block + places).flatten(1)  # (C, k * block)
        candidates = scores.gather(1, columns.clamp(max=width - 1))
        candidates.masked_fill_(columns >= width, -torch.inf)  # past the end of the last block
        order, values = best_columns(candidates, most)
        columns = columns.gather(1, order)
    lists = torch.zeros((len(scores), k), dtype=torch.int64, device=scores.device)
    lists[:, :most] = (columns + 1).masked_fill_(values == -torch.inf, 0)
    return lists


# Evaluation: the target of each user ranked by a model, with the same users and negatives for all.


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
    """Users, their histories, and the target that a model must rank.

    With ``lists``, each user's :data:`~depthprobe.evaluation.metrics.TOP` best items come along.
    """

    users: np.ndarray  # (E,)
    histories: list[np.ndarray]  # E arrays of item ids, the latest last
    targets: np.ndarray  # (E,) item ids
    seen: list[np.ndarray] | None  # items excluded from a user's ranking
    negatives: np.ndarray | None  # (E, 999)
    lists: bool = False

    def map_batches(
        self,
        function: Callable[[np.ndarray, Tensor, Tensor], T],
        *,
        device: torch.device,
        size: int = BATCH,
    ) -> Iterator[tuple[np.ndarray, T]]:
        """Call ``function(chosen, histories, lengths)`` on users of like length together.

        ``chosen`` (B,) are indices of users, ``histories`` (B, T), ``lengths`` (B,). When memory
        runs out the batch is cut in half, and so are those that follow. The function is then
        called again for some of the same users: it must not add to a total.

        Yields:
            ``chosen``, and what the function returned for them.
        """
        lengths = np.array([len(history) for history in self.histories])
        waiting = deque(length_buckets(lengths, size))
        while waiting:
            chosen = waiting.popleft()
            if len(chosen) > size:
                pieces = [chosen[at : at + size] for at in range(0, len(chosen), size)]
                waiting.extendleft(reversed(pieces))
                continue
            histories = torch.from_numpy(pad([self.histories[i] for i in chosen]))
            own = torch.from_numpy(lengths[chosen])
            try:
                value = function(chosen, histories.to(device), own.to(device))
            except torch.OutOfMemoryError:
                if len(chosen) == 1:
                    raise
                size = (len(chosen) + 1) // 2
                waiting.appendleft(chosen)
            else:
                yield chosen, value
                continue
            # after the handler: the error's traceback holds on to what did not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("out of memory with %d users at once: now %d", len(chosen), size)

    def rank(
        self, chosen: np.ndarray, vectors: Tensor, items: Tensor, *, top: int | None = None
    ) -> dict[str, np.ndarray]:
        """Ranks of the chosen users' targets by protocol, from user vectors (B, d).

        With ``lists``, ``"top-10"`` has their best items, (B, 10); ``top`` is another length.
        """
        ranks = rank_users(
            vectors,
            items,
            torch.from_numpy(self.targets[chosen].astype(np.int64)),
            seen=None if self.seen is None else [self.seen[i] for i in chosen],
            negatives=None
            if self.negatives is None
            else torch.from_numpy(self.negatives[chosen].astype(np.int64)),
            top=TOP * self.lists if top is None else top,
        )
        return {protocol: values.numpy() for protocol, values in ranks.items()}

    def rank_models(
        self, batches: Iterable[tuple[np.ndarray, Tensor]], items: Tensor
    ) -> list[dict[str, np.ndarray]]:
        """Ranks of all users' targets by K models, each (E,) by protocol.

        ``batches`` are indices of users (B,) and their vectors by each model, (K, B, d); ``items``
        is the item matrix, (I + 1, d).
        """
        models: list[dict[str, np.ndarray]] = []
        for chosen, vectors in batches:
            models = models or [{} for _ in vectors]
            for ranks, own in zip(models, vectors, strict=True):
                for name, values in self.rank(chosen, own, items).items():
                    if name not in ranks:
                        shape = (len(self.users), *values.shape[1:])
                        ranks[name] = np.empty(shape, np.int32 if name == LISTS else np.float64)
                    ranks[name][chosen] = values
        return models


def make_eval_set(
    split: Split,
    part: Part,
    *,
    max_history: int,
    filter_seen: bool,
    negatives: np.ndarray | None = None,
    limit: int | None = None,
) -> EvalSet:
    """The users and targets of ``validation`` or ``test``.

    Args:
        limit: at most so many users, drawn once with a fixed seed so that every model of a study
            is evaluated on the same ones.
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


@torch.inference_mode()
def evaluate(model: Encoder, eval_set: EvalSet, *, device: torch.device) -> dict[str, np.ndarray]:
    """Rank of every user's target by protocol, each (E,); the model must be in eval mode.

    Where the eval set wants lists, ``"top-10"`` has each user's best items, int32 (E, 10): 0 where
    none is left.
    """
    items = model.item_matrix()
    encoded = eval_set.map_batches(lambda _, *batch: model.encode(*batch), device=device)
    one_model = ((chosen, vectors[None]) for chosen, vectors in encoded)  # (1, B, d)
    return next(iter(eval_set.rank_models(one_model, items)), {})


def mean_ndcg(ranks: Sequence[float] | np.ndarray, k: int = 10) -> float:
    """NDCG@K of ranks, the score that early stopping watches."""
    values = np.asarray(ranks, dtype=np.float64)
    return float(np.where(values <= k, 1 / np.log2(values + 1), 0.0).mean())
