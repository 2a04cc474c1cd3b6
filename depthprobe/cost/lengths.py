"""A count at many lengths from its values at a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

FEW = 5  # a range of so many lengths is counted one by one


def at_lengths(count: Callable[[int], int], lengths: Sequence[int]) -> list[int]:
    """``count`` of each length, exact, calling it for few of them.

    The products of a pass are a quadratic of its length: T positions go through the weights, T^2
    pairs through attention. It is laid through the ends and the middle, and believed if it meets
    the lengths next to the ends: a function with equal steps (a recurrence that works in chunks of
    64 positions) never does. What is no quadratic is halved until its pieces are.

    Args:
        lengths: increasing.
    """
    known = cache(count)

    def between(start: int, end: int) -> list[int]:
        part = lengths[start:end]
        if len(part) <= FEW:
            return [known(length) for length in part]
        places = (part[0], (part[0] + part[-1]) // 2, part[-1])
        values = [known(place) for place in places]
        beside = (part[0] + 1, part[-1] - 1)
        if all(_through(places, values, length) == known(length) for length in beside):
            return [int(_through(places, values, length)) for length in part]
        middle = (start + end) // 2
        return between(start, middle) + between(middle, end)

    return between(0, len(lengths))


def _through(places: Sequence[int], values: Sequence[int], x: int) -> Fraction:
    """The quadratic through three points, at x (Lagrange)."""
    total = Fraction(0)
    for own, value in zip(places, values, strict=True):
        weight = Fraction(value)
        for other in places:
            if other != own:
                weight *= Fraction(x - other, own - other)
        total += weight
    return total
