"""Ranks of targets among all items, with ties; scores of the catalogue exist only in chunks."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from depthprobe.data.batches import length_buckets, pad
from depthprobe.data.splits import Part, Split
from depthprobe.evaluation.metrics import LISTS, TOP
from depthprobe.models.recommender import Recommender, best_columns, is_quantized, score
from depthprobe.models.words import POSITIONS

logger = logging.getLogger(__name__)
T = TypeVar("T")
Ranks = dict[str, np.ndarray]  # of all E users' targets by protocol, (E,); lists under "top-10"

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
            shapes = f"{tuple(table.shape)} bool, got {tuple(excluded.shape)} {excluded.dtype}"
            raise ValueError(f"expected exclude {shapes}")
        counted = ~excluded
        above &= counted
        tied &= counted
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

    The target's score is taken from the catalogue's scores: a separate dot product can differ in
    the last bit, and would place an item tied with the target above or below it. Half precision is
    raised to float32, since it ties items that are not equal.

    Args:
        vectors: (E, d), one per user.
        item_matrix: (I + 1, d); row 0 is padding and never ranked.
        targets: (E,), items 1..I.
        seen: for each user the items to leave out, repeats allowed; the target is ranked even if
            it is among them.
        negatives: (E, n), items 1..I, for the sampled protocol.
        top: how many of each user's best items to return too, without the seen ones.
        chunk_bytes: memory limit for a chunk's scores; ranking needs as much again.

    Returns:
        ``{"full": (E,)}`` and, with negatives, ``"sampled-<n>"``: float64 on the CPU. With
        ``top``, ``"top-<k>"``: see :func:`top_lists`.

    Raises:
        ValueError: if an item is not in 1..I, or a score is NaN.
    """
    n_users, n_items, device = len(vectors), len(item_matrix) - 1, vectors.device
    dtype = torch.promote_types(vectors.dtype, item_matrix.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    vectors = vectors.to(dtype)
    # int8 rows are converted when they are scored
    table = item_matrix if is_quantized(item_matrix) else item_matrix.to(device, dtype)
    columns = torch.as_tensor(targets).to(device).long() - 1  # (E,): column c is item c + 1
    _check_range("targets", columns + 1, 1, n_items)
    full = torch.empty(n_users, dtype=torch.float64)
    ranks = {"full": full}
    if negatives is not None:
        ranks[f"sampled-{negatives.shape[1]}"] = torch.empty_like(full)
    if top:
        ranks[f"top-{top}"] = torch.empty((n_users, top), dtype=torch.int64)
    size = min(max(1, chunk_bytes // (n_items * vectors.element_size())), n_users)
    # reused for every chunk: allocating it anew costs half as much as the product
    room = vectors.new_empty((size, n_items))
    marks = torch.empty_like(room, dtype=torch.float32)
    for start in range(0, n_users, max(size, 1)):
        part = slice(start, min(start + size, n_users))
        scores = score(vectors[part], table, room[: part.stop - start], first=1)  # (C, I)
        # one pass: a sum with a NaN is NaN; so is inf - inf, so check again before refusing
        if not torch.isfinite(scores.sum()):
            _check_nan(scores, first=start)
        column, mark = columns[part, None], marks[: len(scores)]  # (C, 1), (C, I)
        at_target = scores.gather(1, column)  # (C, 1)
        # count all items, then subtract the few seen ones: a mask would be (C, I)
        above = _count(torch.gt(scores, at_target, out=mark))
        level = _count(torch.ge(scores, at_target, out=mark))  # with tied items and the target
        if seen is not None:
            pairs = _pairs(seen[part], n_items, device)
            other = pairs[1] != column[pairs[0], 0]
            rows, left_out = pairs[0][other], pairs[1][other]
            apart, limit = scores[rows, left_out], at_target[rows, 0]
            above -= torch.bincount(rows[apart > limit], minlength=len(scores))
            level -= torch.bincount(rows[apart >= limit], minlength=len(scores))
        # the tied items share the places above + 1 to level
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
    """The number of ones in each row; on a CPU many times faster than summing booleans."""
    exact = torch.float32 if marks.shape[1] <= 2**24 else torch.float64
    return marks.sum(1, dtype=exact).long()


def _pairs(seen: Sequence[np.ndarray], n_items: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distinct (row, column) pairs of the items that a chunk of users has seen."""
    rows = np.repeat(np.arange(len(seen), dtype=np.int64), [len(items) for items in seen])
    items = np.concatenate([np.empty(0, np.int64), *(np.asarray(one, np.int64) for one in seen)])
    _check_range("seen items", torch.from_numpy(items), 1, n_items)
    # an item seen twice must be subtracted once
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
    """The best items 1..I of each row of scores (C, I), the lower one first on ties: int64 (C, k).

    0 if no item is left: -inf is never recommended. Equal to ``best_columns``, for little more than
    the price of a maximum. A row is cut into blocks of neighbouring columns. Its ``k`` best all lie
    in the ``k`` blocks with the highest maxima, the first ones on ties: any other block has ``k``
    better columns before it. So only these are sorted, about ``2 sqrt(k I)`` numbers of I.
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
        # in the order of the columns, so that the lower column comes first on ties below
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
    """A model that can be evaluated: it encodes histories, and scores items by dot product."""

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) right-padded item ids and (B,) lengths -> (B, d) user vectors."""
        ...

    def item_matrix(self) -> Tensor:
        """(I + 1, d); row 0 is padding."""
        ...


def shared_prompt(model: Encoder) -> tuple[Any, ...]:
    """The shared prompt, run once, as the last argument of ``encode``; () without a prompt."""
    prepare = getattr(model, "prepare_prompt", None)
    prompt = prepare() if prepare is not None else None
    return () if prompt is None else (prompt,)


class Batches(Generic[T]):
    """Batches of similar length, the longest first; halved when memory runs out.

    Work on each batch inside ``with batches.retry():``. A batch that does not fit comes again in
    halves, and later batches are as small. So a total may be changed only at the end of the work.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        size: int,
        make: Callable[[np.ndarray], T],
        *,
        positions: int | None = None,
    ) -> None:
        """Cut ``lengths`` into batches of ``size``; ``make`` turns indices (B,) into a batch.

        A batch has at most ``positions`` positions, padding included.
        """
        self._lengths, self._positions = np.asarray(lengths), positions
        self._waiting = deque(length_buckets(lengths, size))
        self._size, self._make = size, make
        self._chosen, self._failed = np.empty(0, np.int64), False

    def __iter__(self) -> Iterator[T]:
        while self._waiting:
            chosen = self._chosen = self._waiting.popleft()
            size = self._size
            if self._positions is not None:
                size = max(1, min(size, self._positions // max(1, self._lengths[chosen].max())))
            if len(chosen) > size:
                parts = np.split(chosen, range(size, len(chosen), size))
                self._waiting.extendleft(reversed(parts))
                continue
            self._failed = False
            yield self._make(chosen)
            if self._failed:  # only here: before, the error's traceback kept the tensors alive
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._size = (len(chosen) + 1) // 2
                self._waiting.appendleft(chosen)
                message = "out of memory with %d users at once: now %d"
                logger.warning(message, len(chosen), self._size)

    @contextmanager
    def retry(self) -> Iterator[None]:
        """Inside the context, running out of memory is an error only for a batch of one user."""
        try:
            yield
        except torch.OutOfMemoryError:
            if len(self._chosen) == 1:
                raise
            self._failed = True


class UserBatch(NamedTuple):
    """Some users of an eval set."""

    chosen: np.ndarray  # (B,) their indices
    histories: Tensor  # (B, T) item ids, right-padded with 0
    lengths: Tensor  # (B,)


@dataclass(frozen=True)
class EvalSet:
    """Users, their histories, and the target that a model must rank.

    With ``lists``, each user's :data:`~depthprobe.evaluation.metrics.TOP` best items are returned.
    """

    users: np.ndarray  # (E,)
    histories: list[np.ndarray]  # E arrays of item ids, the latest last
    targets: np.ndarray  # (E,) item ids
    seen: list[np.ndarray] | None  # items excluded from a user's ranking: a target there is a miss
    negatives: np.ndarray | None  # (E, 999)
    lists: bool = False

    @cached_property
    def misses(self) -> np.ndarray:
        """Users whose target is among the excluded items, bool (E,)."""
        if self.seen is None:
            return np.zeros(len(self.targets), dtype=bool)
        return np.array([t in own for t, own in zip(self.targets, self.seen, strict=True)], bool)

    @property
    def lengths(self) -> list[int]:
        """Lengths of the histories."""
        return [len(history) for history in self.histories]

    def batch(self, chosen: np.ndarray, device: torch.device) -> UserBatch:
        """A batch of the users with these indices, (B,)."""
        own = [self.histories[i] for i in chosen]
        lengths = torch.tensor([len(history) for history in own])
        return UserBatch(chosen, torch.from_numpy(pad(own)).to(device), lengths.to(device))

    def batches(
        self, *, device: torch.device, size: int = BATCH, model: Encoder | None = None
    ) -> Batches[UserBatch]:
        """All users in batches of similar length, cut to what the model reads."""
        make = partial(self.batch, device=device)
        if getattr(model, "words", None) is None:
            return Batches(self.lengths, size, make)
        lengths = cast("Recommender", model).positions(self.histories)
        return Batches(lengths, size, make, positions=POSITIONS)

    def rank(
        self, chosen: np.ndarray, vectors: Tensor, items: Tensor, *, top: int | None = None
    ) -> dict[str, np.ndarray]:
        """Ranks of the chosen users' targets by protocol, from user vectors (B, d).

        A target among the seen items is never served: its rank is infinite, its metrics are 0.
        With ``lists``, ``"top-10"`` has the best items, (B, 10); ``top`` asks for another length.
        """
        ranks = rank_users(
            vectors,
            items,
            self.targets[chosen].astype(np.int64),
            seen=None if self.seen is None else [self.seen[i] for i in chosen],
            negatives=None if self.negatives is None else self.negatives[chosen].astype(np.int64),
            top=TOP * self.lists if top is None else top,
        )
        found = {protocol: values.numpy() for protocol, values in ranks.items()}
        for protocol in [name for name in found if not name.startswith("top-")]:
            found[protocol][self.misses[chosen]] = np.inf
        return found

    def rank_models(
        self, models: list[Ranks], chosen: np.ndarray, vectors: Tensor, items: Tensor
    ) -> None:
        """Rank the chosen users' targets by K models, into an array of all users' ranks per model.

        ``models`` is empty before the first batch. ``vectors`` (K, B, d) are those of each model.
        """
        models += [{} for _ in vectors[len(models) :]]
        for ranks, own in zip(models, vectors, strict=True):
            for name, values in self.rank(chosen, own, items).items():
                if name not in ranks:
                    shape = (len(self.users), *values.shape[1:])
                    ranks[name] = np.empty(shape, np.int32 if name == LISTS else np.float64)
                ranks[name][chosen] = values


def make_eval_set(
    split: Split,
    part: Part,
    *,
    max_history: int,
    filter_seen: bool,
    negatives: np.ndarray | None = None,
    limit: int | None = None,
) -> EvalSet:
    """The users and targets of ``validation`` or ``test``; negatives (E, n) are for all its users.

    A limit draws that many users with a fixed seed: the same ones for every model of a study.
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
def evaluate(model: Encoder, eval_set: EvalSet, *, device: torch.device) -> Ranks:
    """Rank of every user's target by protocol, each (E,); the model must be in eval mode.

    If the eval set asks for lists, ``"top-10"`` has each user's best items, int32 (E, 10).
    """
    models: list[Ranks] = []
    prompt = shared_prompt(model)
    items, batches = model.item_matrix(), eval_set.batches(device=device, model=model)
    for chosen, histories, lengths in batches:
        with batches.retry():
            vectors = model.encode(histories, lengths, *prompt)
            eval_set.rank_models(models, chosen, vectors[None], items)
    return models[0] if models else {}


def mean_ndcg(ranks: Sequence[float] | np.ndarray, k: int = 10) -> float:
    """NDCG@K of ranks, the score that early stopping watches."""
    values = np.asarray(ranks, dtype=np.float64)
    return float(np.where(values <= k, 1 / np.log2(values + 1), 0.0).mean())
