"""How a report looks: numbers as text, the look of each method, axes and their files."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from depthprobe.errors import BadInput
from depthprobe.evaluation.statistics import Interval
from depthprobe.files import complete_file
from depthprobe.methods import METHODS, Method

if TYPE_CHECKING:
    from depthprobe.report.numbers import Summary

Array = NDArray[np.float64]
INK, MUTED = "#1b1f24", "#5b636d"
RC = Path(__file__).parent / "report.mplstyle"
NONE = "–"  # what a table shows where nothing was measured
SIZE = (4.7, 3.7)  # inches; small, so that the text stays readable on a phone
# without a date the same run gives the same bytes
FORMATS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "png": {"dpi": 150},
    "pdf": {"metadata": {"CreationDate": None}},
}

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


def plural(number: int, noun: str) -> str:
    """1 seed, 2 seeds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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


def in_percent(interval: Interval, *, sign: bool = False) -> str:
    """A share and its interval in per cent: "98.9 % [97.6, 100.3]"."""
    text = f"{percent(interval.value, sign=sign)} {bounds(interval, scale=100, digits=1)}"
    return text.strip()


def with_bounds(interval: Interval) -> str:
    """A metric and its interval: "0.0486 [0.0451, 0.0520]"."""
    return f"{accuracy(interval.value)} {bounds(interval, digits=4)}".strip()


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


# --- figures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """How a series that is no method's is drawn."""

    label: str
    colour: str
    marker: str


def figure_style() -> AbstractContextManager[None]:
    """The one figure style; holds while drawing and while saving, leaves matplotlib as it was."""
    return rc_context(fname=RC)


@contextmanager
def drawing(ax: Axes | None, size: tuple[float, float] = SIZE) -> Iterator[Axes]:
    """The given axes in the figure style; else those of a figure of their own."""
    with figure_style():
        yield ax or Figure(figsize=size, layout="constrained").add_subplot()


def draw_series(
    ax: Axes,
    places: ArrayLike,
    values: Sequence[Interval],
    look: Look | Method,
    **more: Any,
) -> None:
    """Points with their intervals as vertical bars, joined by a line unless told otherwise."""
    options: dict[str, Any] = {"elinewidth": 1, "label": look.label} | more
    ax.errorbar(
        np.asarray(places, dtype=np.float64), [each.value for each in values],
        yerr=bars(values), color=look.colour,
        marker=look.marker, **options,
    )  # fmt: skip


def legend(ax: Axes, *, columns: int = 1) -> None:
    """A legend on the right of the axes, or in several columns below them."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    if columns > 1:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": columns}
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles, map(short, labels), **place, handletextpad=0.5, handlelength=1.8)


def short(label: str, most: int = 26) -> str:
    """A name cut to what leaves room for the figure."""
    return label if len(label) <= most else f"{label[: most - 1]}…"


def percent_axis(ax: Axes, *, signed: bool = False, horizontal: bool = False) -> None:
    """Ticks in per cent; those of changes with their sign, a true minus."""

    def text(value: float, _: object) -> str:
        if not signed:
            return f"{value:g} %"
        return f"{value:+g} %".replace("-", "\u2212") if value else "0"

    (ax.xaxis if horizontal else ax.yaxis).set_major_formatter(FuncFormatter(text))


def log_ticks(axis: Axis, text: Callable[[float], str], *, wide: bool = False) -> None:
    """Ticks of a logarithmic scale at 1, 2, 5; of a wide one at powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def bars(intervals: Iterable[Interval]) -> Array:
    """Lengths below and above each value, (2, n), as matplotlib's error bars want them.

    Of one round or one user nothing is known: such an end has no bar, and not an endless one.
    """
    ends = [(each.value - each.low, each.high - each.value) for each in intervals]
    arms = np.array(ends, dtype=np.float64).reshape(-1, 2)
    return np.clip(np.where(np.isfinite(arms), arms, 0).T, 0, None)


def scaled(interval: Interval, scale: float = 100.0) -> Interval:
    """Value and bounds times a number: per cent by default."""
    return Interval(scale * interval.value, scale * interval.low, scale * interval.high)


def limits(intervals: Iterable[Interval], *others: float) -> tuple[float, float]:
    """The lowest and the highest finite end or value of what is drawn."""
    ends = [end for each in intervals for end in (each.value, each.low, each.high)]
    found = [end for end in (*ends, *others) if math.isfinite(end)]
    return min(found, default=0.0), max(found, default=1.0)


def without_bar(intervals: Iterable[Interval]) -> str:
    """A sentence for the caption where an end of an interval is infinite, else nothing."""
    endless = sum(not (math.isfinite(i.low) and math.isfinite(i.high)) for i in intervals)
    if not endless:
        return ""
    return f" {endless} of the intervals have an infinite end, which is not drawn."


def need(found: object, summary: Summary, what: str) -> None:
    """Refuse to draw what a run has no data for.

    Raises:
        BadInput: that names the run and what it lacks.
    """
    if not found:
        raise BadInput("run", summary.run.path, f"one with {what}")


def save_figure(ax: Axes, stem: Path) -> str:
    """Write STEM.svg, STEM.png (150 dpi) and STEM.pdf, each complete or not at all.

    Returns:
        The text of the SVG.
    """
    made = {suffix: rendered(ax, suffix) for suffix in FORMATS}
    for suffix, content in made.items():
        with complete_file(stem.with_suffix(f".{suffix}")) as temporary:
            temporary.write_bytes(content)
    return made["svg"].decode()


def rendered(ax: Axes, suffix: str) -> bytes:
    """The figure of some axes as a file: "svg", "png" or "pdf"."""
    figure, file = cast("Figure", ax.get_figure(root=True)), BytesIO()
    with figure_style():
        figure.savefig(file, format=suffix, **FORMATS[suffix])
    return file.getvalue()


def beside(places: Sequence[float], index: int, number: int, gap: float = 0.09) -> Array:
    """Places of one series among several, moved aside so that their bars don't cover each other."""
    gap = min(gap, 0.6 / number)  # or they would reach the next place
    return np.asarray(places, dtype=np.float64) + gap * (index - (number - 1) / 2)
