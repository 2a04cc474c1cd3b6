"""Depths and blocks as people write them: ``1,2,4``, ``1-12``, ``all``, ``auto``; ``0,10-11``."""

from __future__ import annotations

from collections.abc import Iterable

from depthprobe.study.errors import BadInput


def parse_layers(text: str, blocks: int | None) -> tuple[int, ...]:
    """Depths named by ``1,2,4``, ``1-12`` (both included), ``all`` or ``auto`` (1, 2, 4, ...).

    Args:
        text: what the user wrote.
        blocks: the backbone's number of blocks; None checks the spelling alone and returns ().

    Raises:
        BadInput: for anything that is not a depth between 1 and ``blocks``.
    """
    top = "the backbone's number of blocks" if blocks is None else f"{blocks}"
    allowed = f"depths from 1 to {top}, as 1,2,4 or 1-12 or all"
    word = text.strip().lower()
    if word in {"all", "auto"}:
        if blocks is None:
            return ()
        if word == "all":
            return tuple(range(1, blocks + 1))
        return tuple(2**k for k in range(blocks.bit_length()) if 2**k < blocks)
    depths: set[int] = set()
    for part in word.split(","):
        low, high = _ends(part)
        if low < 1 or high < low or (blocks is not None and high > blocks):
            raise BadInput("layers", text, allowed)
        if blocks is not None:
            depths.update(range(low, high + 1))
    return tuple(sorted(depths))


def parse_blocks(text: str, blocks: int | None = None) -> tuple[int, ...]:
    """Block indices named by ``0,1,10-11``, both ends of a range included.

    Args:
        blocks: the backbone's number of blocks, if it is known.

    Raises:
        BadInput: for anything that is not a block from 0 to ``blocks - 1``, in their order.
    """
    top = "the last block" if blocks is None else f"{blocks - 1}"
    found: list[int] = []
    for part in text.split(","):
        low, high = _ends(part)
        wrong = low < 0 or high < low or (blocks is not None and high >= blocks)
        if wrong or (found and low <= found[-1]):
            allowed = f"blocks from 0 to {top} in their order, as 0,1,10-11"
            raise BadInput("select", text, allowed)
        found += range(low, high + 1)
    return tuple(found)


def ranges(numbers: Iterable[int]) -> str:
    """Sorted whole numbers as text.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def _ends(part: str) -> tuple[int, int]:
    """The ends of ``3-5``, of ``4``; (-1, -1) for what is neither."""
    first, dash, last = (piece.strip() for piece in part.partition("-"))
    if not (_is_count(first) and (_is_count(last) if dash else True)):
        return -1, -1
    return int(first), int(last if dash else first)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 6
