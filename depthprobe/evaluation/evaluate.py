"""Rank each evaluated user's target with a trained model: the same users and negatives for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from depthprobe.data.batches import length_buckets, pad
from depthprobe.data.splits import Part, Split
from depthprobe.evaluation.lists import LISTS, TOP
from depthprobe.evaluation.ranks import rank_users

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
class Questions:
    """Users, what they had taken before, and the target that a model must find.

    With ``lists``, each user's :data:`~depthprobe.evaluation.lists.TOP` best items are told too.
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


def questions(
    split: Split,
    part: Part,
    *,
    max_history: int,
    filter_seen: bool,
    negatives: np.ndarray | None = None,
    limit: int | None = None,
) -> Questions:
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
    return Questions(
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
def evaluate(model: Encoder, asked: Questions, *, device: torch.device) -> dict[str, np.ndarray]:
    """Rank of every user's target by protocol, each (E,); the model must be in eval mode.

    Where the questions ask for lists, ``"top-10"`` has each user's best items, int32 (E, 10): 0
    where none is left.
    """
    ranks = Ranks(len(asked.users))
    items = model.item_matrix()
    for chosen, histories, lengths in asked.batches(BATCH, device):
        ranks.put(chosen, asked.rank(chosen, model.encode(histories, lengths), items))
    return ranks.values


def mean_ndcg(ranks: Sequence[float] | np.ndarray, k: int = 10) -> float:
    """NDCG@K of ranks, the score that early stopping watches."""
    values = np.asarray(ranks, dtype=np.float64)
    return float(np.where(values <= k, 1 / np.log2(values + 1), 0.0).mean())
