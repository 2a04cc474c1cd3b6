"""What all figures share: their table, style, series, axes and files."""

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
LEGEND_ROWS = 4  # that fit into that height
# no date, so that the same run gives the same bytes
FORMATS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "png": {"dpi": 150},
    "pdf": {"metadata": {"CreationDate": None}},
}

# --- the table of figures --------------------------------------------------------------------

Draw = Callable[..., str]  # (axes, summary, chosen options) -> caption


class FigureEntry(NamedTuple):
    """A figure of the page: its section, and how it is drawn."""

    section: str
    draw: Draw
    chosen: Mapping[str, str]
    height: Callable[[Summary], float]  # inches

    def drawn(self, summary: Summary, **chosen: Any) -> tuple[Axes, str]:
        """Draw on the axes of a new figure; returns these and the caption.

        Raises:
            NoData: if the run holds nothing to draw.
        """
        with drawing(None, self.height(summary)) as ax:
            return ax, self.draw(ax, summary, **self.chosen, **chosen)


FIGURES: dict[str, FigureEntry] = {}  # by file name, in reading order


class NoData(BadInput):
    """The run holds nothing to draw."""


def need(found: object, summary: Summary, what: str) -> None:
    """Raise if a run lacks the data for a figure.

    Raises:
        NoData: with the run and what it lacks.
    """
    if not found:
        raise NoData("run", summary.run.path, f"a run with {what}")


def figure(
    section: str,
    *,
    height: Callable[[Summary], float] = lambda summary: SIZE[1],
    **variants: Mapping[str, str],
) -> Callable[[Draw], Callable[..., Axes]]:
    """Register a function that draws on axes and returns its caption.

    ``variants`` are the page's figures by name, with the function's arguments for each; by default
    one, named like the function. The registered function takes a run, and optionally axes.
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

        # the function's own parameters, for help and documentation
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
    """The style of all figures, while drawing and saving; matplotlib's settings are restored."""
    return rc_context(fname=RC)


@contextmanager
def drawing(ax: Axes | None, height: float = SIZE[1]) -> Iterator[Axes]:
    """The given axes in the figure style, or the axes of a new figure."""
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
    """The bytes of a figure as "svg", "png" or "pdf"."""
    figure, file = cast("Figure", drawn.get_figure(root=True)), BytesIO()
    with figure_style():
        figure.savefig(file, format=suffix, **FORMATS[suffix])
    made = file.getvalue()
    return _TIP.sub(rb'<g class="tip"><title>\1</title>', made) if suffix == "svg" else made


# --- series ----------------------------------------------------------------------------------

_TIP = re.compile(rb'<g id="tip:([^"]*)">')


class Look(NamedTuple):
    """How to draw a series that belongs to no method."""

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
    """Draw points with their intervals as vertical bars, joined by a line by default.

    The SVG shows ``tips`` when the mouse is over a point.
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
    """Draw invisible discs, wider than the points below them, that carry the tips in the SVG."""
    disc: dict[str, Any] = {"marker": "o", "markersize": 15, "ls": "", "alpha": 0, "zorder": 9}
    for x, y, text in zip(np.atleast_1d(xs), np.atleast_1d(ys), tips, strict=False):
        (point,) = ax.plot([x], [y], color=colour, scalex=False, scaley=False, **disc)
        point.set_gid(f"tip:{text}")


def draw_level(ax: Axes, value: Interval | None, look: Method) -> None:
    """Draw a reference as a line and a band across the figure; nothing without a value."""
    if value is not None:
        low, high = limits([value])
        ax.axhspan(low, high, color=look.colour, alpha=0.1, linewidth=0, zorder=1)
        options: dict[str, Any] = {"linestyle": look.line, "linewidth": 1.1, "zorder": 2}
        ax.axhline(value.value, color=look.colour, label=look.label, **options)


def bars(intervals: Iterable[Interval]) -> NDArray[np.float64]:
    """Lengths below and above each value, (2, n), for matplotlib's error bars.

    An infinite end, as with one round or one user, gets no bar.
    """
    ends = [(each.value - each.low, each.high - each.value) for each in intervals]
    arms = np.array(ends, dtype=np.float64).reshape(-1, 2)
    return np.clip(np.where(np.isfinite(arms), arms, 0).T, 0, None)


def drop_bars(ax: Axes, bottom: float) -> None:
    """Remove the bars of points below the bottom, since their upper ends would hang in view."""
    for series in ax.containers:
        if isinstance(series, ErrorbarContainer) and series.lines[0] is not None:
            heights = np.asarray(series.lines[0].get_ydata(), dtype=np.float64)
            for each in series.lines[2]:
                kept = zip(each.get_segments(), heights, strict=True)
                each.set_segments([ends for ends, height in kept if height >= bottom])


def without_bar(intervals: Iterable[Interval]) -> str:
    """A sentence for the caption if an interval has an infinite end, else empty."""
    endless = sum(not (math.isfinite(i.low) and math.isfinite(i.high)) for i in intervals)
    if not endless:
        return ""
    return f" {endless} of the intervals have an infinite end, which is not drawn."


def scaled(interval: Interval, scale: float = 100.0) -> Interval:
    """Value and bounds times a number, by default 100 for per cent."""
    return Interval(scale * interval.value, scale * interval.low, scale * interval.high)


def beside(places: Iterable[float], index: int, number: int, gap: float = 0.09) -> ArrayLike:
    """A series' places among several, moved aside so that bars don't cover each other."""
    gap = min(gap, 0.6 / number)  # otherwise they would reach the next place
    return [place + gap * (index - (number - 1) / 2) for place in places]


# --- axes ------------------------------------------------------------------------------------


def limits(intervals: Iterable[Interval], *others: float) -> tuple[float, float]:
    """The lowest and the highest finite number among intervals and other values."""
    ends = [end for each in intervals for end in (each.value, each.low, each.high)]
    found = [end for end in (*ends, *others) if math.isfinite(end)]
    return min(found, default=0.0), max(found, default=1.0)


def own_range(ax: Axes, intervals: Iterable[Interval]) -> float:
    """Scale the axis from the lowest to the highest relevant value; returns its lower end.

    It does not begin at zero: differences matter, and no columns are drawn that rise from zero.
    """
    low, high = limits(intervals)
    gap = 0.08 * (high - low) or 0.1 * abs(high) or 0.5
    bottom = max(0.0, low - gap) if low >= 0 else low - gap
    ax.set_ylim(bottom, high + gap)
    # the same number of ticks at any height: the layout has room for just these labels
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    return bottom


def block_axis(axis: Axis, label: str, most: int = 16) -> None:
    """Format an axis of whole numbers."""
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))
    axis.set_label_text(label)


def percent_axis(axis: Axis, *, signed: bool = False) -> None:
    """Ticks in per cent; changes have a sign, with a true minus."""

    def text(value: float, _: object) -> str:
        if not signed:
            return f"{rounded(value)} %"
        plus = "+" if value > 0 else ""
        return f"{plus}{rounded(value)} %".replace("-", "\u2212") if value else "0"

    axis.set_major_formatter(FuncFormatter(text))


def log_ticks(axis: Axis, text: Callable[[float], str], *, wide: bool = False) -> None:
    """Ticks of a logarithmic scale at 1, 2, 5; on a wide scale at powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def finish(ax: Axes, title: str) -> None:
    """Add the title, and a legend below the axes, so that the axes keep the whole width."""
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
    """A name shortened to leave room for the figure."""
    return label if len(label) <= most else f"{label[: most - 1]}…"
