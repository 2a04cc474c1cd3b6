"""How a report looks: numbers as text, the look of each method."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from depthprobe.evaluation.statistics import Interval
from depthprobe.methods import METHODS, Method

Array = NDArray[np.float64]
INK, MUTED = "#1b1f24", "#5b636d"
NONE = "–"  # what a table shows where nothing was measured

# --- numbers as text -------------------------------------------------------------------------


def significant(value: float, digits: int = 3) -> str:
    """A number at so many significant digits, never in exponent form: 0.0486, 12.3, 1,240."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def accuracy(value: float | None) -> str:
    """A metric at four decimals."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else NONE


def percent(share: float, digits: int = 1, *, sign: bool = False) -> str:
    """A share as per cent: 0.992 is "99.2 %"; with its sign "+99.2 %"."""
    plus = "+" if sign else ""
    return f"{100 * share:{plus}.{digits}f} %" if math.isfinite(share) else NONE


def plain_percent(share: float) -> str:
    """A setting as per cent, with no more digits than it has: 0.01 is "1 %"."""
    return f"{100 * share:g} %"


def count(value: float | None) -> str:
    """A number of things: 812, 12.4 k, 6.63 M, 1.20 B."""
    if value is None or not math.isfinite(value):
        return NONE
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{significant(value / (1e3 if unit == ' k' else size))}{unit}"
    return f"{value:,.0f}"


def round_count(value: float) -> str:
    """0.5, 1,000, 20 k and 3 M: the round numbers of an axis."""
    if value < 10:
        return f"{value:g}"
    return count(value).replace(".00", "").replace(".0 ", " ")


def base_name(source: str) -> str:
    """A backbone's name for a first look: of a folder the last part, of another source all."""
    path = PurePath(source)
    return path.name if path.is_absolute() else source


def plural(number: int, noun: str) -> str:
    """1 seed, 2 seeds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def bounds(interval: Interval, digits: int, *, scale: float = 1.0) -> str:
    """The two ends of an interval: "[98.1, 100.3]"; empty where one is infinite."""
    low, high = scale * interval.low, scale * interval.high
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{_end(low, digits)}, {_end(high, digits)}]"


def _end(value: float, digits: int) -> str:
    """An end of an interval; one that is not zero must not look as if it were, nor like -0.0."""
    text = f"{value:.{digits}f}"
    if float(text):
        return text
    places = -math.floor(math.log10(abs(value))) if value else digits
    return f"{round(value, places) + 0.0:.{places}f}" if places <= digits + 3 else text.lstrip("-")


def in_percent(interval: Interval, *, sign: bool = False) -> str:
    """A share and its interval in per cent: "98.9 % [97.6, 100.3]"."""
    return f"{percent(interval.value, sign=sign)} {bounds(interval, 1, scale=100)}".strip()


def with_bounds(interval: Interval, digits: int = 4, *, sign: bool = False) -> str:
    """A metric and its interval: "0.0486 [0.0451, 0.0520]"."""
    plus = "+" if sign and interval.value else ""
    return f"{interval.value:{plus}.{digits}f} {bounds(interval, digits)}".strip()


def times(ratio: Interval, word: str = "") -> str:
    """How many times and the interval: "2.25× [1.92, 2.32]", fewer digits from 3 on."""
    digits = 2 if ratio.value < 3 else 1
    return f"{ratio.value:.{digits}f}×{word} {bounds(ratio, digits)}".strip()


def times_faster(ratio: Interval) -> str:
    """A speed ratio in words: "2.9× faster [2.8, 3.0]".

    Below one it is slower, by the inverse; an interval that holds one claims neither. Of too few
    rounds for an interval nothing is known but the ratio.
    """
    if not math.isfinite(ratio.high):
        return f"{times(ratio)} as fast [too few rounds]"
    if ratio.low <= 1 <= ratio.high:
        return f"about as fast {bounds(ratio, 2)}".strip()
    if ratio.value < 1:
        return times(Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low), " slower")
    return times(ratio, " faster")


# --- methods ---------------------------------------------------------------------------------


# What variants of a method are told apart by. Which one has which depends on its name alone.
VARIANT_COLOURS = ("#0069a8", "#c2500a", "#00805e", "#9b4f96", "#857200", "#b3365b", "#4a55b8")
VARIANT_MARKERS = ("s", "o", "^", "D", "v", "P", "X", "p")


def method_info(name: str) -> Method:
    """The record of a method: label, look, role; a variant has a label and a look of its own.

    A run may hold trials of a plug-in that this machine lacks: they are shown, but no answer.
    """
    base, _, variant = name.partition(":")
    method = METHODS.get(base) or Method(name=base, role="probe", run="")
    if not variant:
        return method
    place = zlib.crc32(variant.encode())
    colour = VARIANT_COLOURS[place % len(VARIANT_COLOURS)]
    marker = VARIANT_MARKERS[place % len(VARIANT_MARKERS)]
    label = f"{method.label}: {variant}"
    return replace(method, label=label, colour=colour, marker=marker, line="-.")
