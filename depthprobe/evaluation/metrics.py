"""All metrics: of a target's rank, and of the lists recommended to all users together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthprobe.data.splits import Split

METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")  # of every table
TOP = 10  # items in a list
LISTS = f"top-{TOP}"  # key of the lists among the ranks by protocol

# Metrics of ranks: one target a user, and a mean is the mean of per-user values.


def metrics_from_ranks(ranks: Any, ks: Iterable[int] = (1, 5, 10)) -> dict[str, float]:
    """``HR@K`` and ``NDCG@K`` for each K, and ``MRR``: means of :func:`per_user_metric`.

    Args:
        ranks: (U,), 1-based, fractional over ties, infinite for a target that can't be served: a
            miss by every metric; a tensor, an array or a list.
        ks: the cut-offs, integers from 1.

    Raises:
        ValueError: if there are no ranks, or one is NaN or below 1.
    """
    checked = _checked_ranks(ranks)
    if checked.ndim != 1:
        raise ValueError(f"expected ranks (U,), got {checked.shape}")
    if not len(checked):
        raise ValueError("no ranks: nobody was evaluated")
    cuts = sorted(set(ks))
    names = [f"{gain}@{k}" for gain in ("HR", "NDCG") for k in cuts] + ["MRR"]
    return {name: float(per_user_metric(checked, name).mean()) for name in names}


def per_user_metric(ranks: Any, name: str) -> np.ndarray:
    """One metric of each rank, float64 in the same shape: ``HR@K``, ``NDCG@K`` or ``MRR``.

    With one relevant item of rank r: HR@K = [r <= K], NDCG@K = [r <= K] / log2(r + 1), MRR = 1 / r.
    A target that can't be served has an infinite rank: all are 0.

    Raises:
        ValueError: if the metric is unknown, or a rank is NaN or below 1.
    """
    checked = _checked_ranks(ranks)
    if name == "MRR":
        values: np.ndarray = 1 / checked
    elif cut := _cut_off(name):
        hit = (checked <= cut).astype(np.float64)
        values = hit if name.startswith("HR") else hit / np.log2(checked + 1)
    else:
        raise ValueError(f"metric is {name!r}, expected HR@K, NDCG@K (K from 1) or MRR")
    return values


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Refuse a table row that no set of ranks can give; other metrics are ignored.

    The share HR@K - HR@1 has ranks above 1 and up to K, and so bounds the rest:
    ``HR@1 + (HR@K - HR@1) / log2(K + 1) <= NDCG@K <= HR@1 + (HR@K - HR@1) / log2(2.5)``, and
    ``MRR`` lies likewise between ``HR@1 + (HR@K - HR@1) / K`` and ``HR@1 + (HR@K - HR@1) / 1.5 +
    (1 - HR@K) / (K + 1/2)``: the best mean rank after 1 is 1.5, and K + 1/2 after K.

    Raises:
        ValueError: naming the first bound that is missed.
    """

    def at_most(low: float, low_name: str, high: float, high_name: str) -> None:
        if not low <= high + 1e-9:  # so that NaN is refused
            raise ValueError(f"{low_name} = {low:.6g} is above {high_name} = {high:.6g}")

    for name, value in metrics.items():
        if _cut_off(name) or name == "MRR":
            at_most(0.0, "0", value, name)
            at_most(value, name, 1.0, "1")
    for gain in ("HR@", "NDCG@"):
        own = sorted((name for name in metrics if name.startswith(gain)), key=_cut_off)
        for low, high in itertools.pairwise(own):
            at_most(metrics[low], low, metrics[high], high)
    for hits in (name for name in metrics if name.startswith("HR@")):
        cut, share = _cut_off(hits), metrics[hits]
        # without HR@1 the bounds are 0 and HR@K
        top, bottom = metrics.get("HR@1", share), metrics.get("HR@1", 0.0)
        bound = f"its bound from HR@1 and {hits}"
        if (name := f"NDCG@{cut}") in metrics:
            highest = top + (share - top) / math.log2(1 + min(1.5, cut))
            at_most(metrics[name], name, highest, bound)
            at_most(bottom + (share - bottom) / math.log2(cut + 1), bound, metrics[name], name)
        if "MRR" in metrics:
            highest = top + (share - top) / 1.5 + (1 - share) / (cut + 0.5)
            at_most(metrics["MRR"], "MRR", highest, bound)
            at_most(bottom + (share - bottom) / cut, bound, metrics["MRR"], "MRR")


def _cut_off(name: str) -> int:
    """K of ``HR@K`` and ``NDCG@K``; 0 of other metrics."""
    gain, _, cut = name.partition("@")
    is_number = cut.isascii() and cut.isdigit() and not cut.startswith("0")
    return int(cut) if gain in {"HR", "NDCG"} and is_number else 0


def _checked_ranks(ranks: Any) -> np.ndarray:
    if hasattr(ranks, "detach"):  # a tensor; this module needs no torch
        ranks = ranks.detach().cpu()
    checked = np.asarray(ranks, dtype=np.float64)
    bad = ~(checked >= 1)  # NaN too
    if bad.any():
        place = int(bad.argmax())
        raise ValueError(f"rank {place} is {checked.flat[place]}, expected a number from 1")
    return checked


# Metrics of all users' lists together: how much of the catalogue, how evenly, how popular.


@dataclass(frozen=True, eq=False)
class TrainingPopularity:
    """How popular items are in training, and how popular the test users' own choices were."""

    popularity: np.ndarray  # (I,) int64, training interactions of each item
    usual: float  # the mean over test users of their training items' mean popularity, maybe NaN


def training_popularity(split: Split) -> TrainingPopularity:
    """Compute the popularity of each item in training, and of the test users' choices."""
    sequences, users = split.sequences, split.test.users
    items = np.asarray(sequences.items)
    popularity = np.bincount(items[split.trained], minlength=sequences.n_items + 1)
    sums = np.concatenate([[0], np.cumsum(popularity[items])])  # (N + 1,)
    starts, stops = np.asarray(sequences.offsets)[users], split.train_stop[users]
    some = stops > starts  # under a temporal split a user may begin after training has ended
    means = (sums[stops] - sums[starts])[some] / (stops - starts)[some]
    return TrainingPopularity(popularity[1:], float(means.mean()) if len(means) else math.nan)


def exposure(lists: np.ndarray, n_items: int) -> np.ndarray:
    """How many lists (E, K) hold each item, int64 (I,): item i at place i - 1; 0 is no item."""
    return np.bincount(np.asarray(lists).ravel(), minlength=n_items + 1)[1:]


def list_metrics(counts: np.ndarray, training: TrainingPopularity) -> dict[str, float]:
    """Coverage, Gini index and popularity of the recommended items; empty where there are none.

    - ``coverage@10``: the share of the catalogue that is recommended to any user (Herlocker et al.
      2004; Ge, Delgado-Battenfeld and Jannach 2010). E lists of K items can't cover more than
      ``E K / I``.
    - ``gini@10``: :func:`gini`.
    - ``popularity@10``: mean popularity of the recommended items over that of the users' choices; 1
      is equal. With lists of one length the numerator is the average recommendation popularity
      (Yin et al. 2012), and the value is 1 + the relative change of group average popularity with
      all users as one group (Abdollahpouri et al. 2019, arXiv 1907.13286). Left out where no
      tested user has training items.

    Args:
        counts: how many lists hold each item, (I,); see :func:`exposure`.
    """
    if not counts.any():
        return {}
    metrics = {f"coverage@{TOP}": float((counts > 0).mean()), f"gini@{TOP}": gini(counts)}
    if training.usual > 0:
        shown = counts @ training.popularity / counts.sum()
        metrics[f"popularity@{TOP}"] = float(shown / training.usual)
    return metrics


def gini(counts: np.ndarray) -> float:
    """How unevenly items are recommended: 0 is each equally often, ``1 - 1 / I`` only one item.

    Half the mean absolute difference between two items' counts (I,), over the mean count: ``sum_i
    (2 i - I - 1) c_(i) / (I sum c)`` with counts in ascending order, including items that nobody
    gets (Shani and Gunawardana 2011, who divide by I - 1).
    """
    ordered = np.sort(counts).astype(np.float64)
    weights = 2 * np.arange(1, len(ordered) + 1) - len(ordered) - 1
    return float(weights @ ordered / (len(ordered) * ordered.sum()))
