"""What is recommended to all users together: how much of the catalogue, how evenly, how popular."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depthprobe.data.splits import Split
from depthprobe.models.recommender import best_columns

TOP = 10  # items in a list
LISTS = f"top-{TOP}"  # where lists stand beside ranks
SMALLEST_BLOCK = 16


@dataclass(frozen=True, eq=False)
class TrainingPopularity:
    """What was taken in training.

    ``popularity`` int64 (I,): interactions of each item. ``usual``: the mean over the test's users
    of the mean popularity of their training items, NaN if none of them has any.
    """

    popularity: np.ndarray
    usual: float


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


def of_lists(counts: np.ndarray, taken: TrainingPopularity) -> dict[str, float]:
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
