"""Numbers as text, for pages, tables and terminals: no exponent, no -0.0, no nan."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depthprobe.evaluation.statistics import Interval

NONE = "–"  # shown if nothing was measured


def fixed(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """A number with ``digits`` decimals: 0.0486; with its sign +0.0486, but 0.0000."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:z,.{digits}f}"
    return f"+{text}" if sign and value > 0 and float(text.replace(",", "")) else text


def significant(value: float, digits: int = 3) -> str:
    """A number with exactly ``digits`` significant digits: 0.0486, 12.3, 1,240."""
    if not value:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value))) if math.isfinite(value) else 0
    return fixed(value, max(0, places))


def rounded(value: float, digits: int = 3) -> str:
    """A number with at most ``digits`` significant digits: 0.5, 12.3, 1,240."""
    text = significant(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text else text


def p_value(value: float) -> str:
    """A p-value with three decimals, or "<0.001"."""
    return "<0.001" if 0 < value < 0.001 else fixed(value, 3)


def accuracy(value: float | None) -> str:
    """A metric with four decimals."""
    return fixed(value, 4)


def percent(share: float, digits: int = 1, *, sign: bool = False) -> str:
    """A share as per cent: 0.992 is "99.2 %"; with its sign "+99.2 %"."""
    return f"{fixed(100 * share, digits, sign=sign)} %" if math.isfinite(share) else NONE


def plain_percent(share: float) -> str:
    """A setting in per cent, with only the digits that it has: 0.01 is "1 %"."""
    return f"{(Decimal(str(round(share, 12))) * 100).normalize():f} %"


def part_percent(share: float, digits: int = 2) -> str:
    """A part of a whole as per cent: "12 %", "0.033 %", "99.97 %"; 0 % is none, 100 % is all."""
    least = 100 * min(share, 1 - share)
    places = max(0, digits - 1 - math.floor(math.log10(least))) if least > 0 else 0
    text = fixed(100 * share, places)
    return f"{text.rstrip('0').rstrip('.') if places else text} %"


def count(value: float | None) -> str:
    """A number of things: 812, 12.4 k, 6.63 M, 1.20 B."""
    if value is None or not math.isfinite(value):
        return NONE
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{significant(value / (1e3 if unit == ' k' else size))}{unit}"
    return fixed(value, 0)


def round_count(value: float) -> str:
    """0.5, 1,000, 20 k and 3 M: the round numbers of an axis."""
    return rounded(value) if value < 10 else count(value).replace(".00", "").replace(".0 ", " ")


def plural(number: int, noun: str) -> str:
    """1 seed, 2,000 seeds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds in a natural unit, with two digits.

    >>> [duration(s) for s in (0.2, 52.3, 100, 5000, 400000)]
    ['<1 s', '52 s', '1.7 min', '83 min', '4.6 days']
    """
    if seconds < 1:
        return "<1 s"
    units = ((1, "s", 90), (60, "min", 5400), (3600, "h", 172800), (86400, "days", float("inf")))
    size, unit = next((size, unit) for size, unit, until in units if seconds < until)
    number = seconds / size
    return f"{number:.0f} {unit}" if number >= 10 or unit == "s" else f"{number:.1f} {unit}"


# --- estimates -------------------------------------------------------------------------------


def bounds(interval: Interval, digits: int, *, scale: float = 1.0) -> str:
    """The two ends of an interval: "[98.1, 100.3]"; empty if one is infinite."""
    low, high = scale * interval.low, scale * interval.high
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{_end(low, digits)}, {_end(high, digits)}]"


def _end(value: float, digits: int) -> str:
    """An end of an interval, with more digits if it would look like zero."""
    text = fixed(value, digits)
    if value and not float(text.replace(",", "")):
        places = -math.floor(math.log10(abs(value)))
        text = fixed(value, places) if places <= digits + 3 else text
    return text


def in_percent(interval: Interval, *, sign: bool = False) -> str:
    """A share and its interval in per cent: "98.9 % [97.6, 100.3]"."""
    return f"{percent(interval.value, sign=sign)} {bounds(interval, 1, scale=100)}".strip()


def with_bounds(interval: Interval, digits: int = 4, *, sign: bool = False) -> str:
    """A metric and its interval: "0.0486 [0.0451, 0.0520]"."""
    return f"{fixed(interval.value, digits, sign=sign)} {bounds(interval, digits)}".strip()


def times(ratio: Interval, word: str = "") -> str:
    """A factor and its interval: "2.25× [1.92, 2.32]", with fewer digits from 3 on."""
    digits = 2 if ratio.value < 3 else 1
    return f"{fixed(ratio.value, digits)}×{word} {bounds(ratio, digits)}".strip()


def times_faster(ratio: Interval) -> str:
    """A speed ratio in words: "2.9× faster [2.8, 3.0]".

    Below one it says slower, by the inverse; an interval that holds one claims neither. With too
    few rounds for an interval it shows only the ratio.
    """
    if not math.isfinite(ratio.high):
        return f"{times(ratio)} as fast [too few rounds]"
    if ratio.low <= 1 <= ratio.high:
        return f"about as fast {bounds(ratio, 2)}"
    if ratio.value < 1:
        slower = replace(ratio, value=1 / ratio.value, low=1 / ratio.high, high=1 / ratio.low)
        return times(slower, " slower")
    return times(ratio, " faster")
