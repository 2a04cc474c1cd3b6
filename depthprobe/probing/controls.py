"""Controls for probes: histories in random order, and random choices of blocks.

If the order of a history does not matter, attention only has to weigh items, and the log can't tell
deep models from shallow ones. Klenitskiy et al. (arXiv 2408.12008) measure how much it matters:
shuffle the histories that a trained model reads, and see what it loses.

A score that says which blocks can go must do better than the same number of random blocks, and its
reverse should do worse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from depthprobe.evaluation.metrics import metrics_from_ranks
from depthprobe.evaluation.ranks import EvalSet, Ranks

SHUFFLES = 5  # of each history
DRAWS = 20  # random sets of blocks at a depth

Kept = tuple[int, ...]  # indices of the blocks that are kept


def shuffled(eval_set: EvalSet, draw: int) -> EvalSet:
    """The same users, targets and seen items, with the read part of each history in random order.

    The last item moves too, as in the paper. The same draw gives every model the same order.
    """
    generator = np.random.default_rng(draw)
    return replace(eval_set, histories=[generator.permutation(h) for h in eval_set.histories])


def without_order(rank: Callable[[EvalSet], Sequence[Ranks]], eval_set: EvalSet) -> pd.DataFrame:
    """Ranks of every target before and after shuffling, for each model that ``rank`` gives.

    One row per model and user: ``place``, the model's place in the answer of ``rank``; ``user``;
    ``rank``; and ``shuffled-1`` to ``shuffled-5``, its ranks with the histories in random orders.
    """
    plain = replace(eval_set, negatives=None, lists=False)
    sets = [plain, *(shuffled(plain, draw) for draw in range(SHUFFLES))]
    names = ["rank", *(f"shuffled-{draw + 1}" for draw in range(SHUFFLES))]
    answers = dict(zip(names, map(rank, sets), strict=True))
    return pd.concat(
        [
            pd.DataFrame(
                {"place": place, "user": eval_set.users}
                | {name: ranks[place]["full"].astype(np.float32) for name, ranks in answers.items()}
            )
            for place in range(len(answers["rank"]))
        ],
        ignore_index=True,
    )


def random_sets(depth: int, blocks: int, *, draws: int = DRAWS, seed: int = 0) -> list[Kept]:
    """Different random sets of ``depth`` blocks; all such sets if there are no more.

    >>> random_sets(1, 3)
    [(0,), (1,), (2,)]
    """
    if math.comb(blocks, depth) <= draws:
        return list(itertools.combinations(range(blocks), depth))
    generator, sets = np.random.default_rng((seed, depth)), dict[Kept, None]()
    while len(sets) < draws:
        drawn = generator.choice(blocks, depth, replace=False)
        sets[tuple(sorted(drawn.tolist()))] = None
    return list(sets)


def by_score(damage: Iterable[float], depth: int, *, reverse: bool = False) -> Kept:
    """The blocks with the highest scores, the later ones on ties; in reverse the lowest."""
    order = np.argsort(np.asarray(list(damage)), kind="stable")
    return tuple(sorted((order[:depth] if reverse else order[len(order) - depth :]).tolist()))


def against_random(
    chosen: Mapping[tuple[str, Kept], Ranks], drawn: Mapping[Kept, Ranks]
) -> pd.DataFrame:
    """Compare chosen sets of blocks with random sets of the same size.

    Args:
        chosen: ranks of each selection's set, by its name and the blocks.
        drawn: ranks of the random sets, by their blocks.

    Returns:
        One row per set and metric: ``selection`` (``random`` for drawn sets), ``depth``, ``kept``,
        ``metric``, ``value``. A selection also has ``beats``, the share of the other sets that it
        beats, and ``p``, the one-sided p-value of a permutation test: (1 + sets that are as good) /
        (1 + sets). It is exact if all sets were drawn.
    """
    values = {kept: metrics_from_ranks(ranks["full"]) for kept, ranks in drawn.items()}
    rows = []
    for kept, own in values.items():
        rows += [("random", kept, metric, value, np.nan, np.nan) for metric, value in own.items()]
    for (selection, kept), ranks in chosen.items():
        alike = [v for other, v in values.items() if len(other) == len(kept) and other != kept]
        for metric, value in metrics_from_ranks(ranks["full"]).items():
            others = np.array([own[metric] for own in alike])
            beats, p = (others < value).mean(), (1 + (others >= value).sum()) / (1 + len(others))
            rows.append((selection, kept, metric, value, beats, p))
    frame = pd.DataFrame(rows, columns=["selection", "kept", "metric", "value", "beats", "p"])
    frame.insert(1, "depth", frame["kept"].map(len))
    return frame.assign(kept=frame["kept"].map(lambda kept: ",".join(map(str, kept))))
