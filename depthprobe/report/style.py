"""How a report looks: one colour, marker and name a method, one figure style, rounded numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from matplotlib import rc_context

from depthprobe.evaluation.statistics import Interval
from depthprobe.methods import METHODS

INK, MUTED, GRID = "#1b1f24", "#5b636d", "#e3e6ea"
NONE = "–"  # what a table shows where nothing was measured


@dataclass(frozen=True)
class MethodStyle:
    """The look of a method in figures and tables."""

    label: str
    colour: str
    marker: str
    line: str = "-"


# what variants of a method are told apart by; which one has which depends on its name alone
VARIANT_COLOURS = ("#0069a8", "#c2500a", "#00805e", "#9b4f96", "#857200", "#b3365b", "#4a55b8")
VARIANT_MARKERS = ("s", "o", "^", "D", "v", "P", "X", "p")


def method_style(name: str) -> MethodStyle:
    """The look of a method; one that is not known gets a plain one under its own name.

    A selection or variant has its method's label before its own, and its own colour and marker.
    """
    base, colon, variant = name.partition(":")
    if base not in METHODS:
        return MethodStyle(name, MUTED, "h", "-.")
    method = METHODS[base]
    style = MethodStyle(method.label, method.colour, method.marker, method.line)
    if not colon:
        return style
    return replace(style, label=f"{style.label}: {variant}", **_own_look(variant))


def _own_look(name: str) -> dict[str, str]:
    place = zlib.crc32(name.encode())
    colour = VARIANT_COLOURS[place % len(VARIANT_COLOURS)]
    return {"colour": colour, "marker": VARIANT_MARKERS[place % len(VARIANT_MARKERS)], "line": "-."}


@contextmanager
def figure_style() -> Iterator[None]:
    """The one figure style; holds while drawing and while saving, leaves matplotlib as it was."""
    with rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9.5,
            "axes.labelsize": 9.5,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "axes.edgecolor": "#b4bac2",
            "axes.labelcolor": MUTED,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.linewidth": 0.7,
            "xtick.color": "#b4bac2",
            "ytick.color": "#b4bac2",
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "text.color": INK,
            "lines.linewidth": 1.6,
            "lines.markersize": 5.5,
            "legend.frameon": False,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "text.parse_math": False,  # a name may hold dollar signs
            # text stays text: searchable, read aloud, and in the page's own font
            "svg.fonttype": "none",
            "svg.hashsalt": "depthprobe",
        }
    ):
        yield


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


def percent(share: float, digits: int = 1) -> str:
    """A share as per cent: 0.992 is "99.2 %"."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else NONE


def count(value: float | None) -> str:
    """A number of things: 812, 12.4 k, 6.63 M, 1.20 B."""
    if value is None or not math.isfinite(value):
        return NONE
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{significant(value / (1e3 if unit == ' k' else size))}{unit}"
    return f"{value:,.0f}"


def bounds(interval: Interval, *, scale: float = 1.0, digits: int | None = None) -> str:
    """The two ends of an interval: "[98.1, 100.3]"; both at the same number of decimals."""
    low, high = scale * interval.low, scale * interval.high
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    if digits is None:
        largest = max(abs(low), abs(high), 1e-12)
        digits = max(0, 2 - math.floor(math.log10(largest)))
    return f"[{_end(low, digits)}, {_end(high, digits)}]"


def _end(value: float, digits: int) -> str:
    """An end of an interval; one that is not zero must not look as if it were, nor like -0.0."""
    text = f"{value:.{digits}f}"
    if float(text):
        return text
    places = -math.floor(math.log10(abs(value))) if value else digits
    return f"{round(value, places) + 0.0:.{places}f}" if places <= digits + 3 else text.lstrip("-")


def in_percent(interval: Interval) -> str:
    """A share and its interval in per cent: "98.9 % [97.6, 100.3]"."""
    return f"{percent(interval.value)} {bounds(interval, scale=100, digits=1)}"


def times(ratio: Interval) -> tuple[str, str]:
    """How many times and the interval: ("2.25×", "[1.92, 2.32]"), fewer digits from 3 on."""
    digits = 2 if ratio.value < 3 else 1
    return f"{ratio.value:.{digits}f}×", bounds(ratio, digits=digits)


def times_faster(ratio: Interval) -> tuple[str, str, str]:
    """A speed ratio in words: ("2.9×", "[2.8, 3.0]", "faster").

    Below one it is slower, by the inverse; an interval that holds one claims neither.
    """
    if ratio.low <= 1 <= ratio.high:
        return "about as fast", bounds(ratio, digits=2), ""
    word, shown = "faster", ratio
    if ratio.value < 1:
        word, shown = "slower", Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    return *times(shown), word
