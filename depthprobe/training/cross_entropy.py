"""The full cross-entropy over the catalogue, which never holds a (positions x items) matrix.

Where a catalogue is too large for whole rows of logits, it goes over the items in tiles, twice:
once for each position's normaliser, once for the gradients (as Cut Cross-Entropy does, arXiv
2411.09009).

No fused kernel on a GPU: those in reach are made for states as wide as a language model's, and a
table of a million items 64 wide is another shape. ``analyses/catalogue_loss`` says which and why.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from depthprobe.training.mean_loss import CHUNK_BYTES, exact_dtype, mean_loss

# positions in a block: with fewer, going over all items and their gradient for each block costs
# more than computing a tile of logits twice; then the blocks are as high as MOST_ROWS
FEWEST_ROWS, MOST_ROWS = 128, 2048


def catalogue_cross_entropy(vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of targets against every item of the catalogue.

    Computed in the dtype of the vectors, or of autocast where that is on. In bfloat16 the three
    kinds of matrix products are; the softmax, the loss and the sums of gradients are in float32.

    Args:
        vectors: user vectors, (N, d).
        items: item table, (I + 1, d); row 0 is padding and never a candidate.
        targets: item ids, (N,), in 1..I.

    Raises:
        ValueError: without a single position, where a mean is undefined.
    """
    device = vectors.device.type
    dtype = vectors.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    return mean_loss(vectors, items, partial(_fill_full, targets=targets, dtype=dtype))


def _fill_full(
    vectors: Tensor,
    items: Tensor,
    d_vectors: Tensor | None,
    d_items: Tensor | None,
    *,
    targets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Cross-entropy over the whole catalogue, (N,), a block of positions after the other.

    Args:
        dtype: of the matrix products.
    """
    count, n_items = len(vectors), len(items) - 1
    exact = exact_dtype(dtype)
    cells = CHUNK_BYTES[vectors.device.type] // exact.itemsize
    whole = cells // n_items  # positions whose logits fit over the whole catalogue
    blocks = -(-count // (whole if whole >= FEWEST_ROWS else MOST_ROWS))
    rows = -(-count // blocks)
    columns = min(n_items, max(1, cells // rows))
    buffer = torch.empty(rows * columns, dtype=exact, device=vectors.device)
    losses = torch.empty(count, dtype=exact, device=vectors.device)
    for start in range(0, count, rows):
        block = slice(start, start + rows)
        losses[block] = _fill_block(
            vectors[block].to(dtype),
            items,
            None if d_vectors is None else d_vectors[block],
            d_items,
            column=targets[block, None] - 1,
            tiles=[(low, min(low + columns, n_items)) for low in range(0, n_items, columns)],
            buffer=buffer,
        )
    return losses


def _fill_block(
    vectors: Tensor,
    items: Tensor,
    d_vectors: Tensor | None,
    d_items: Tensor | None,
    *,
    column: Tensor,
    tiles: list[tuple[int, int]],
    buffer: Tensor,
) -> Tensor:
    """Cross-entropy of a block of positions, (rows,), over the catalogue tile by tile.

    Args:
        column: the targets, (rows, 1), counted from 0.
        tiles: the catalogue in parts, first and end, counted from 0.
        buffer: room for the logits of a tile, in the dtype of the sums.
    """
    catalogue = items[1:]
    largest = buffer.new_full((len(vectors), 1), -torch.inf)
    weight, wanted = torch.zeros_like(largest), torch.zeros_like(largest)
    for low, high in tiles:
        share = _product(vectors, catalogue[low:high].to(vectors.dtype), buffer)  # (rows, width)
        place, inside = _within(column, low, high)
        wanted = torch.where(inside, share.gather(1, place), wanted)
        before, largest = largest, torch.maximum(largest, share.amax(dim=1, keepdim=True))
        # in place from here: the logits become the softmax, then the gradient
        share.sub_(largest).exp_()
        weight = weight * (before - largest).exp_() + share.sum(dim=1, keepdim=True)
    normaliser = largest + weight.log()
    if d_vectors is not None or d_items is not None:
        for low, high in reversed(tiles):
            part = catalogue[low:high].to(vectors.dtype)
            if high == tiles[-1][1]:  # still in the buffer; a small catalogue has no other tile
                share.div_(weight)
            else:
                share = _product(vectors, part, buffer).sub_(normaliser).exp_()
            place, inside = _within(column, low, high)
            # before any rounding: a target's share less one must not cancel in bfloat16
            error = share.scatter_add_(1, place, -inside.to(share.dtype)).to(vectors.dtype)
            if d_vectors is not None:
                _add_product(d_vectors, error, part)
            if d_items is not None:
                _add_product(d_items[1 + low : 1 + high], error.T, vectors)
    return (normaliser - wanted)[:, 0]


def _within(column: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Where in a tile each target is, and whether; without asking a GPU, which would wait."""
    return (column - low).clamp(0, high - low - 1), (column >= low) & (column < high)


def _product(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """(rows, d), (width, d) -> their products (rows, width), in the buffer."""
    out = buffer[: len(left) * len(right)].view(len(left), len(right))
    if left.dtype == buffer.dtype:
        return torch.mm(left, right.T, out=out)
    return out.copy_(left @ right.T)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
