"""The scaffold of all figures: the table of them, their style, series and axes, their files."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from depthprobe.errors import BadInput
from depthprobe.evaluation.statistics import Interval
from depthprobe.files import complete_file
from depthprobe.formatting import rounded
from depthprobe.methods import Method
from depthprobe.report.numbers import Source, Summary, as_summary

RC = Path(__file__).parent / "report.mplstyle"
MUTED = "#5b636d"
SIZE = (5.0, 4.2)  # inches; small, so that the text stays readable on a phone
LEGEND_ROWS = 4  # for which that height has room
# without a date the same run gives the same bytes
FORMATS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "png": {"dpi": 150},
    "pdf": {"metadata": {"CreationDate": None}},
}

# --- the table of figures --------------------------------------------------------------------

Draw = Callable[..., str]  # (axes, summary, what is chosen) -> caption


class FigureEntry(NamedTuple):
    """A figure of the page: in which section it stands, how it is drawn."""

    section: str
    draw: Draw
    chosen: Mapping[str, str]
    height: Callable[[Summary], float]  # inches

    def drawn(self, summary: Summary, **chosen: Any) -> tuple[Axes, str]:
        """A figure of its own, and its caption.

        Raises:
            NoData: if the run holds nothing to draw.
        """
        with drawing(None, self.height(summary)) as ax:
            return ax, self.draw(ax, summary, **self.chosen, **chosen)


FIGURES: dict[str, FigureEntry] = {}  # by the name of the file, in the order of reading


class NoData(BadInput):
    """The run holds nothing to draw."""


def need(found: object, summary: Summary, what: str) -> None:
    """Refuse to draw what a run has no data for.

    Raises:
        NoData: that names the run and what it lacks.
    """
    if not found:
        raise NoData("run", summary.run.path, f"a run with {what}")


def figure(
    section: str,
    *,
    height: Callable[[Summary], float] = lambda summary: SIZE[1],
    **variants: Mapping[str, str],
) -> Callable[[Draw], Callable[..., Axes]]:
    """Enter a function that draws on axes and returns its caption into the table of figures.

    ``variants`` are the figures of the page, by name, with what is chosen for each; by default one,
    named as the function. What is returned takes a run, and axes to draw on if the caller has some.
    """

    def enter(draw: Draw) -> Callable[..., Axes]:
        for name, chosen in (variants or {draw.__name__: {}}).items():
            FIGURES[name] = FigureEntry(section, draw, chosen, height)

        @wraps(draw)
        def drawn(run: Source, *, ax: Axes | None = None, **chosen: Any) -> Axes:
            summary = as_summary(run)
            with drawing(ax, height(summary)) as axes:
                draw(axes, summary, **chosen)
            return axes

        # its own parameters, for help and documentation
        run, ax, _ = inspect.signature(drawn, follow_wrapped=False).parameters.values()
        ends = run.replace(annotation="Source"), ax.replace(annotation="Axes | None")
        named = list(inspect.signature(draw).parameters.values())[2:]
        drawn.__dict__["__signature__"] = inspect.Signature(
            [ends[0], *named, ends[1]], return_annotation="Axes"
        )
        return drawn

    return enter


# --- style and files -------------------------------------------------------------------------


def figure_style() -> AbstractContextManager[None]:
    """The one figure style; holds while drawing and while saving, leaves matplotlib as it was."""
    return rc_context(fname=RC)


@contextmanager
def drawing(ax: Axes | None, height: float = SIZE[1]) -> Iterator[Axes]:
    """The given axes in the figure style; else those of a figure of their own."""
    with figure_style():
        yield ax or Figure(figsize=(SIZE[0], height), layout="constrained").add_subplot()


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


def rendered(drawn: Axes | Figure, suffix: str) -> bytes:
    """A figure, or that of some axes, as a file: "svg", "png" or "pdf"."""
    figure, file = cast("Figure", drawn.get_figure(root=True)), BytesIO()
    with figure_style():
        figure.savefig(file, format=suffix, **FORMATS[suffix])
    made = file.getvalue()
    return _TIP.sub(rb'<g class="tip"><title>\1</title>', made) if suffix == "svg" else made


# --- series ----------------------------------------------------------------------------------

_TIP = re.compile(rb'<g id="tip:([^"]*)">')


class Look(NamedTuple):
    """How a series that is no method's is drawn."""

    label: str
    colour: str
    marker: str


def draw_series(
    ax: Axes,
    places: ArrayLike,
    values: Sequence[Interval],
    look: Look | Method,
    *,
    tips: Iterable[str] = (),
    **more: Any,
) -> None:
    """Points with their intervals as vertical bars, joined by a line unless told otherwise.

    ``tips`` are what the SVG says of each point when the mouse is over it.
    """
    options: dict[str, Any] = {"elinewidth": 1, "label": look.label} | more
    ax.errorbar(
        np.asarray(places, dtype=np.float64), [each.value for each in values],
        yerr=bars(values), color=look.colour, marker=look.marker, **options,
    )  # fmt: skip
    draw_tips(ax, places, [each.value for each in values], tips, look.colour)


def draw_tips(
    ax: Axes, xs: ArrayLike, ys: ArrayLike, tips: Iterable[str], colour: str = MUTED
) -> None:
    """Discs that can't be seen, wider than the points below them; each is named in the SVG."""
    disc: dict[str, Any] = {"marker": "o", "markersize": 15, "ls": "", "alpha": 0, "zorder": 9}
    for x, y, text in zip(np.atleast_1d(xs), np.atleast_1d(ys), tips, strict=False):
        (point,) = ax.plot([x], [y], color=colour, scalex=False, scaley=False, **disc)
        point.set_gid(f"tip:{text}")


def draw_level(ax: Axes, value: Interval | None, look: Method) -> None:
    """A line and a band across the figure, for what has no depth; nothing without a value."""
    if value is not None:
        low, high = limits([value])
        ax.axhspan(low, high, color=look.colour, alpha=0.1, linewidth=0, zorder=1)
        options: dict[str, Any] = {"linestyle": look.line, "linewidth": 1.1, "zorder": 2}
        ax.axhline(value.value, color=look.colour, label=look.label, **options)


def bars(intervals: Iterable[Interval]) -> NDArray[np.float64]:
    """Lengths below and above each value, (2, n), as matplotlib's error bars want them.

    Of one round or one user nothing is known: such an end has no bar, and not an endless one.
    """
    ends = [(each.value - each.low, each.high - each.value) for each in intervals]
    arms = np.array(ends, dtype=np.float64).reshape(-1, 2)
    return np.clip(np.where(np.isfinite(arms), arms, 0).T, 0, None)


def drop_bars(ax: Axes, bottom: float) -> None:
    """Take the bars of points below the bottom away: one that ends in view would hang there."""
    for series in ax.containers:
        if isinstance(series, ErrorbarContainer) and series.lines[0] is not None:
            heights = np.asarray(series.lines[0].get_ydata(), dtype=np.float64)
            for each in series.lines[2]:
                kept = zip(each.get_segments(), heights, strict=True)
                each.set_segments([ends for ends, height in kept if height >= bottom])


def without_bar(intervals: Iterable[Interval]) -> str:
    """A sentence for the caption where an end of an interval is infinite, else nothing."""
    endless = sum(not (math.isfinite(i.low) and math.isfinite(i.high)) for i in intervals)
    if not endless:
        return ""
    return f" {endless} of the intervals have an infinite end, which is not drawn."


def scaled(interval: Interval, scale: float = 100.0) -> Interval:
    """Value and bounds times a number: per cent by default."""
    return Interval(scale * interval.value, scale * interval.low, scale * interval.high)


def beside(places: Iterable[float], index: int, number: int, gap: float = 0.09) -> ArrayLike:
    """Places of one series among several, moved aside so that their bars don't cover each other."""
    gap = min(gap, 0.6 / number)  # or they would reach the next place
    return [place + gap * (index - (number - 1) / 2) for place in places]


# --- axes ------------------------------------------------------------------------------------


def limits(intervals: Iterable[Interval], *others: float) -> tuple[float, float]:
    """The lowest and the highest finite end or value of what is drawn."""
    ends = [end for each in intervals for end in (each.value, each.low, each.high)]
    found = [end for end in (*ends, *others) if math.isfinite(end)]
    return min(found, default=0.0), max(found, default=1.0)


def own_range(ax: Axes, intervals: Iterable[Interval]) -> float:
    """Scale the values from the lowest to the highest of what matters; returns where it begins.

    Not from zero: there are no bars to compare with it, and the differences are what is asked.
    """
    low, high = limits(intervals)
    gap = 0.08 * (high - low) or 0.1 * abs(high) or 0.5
    bottom = max(0.0, low - gap) if low >= 0 else low - gap
    ax.set_ylim(bottom, high + gap)
    # as many ticks at any height: the layout has made room for these labels and no others
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    return bottom


def block_axis(axis: Axis, label: str, most: int = 16) -> None:
    """An axis of whole numbers."""
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))
    axis.set_label_text(label)


def percent_axis(axis: Axis, *, signed: bool = False) -> None:
    """Ticks in per cent; those of changes with their sign, a true minus."""

    def text(value: float, _: object) -> str:
        if not signed:
            return f"{rounded(value)} %"
        plus = "+" if value > 0 else ""
        return f"{plus}{rounded(value)} %".replace("-", "\u2212") if value else "0"

    axis.set_major_formatter(FuncFormatter(text))


def log_ticks(axis: Axis, text: Callable[[float], str], *, wide: bool = False) -> None:
    """Ticks of a logarithmic scale at 1, 2, 5; of a wide one at powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def finish(ax: Axes, title: str) -> None:
    """The title, and a legend below the axes, so that these have the whole width."""
    ax.set_title(title)
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        columns = 3 if max(map(len, labels)) <= 17 else 2
        figure, more = ax.get_figure(root=True), -(-len(labels) // columns) - LEGEND_ROWS
        if more > 0 and figure is not None and len(figure.axes) == 1:
            figure.set_figheight(figure.get_figheight() + 0.25 * more)  # the axes keep their height
        ax.legend(
            handles, map(short, labels), loc="upper center", bbox_to_anchor=(0.46, -0.17),
            ncols=columns, handletextpad=0.5, handlelength=1.8, columnspacing=1.2,
        )  # fmt: skip


def short(label: str, most: int = 26) -> str:
    """A name cut to what leaves room for the figure."""
    return label if len(label) <= most else f"{label[: most - 1]}…"
