"""FLOPs of a recommender: encoding users, scoring the catalogue, an epoch of training.

Counted from the shapes, with no weight read and for every family the same way: see
:mod:`depthprobe.cost.shapes`. The conventions:

- A multiply-add is two. What counts are products: linear maps, attention, convolutions. Norms,
  activations, softmax, and what a recurrence does element by element (scans) are left out.
- What is computed counts, needed or not: causal attention is not halved, a sliding window is a
  masked whole, a recurrence that works in chunks fills its last one.
- Of experts those that tokens go to count, top-k of them a token, and those that all tokens go to.
- A shared prompt is computed once for all users and left out; that users attend to it is not. A
  prompt that is repeated for each user counts.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np

from depthprobe.cost.lengths import at_lengths
from depthprobe.cost.shapes import Products, product_counter
from depthprobe.models.recommender import Recommender

Known = MutableMapping[int, Products]  # what was counted of models of the same shapes, by items
BACKWARD = 2  # times the forward pass: a gradient for the input and one for the weights


def flops_per_user(
    model: Recommender, length: int, *, depth: int | None = None, known: Known | None = None
) -> int:
    """FLOPs of encoding one user and scoring the catalogue.

    Args:
        length: items in the history.
        depth: how many of the first blocks are used; None for all.
        known: as for :func:`encode_flops`.

    Raises:
        ValueError: as :func:`encode_flops`.
    """
    encoding = encode_flops(model, np.array([length]), depth=depth, known=known)
    return encoding + score_flops(model, 1)


def encode_flops(
    model: Recommender, lengths: Any, *, depth: int | None = None, known: Known | None = None
) -> int:
    """FLOPs of encoding users with so many items each, (E,), into one vector a user.

    The model may be on the meta device, and is neither run nor changed. Where its own code asks how
    tokens are routed (JetMoE, DBRX), a block of each kind computes with zeros on the CPU.

    Args:
        lengths: 0 for a user who is not encoded.
        depth: how many of the first blocks are used; None for all.
        known: counts of a model of the same shapes, which are not made again; new ones are added.

    Raises:
        ValueError: if the model's code can be counted neither on shapes nor on zeros: it has a
            kernel of its own.
    """
    items, users = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    items, users = items[items > 0], users[items > 0]
    count = product_counter(model, known)
    each = at_lengths(lambda length: count(length).total(depth), items.tolist())
    return sum(flops * many for flops, many in zip(each, users.tolist(), strict=True))


def score_flops(model: Recommender, vectors: float) -> int:
    """FLOPs of scoring every item for so many user vectors."""
    items, width = model.item_matrix().shape
    return int(2 * (items - 1) * width * vectors)


def epoch_flops(
    model: Recommender, lengths: Any, *, scored: float, known: Known | None = None
) -> int:
    """FLOPs of an epoch, forward and backward, as if every weight got a gradient.

    Args:
        lengths: items that are read of each training window, (windows,).
        scored: for how many vectors the loss scores the catalogue.
        known: as for :func:`encode_flops`.
    """
    forward = encode_flops(model, lengths, known=known) + score_flops(model, scored)
    return (1 + BACKWARD) * forward
