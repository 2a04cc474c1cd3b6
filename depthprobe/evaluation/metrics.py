"""HR@K, NDCG@K and MRR of one target a user, from ranks; a mean is the mean of per-user values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthprobe.data.splits import Split

TOP = 10  # items in a list
LISTS = f"top-{TOP}"  # where lists stand beside ranks


def metrics_from_ranks(ranks: Any, ks: Iterable[int] = (1, 5, 10)) -> dict[str, float]:
    """``HR@K`` and ``NDCG@K`` for each K, and ``MRR``: means of :func:`per_user_metric`.

    Args:
        ranks: (U,), 1-based, fractional over ties; a tensor, an array or a list.
        ks: the cut-offs, integers from 1.

    Raises:
        ValueError: if there are no ranks, or one is NaN, infinite or below 1.
    """
    checked = _ranks(ranks)
    if not len(checked):
        raise ValueError("no ranks: nobody was evaluated")
    cuts = sorted(set(ks))
    names = [f"{gain}@{k}" for gain in ("HR", "NDCG") for k in cuts] + ["MRR"]
    return {name: float(per_user_metric(checked, name).mean()) for name in names}


def per_user_metric(ranks: Any, name: str) -> np.ndarray:
    """One metric of each user, float64 (U,): ``HR@K``, ``NDCG@K`` or ``MRR``.

    With one relevant item of rank r: HR@K = [r <= K], NDCG@K = [r <= K] / log2(r + 1), MRR = 1 / r.

    Raises:
        ValueError: if the metric is unknown, or a rank is NaN, infinite or below 1.
    """
    checked = _ranks(ranks)
    if name == "MRR":
        values: np.ndarray = 1 / checked
    elif cut := _cut(name):
        hit = (checked <= cut).astype(np.float64)
        values = hit if name.startswith("HR") else hit / np.log2(checked + 1)
    else:
        raise ValueError(f"metric is {name!r}, expected HR@K, NDCG@K (K from 1) or MRR")
    return values


def check_metrics(
    metrics: Mapping[str, float], *, whole: bool = False, tolerance: float = 1e-9
) -> None:
    """Refuse a table row that no set of ranks can give; other metrics are passed over.

    The share HR@K - HR@1 has ranks above 1 and up to K, and so bounds the rest: for whole ranks
    ``HR@1 + (HR@K - HR@1) / log2(K + 1) <= NDCG@K <= HR@1 + (HR@K - HR@1) / log2(3)``, and
    ``MRR`` lies likewise between ``HR@1 + (HR@K - HR@1) / K`` and ``HR@1 + (HR@K - HR@1) / 2 +
    (1 - HR@K) / (K + 1)``. The mean rank over a tie can be 1.5, or K + 1/2: the upper bounds are
    then wider, with log2(2.5), 1.5 and K + 1/2.

    Args:
        metrics: values as shares, not per cent.
        whole: all ranks are whole numbers (as in published tables): the sharper bounds hold.
        tolerance: how far a bound may be missed; for printed tables, their rounding.

    Raises:
        ValueError: naming the first bound that is missed.
    """
    next_best = 2.0 if whole else 1.5
    after = 1.0 if whole else 0.5

    def at_most(low: float, low_name: str, high: float, high_name: str) -> None:
        if not low <= high + tolerance:  # so that NaN is refused
            raise ValueError(f"{low_name} = {low:.6g} is above {high_name} = {high:.6g}")

    for name, value in metrics.items():
        if _cut(name) or name == "MRR":
            at_most(0.0, "0", value, name)
            at_most(value, name, 1.0, "1")
    for gain in ("HR", "NDCG"):
        cuts = sorted(_cut(name) for name in metrics if name.startswith(f"{gain}@"))
        for pair in itertools.pairwise(cuts):
            names = [f"{gain}@{cut}" for cut in pair]
            at_most(metrics[names[0]], names[0], metrics[names[1]], names[1])
    first = metrics.get("HR@1")
    for cut in sorted(_cut(name) for name in metrics if name.startswith("HR@")):
        hits = metrics[f"HR@{cut}"]
        # without HR@1 it may be anything up to HR@K: all on top, or none
        top, bottom = (hits, 0.0) if first is None else (first, first)
        gain_name, bound = f"NDCG@{cut}", f"its bound from HR@1 and HR@{cut}"
        if gain_name in metrics:
            highest = top + (hits - top) / math.log2(1 + min(next_best, cut))
            at_most(metrics[gain_name], gain_name, highest, bound)
            lowest = bottom + (hits - bottom) / math.log2(cut + 1)
            at_most(lowest, bound, metrics[gain_name], gain_name)
        if "MRR" in metrics:
            highest = top + (hits - top) / next_best + (1 - hits) / (cut + after)
            at_most(metrics["MRR"], "MRR", highest, bound)
            at_most(bottom + (hits - bottom) / cut, bound, metrics["MRR"], "MRR")


def _cut(name: str) -> int:
    gain, _, cut = name.partition("@")
    whole = cut.isascii() and cut.isdigit() and not cut.startswith("0")
    return int(cut) if gain in {"HR", "NDCG"} and whole else 0


def _ranks(ranks: Any) -> np.ndarray:
    if hasattr(ranks, "detach"):  # a tensor; this module needs no torch
        ranks = ranks.detach().cpu()
    checked = np.asarray(ranks, dtype=np.float64)
    if checked.ndim != 1:
        raise ValueError(f"expected ranks (U,), got {checked.shape}")
    bad = ~(np.isfinite(checked) & (checked >= 1))
    if bad.any():
        place = int(bad.argmax())
        raise ValueError(f"rank {place} is {checked[place]}, expected a number from 1")
    return checked


# What is recommended to all users together: how much of the catalogue, how evenly, how popular.


@dataclass(frozen=True, eq=False)
class TrainingPopularity:
    """What was taken in training.

    ``popularity`` int64 (I,): interactions of each item. ``usual``: the mean over the test's users
    of the mean popularity of their training items, NaN if none of them has any.
    """

    popularity: np.ndarray
    usual: float


def exposure(lists: np.ndarray, n_items: int) -> np.ndarray:
    """How many lists hold each item, int64 (I,): item i at place i - 1.

    Args:
        lists: (E, K) items 1..I, no item twice in a row; 0 for no item.
    """
    return np.bincount(np.asarray(lists).ravel(), minlength=n_items + 1)[1:]


def coverage(counts: np.ndarray) -> float:
    """The share of the catalogue that is recommended to anybody, in (0, 1].

    Catalogue coverage (Herlocker et al. 2004; Ge, Delgado-Battenfeld and Jannach 2010). E lists of
    K items can't cover more than ``E K / I``.

    Args:
        counts: how many lists hold each item, (I,); see :func:`exposure`.

    Raises:
        ValueError: if nothing is recommended.
    """
    return float((_counts(counts) > 0).mean())


def gini(counts: np.ndarray) -> float:
    """How unevenly items are recommended: 0 is each equally often, ``1 - 1 / I`` one item alone.

    Half the mean absolute difference between two items' counts, over the mean count:
    ``sum_i (2 i - I - 1) c_(i) / (I sum c)`` with counts in ascending order, items that nobody
    gets included (Shani and Gunawardana 2011, who divide by I - 1).

    Args:
        counts: how many lists hold each item, (I,).

    Raises:
        ValueError: if nothing is recommended.
    """
    ordered = np.sort(_counts(counts)).astype(np.float64)
    weights = 2 * np.arange(1, len(ordered) + 1) - len(ordered) - 1
    return float(weights @ ordered / (len(ordered) * ordered.sum()))


def popularity_ratio(counts: np.ndarray, taken: TrainingPopularity) -> float:
    """Mean popularity of what is recommended, over that of what users took; 1 is as popular.

    The popularity of an item is its number of training interactions. With lists of one length the
    numerator is the average recommendation popularity (Yin et al. 2012), and the value is 1 + the
    relative change of group average popularity, with all users as one group (Abdollahpouri et al.
    2019, arXiv 1907.13286).

    Args:
        counts: how many lists hold each item, (I,).

    Raises:
        ValueError: if nothing is recommended, or nobody took anything.
    """
    if not taken.usual > 0:
        raise ValueError(f"the popularity of what users took is {taken.usual}, expected above 0")
    shown = _counts(counts)
    return float(shown @ taken.popularity / shown.sum() / taken.usual)


def list_metrics(counts: np.ndarray, taken: TrainingPopularity) -> dict[str, float]:
    """``coverage@10``, ``gini@10`` and ``popularity@10`` of what was recommended.

    Empty where nothing was; without the last where no tested user took anything in training.
    """
    if not counts.any():
        return {}
    found = {f"coverage@{TOP}": coverage(counts), f"gini@{TOP}": gini(counts)}
    if taken.usual > 0:
        found[f"popularity@{TOP}"] = popularity_ratio(counts, taken)
    return found


def training_popularity(split: Split) -> TrainingPopularity:
    """The popularity of each item in training, and of what the test's users took there."""
    sequences, users = split.sequences, split.test.users
    items = np.asarray(sequences.items)
    popularity = np.bincount(items[split.trained], minlength=sequences.n_items + 1)
    sums = np.concatenate([[0], np.cumsum(popularity[items])])  # (N + 1,)
    starts, stops = np.asarray(sequences.offsets)[users], split.train_stop[users]
    some = stops > starts
    means = (sums[stops] - sums[starts])[some] / (stops - starts)[some]
    return TrainingPopularity(popularity[1:], float(means.mean()) if len(means) else math.nan)


def _counts(counts: np.ndarray) -> np.ndarray:
    checked = np.asarray(counts)
    if checked.ndim != 1 or not checked.any():
        raise ValueError(f"expected counts (I,) of some recommended item, got {checked.shape}")
    return checked


# How alike two top-K lists are: how many items they share, and how far up they share them.


def overlap(a: Any, b: Any) -> np.ndarray:
    """The share of items that two lists have in common, whatever their order: ``|A & B| / K``.

    Where fewer than K items are left for a user, a list ends in 0s. These are never shared, and K
    is the number of items in the longer list. Two empty lists are alike: 1.

    Args:
        a: (..., K) items from 1, no item twice; 0 at the end for no item.
        b: (..., K) likewise; the leading dimensions are broadcast.

    Returns:
        (...,) float64 in [0, 1].

    Raises:
        ValueError: if shapes disagree, an item is repeated, or one follows a 0.
    """
    first, second = _lists(a, b)
    shared = _matches(first, second).sum(axis=(-2, -1))  # (...,)
    longer = np.maximum(_lengths(first), _lengths(second))
    return np.where(longer > 0, shared / np.maximum(longer, 1), 1.0)


def rank_biased_overlap(a: Any, b: Any, p: float = 0.9) -> np.ndarray:
    """RBO_ext of two lists of equal length (Webber, Moffat and Zobel 2010, eq. 30).

    With ``X_d`` the number of items that the first d places share and ``A_d = X_d / d``, it is
    ``A_K p^K + (1 - p) / p * sum_{d=1..K} A_d p^d``: the agreement at all depths, where the d-th
    weighs ``(1 - p) p^(d - 1)`` and the unseen rest is taken to agree as the K-th does. At p = 0.9
    the first ten places carry 86 % of the weight of an endless list.

    Args:
        a: (..., K) items from 1, best first, no item twice; 0 at the end for no item. K is the
            number of items.
        b: (..., K) likewise; the leading dimensions are broadcast.
        p: above 0 and below 1; the smaller, the more the top counts.

    Returns:
        (...,) float64 in [0, 1]; 1 for two empty lists.

    Raises:
        ValueError: as :func:`overlap`, if ``p`` is not in (0, 1), or if a list has more items than
            the other: that is another formula (eq. 32).
    """
    if not 0 < p < 1:
        raise ValueError(f"p is {p}, expected a number between 0 and 1")
    first, second = _lists(a, b)
    length = _lengths(first)[..., None]  # (..., 1)
    if not np.array_equal(length[..., 0], _lengths(second)):
        raise ValueError("rank-biased overlap needs lists of equal length: some have more 0s")
    matches = _matches(first, second)
    depth = np.arange(1, first.shape[-1] + 1)  # (K,)
    # an item is shared from the lower of its two places on
    joined = [matches[..., d, : d + 1].sum(-1) + matches[..., :d, d].sum(-1) for d in depth - 1]
    agreement = np.cumsum(np.stack(joined, axis=-1), axis=-1) / depth  # (..., K)
    # (1 - p) p^(K - 1) + p^K, the last place and the rest, is p^(K - 1)
    weight = np.where(depth < length, (1 - p) * p ** (depth - 1.0), 0.0)
    weight = np.where(depth == length, p ** (depth - 1.0), weight)  # (..., K)
    alike = np.minimum((weight * agreement).sum(axis=-1), 1.0)
    return np.where(length[..., 0] > 0, alike, 1.0)


def _lists(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of one shape, checked."""
    lists = [np.asarray(each) for each in (a, b)]
    shapes = [each.shape for each in lists]
    if any(not shape for shape in shapes) or not shapes[0][-1] or shapes[0][-1] != shapes[1][-1]:
        raise ValueError(f"expected two (..., K) of items with one K, got {shapes[0]}, {shapes[1]}")
    for each in lists:
        if each.dtype.kind not in "iu":
            raise ValueError(f"items are {each.dtype}, expected integers")
        if ((each[..., 1:] != 0) & (each[..., :-1] == 0)).any():
            raise ValueError("an item follows a 0, expected 0s at the end of a list only")
        ordered = np.sort(each, axis=-1)
        if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != 0)).any():
            raise ValueError("a list has an item twice")
    first, second = np.broadcast_arrays(*lists)
    return first, second


def _matches(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether place i of the one holds the item at place j of the other, bool (..., K, K)."""
    places = first[..., :, None]
    same: np.ndarray = (places == second[..., None, :]) & (places != 0)
    return same


def _lengths(lists: np.ndarray) -> np.ndarray:
    return np.asarray(np.count_nonzero(lists, axis=-1))
