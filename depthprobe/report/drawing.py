"""What the figures share: axes, intervals as bars, the scale of depths, files at paper size."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator
from numpy.typing import NDArray

from depthprobe.errors import BadInput
from depthprobe.evaluation.statistics import Interval
from depthprobe.files import complete_file
from depthprobe.report.numbers import FULL, Point, Summary
from depthprobe.report.style import figure_style

Array = NDArray[np.float64]
SIZE = (4.7, 3.7)  # inches; small, so that the text stays readable on a phone
LABEL_HEIGHT = 34.0  # points: the numbers of an axis and its label
# without a date the same run gives the same bytes
FORMATS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "png": {"dpi": 150},
    "pdf": {"metadata": {"CreationDate": None}},
}


def new_axes(
    *, right: float, bottom: float = 0.14, left: float = 0.125, size: tuple[float, float] = SIZE
) -> Axes:
    """Axes of a figure of their own, with room for names on the right."""
    figure = Figure(figsize=size)
    figure.subplots_adjust(left=left, right=right, top=1 - 0.37 / size[1], bottom=bottom)
    return figure.add_subplot()


def legend_below(ax: Axes, *, columns: int) -> None:
    """A legend under the label of the depths or costs, as far below it in axes of any height."""
    height = ax.get_window_extent().height * 72 / ax.figure.dpi
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.45, -LABEL_HEIGHT / height), ncols=columns,
        fontsize=8.5, handletextpad=0.4, columnspacing=1.1, borderaxespad=0,
    )  # fmt: skip


def signed(change: float) -> str:
    """A tick of a change in per cent, with a true minus."""
    return f"{change:+g} %".replace("-", "\u2212") if change else "0"


def need(found: object, summary: Summary, what: str) -> None:
    """Refuse to draw what a run has no data for.

    Raises:
        BadInput: that names the run and what it lacks.
    """
    if not found:
        raise BadInput("run", summary.run.path, f"one with {what}")


def save_figure(ax: Axes, stem: Path) -> str:
    """Write STEM.svg, STEM.png (150 dpi) and STEM.pdf, each whole or not at all.

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


def depth_axis(ax: Axes, summary: Summary, drawn: Sequence[int]) -> None:
    """The scale from the shallowest depth that is drawn, or 1, to the whole backbone."""
    first = min([1, *drawn])
    deepest = summary.blocks or max([1, *drawn])
    ax.set_xlim(first - 0.6, deepest + 0.6)
    if deepest <= 16:
        ax.xaxis.set_major_locator(FixedLocator(range(first, deepest + 1)))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    ax.set_xlabel("depth (blocks kept)")


def three(interval: Interval) -> Array:
    """Value, low and high, (3,)."""
    return np.array([interval.value, interval.low, interval.high])


def bars(points: Sequence[Point], metric: str) -> Array:
    """Lengths of the points' intervals below and above their means, (2, n)."""
    return arms([p.accuracy[FULL, metric] for p in points])


def arms(intervals: Sequence[Interval]) -> Array:
    """Lengths below and above the value, shape (2, n), as matplotlib wants them."""
    arms = np.array([(i.value - i.low, i.high - i.value) for i in intervals], dtype=np.float64)
    # of one round or one user nothing is known: no bar then, and not an endless one
    return np.clip(np.where(np.isfinite(arms), arms, 0).reshape(-1, 2).T, 0, None)


# Labels in figures that don't cover each other: names at the right edge, numbers at points.

FONT = 9.0  # points
LABEL_X = 1.035  # where names begin, in widths of the axes


def label_right(ax: Axes, labels: Sequence[tuple[float | None, float, str, str]]) -> None:
    """Write names beside the right edge, each led to from the end of its curve.

    Args:
        ax: axes whose limits are final.
        labels: (x or None for the edge, y, text, colour) in data coordinates.
    """
    if not labels:
        return
    ordered = sorted(labels, key=lambda label: label[1])
    to_axes = (ax.transData + ax.transAxes.inverted()).transform
    left = ax.get_xlim()[0]
    wanted = [float(to_axes((left, y))[1]) for _, y, _, _ in ordered]
    gap = 1.35 * FONT / (ax.get_window_extent().height * 72 / ax.figure.dpi)
    widest = 0.0
    for (x, y, text, colour), place in zip(ordered, spread(wanted, gap), strict=True):
        start = (1.0, float(to_axes((left, y))[1])) if x is None else tuple(to_axes((x, y)))
        name = ax.annotate(
            text, xy=start, xytext=(LABEL_X, place), xycoords="axes fraction",
            textcoords="axes fraction", va="center", ha="left", color=colour, fontsize=FONT,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.55,
                        "shrinkA": 1, "shrinkB": 0 if x is None else 4,
                        "linestyle": "-" if x is None else (0, (1, 2))},
        )  # fmt: skip
        widest = max(widest, Text.get_window_extent(name).width)
    if len(ax.figure.axes) == 1:  # a panel among others has the room that it was given
        _make_room(ax, widest)


def _make_room(ax: Axes, width: float) -> None:
    """Move the right edge in where names of so many pixels would leave the figure."""
    figure, place = cast("Figure", ax.get_figure(root=True)), ax.get_position()
    free = 1 - place.x0 - (width + 4) / figure.bbox.width
    right = max(place.x0 + 0.3, place.x0 + free / LABEL_X)
    if right < place.x1:
        figure.subplots_adjust(right=right)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least ``gap`` apart, as near to the wanted ones as can be, in the same order.

    Neighbours that are too near form a group, spaced evenly about its mean (the pool-adjacent
    scheme of isotonic regression), then the whole is kept inside [0, 1].
    """
    groups: list[tuple[float, int]] = []  # (sum of the places less their offsets, how many)
    for index, place in enumerate(wanted):
        groups.append((place - index * gap, 1))
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            (total, number), (more, extra) = groups[-2:]
            groups[-2:] = [(total + more, number + extra)]
    base = [total / number for total, number in groups for _ in range(number)]
    lowest, highest = 0.0, 1.0 - (len(wanted) - 1) * gap
    return [min(max(b, lowest), max(highest, lowest)) + i * gap for i, b in enumerate(base)]


def label_points(
    ax: Axes,
    labels: Sequence[tuple[float, float, str]],
    *,
    avoid: Sequence[tuple[float, float, float]],
) -> None:
    """Write short texts beside points where neither a bar nor another text is in the way.

    Args:
        ax: axes whose limits and scales are final.
        labels: (x, y, text) in data coordinates; a text without a free place is left out.
        avoid: (x, low, high) of the error bars that no text may cover.
    """
    scale = 72 / ax.figure.dpi  # pixels to points
    taken = []
    for x, low, high in avoid:
        bottom, top = (ax.transData.transform((x, y)) * scale for y in (low, high))
        middle = (bottom + top) / 2
        taken.append(_box(middle[0], middle[1], 6, max(6.0, float(top[1] - bottom[1]))))
    frame = ax.get_window_extent()
    inside = np.array([frame.x0, frame.y0, frame.x1, frame.y1]) * scale
    for x, y, text in labels:
        centre = ax.transData.transform((x, y)) * scale
        width = 0.62 * FONT * len(text)
        for dx, dy in _offsets(width):
            box = _box(centre[0] + dx, centre[1] + dy, width, FONT)
            within = (box[:2] >= inside[:2]).all() and (box[2:] <= inside[2:]).all()
            if within and not any(_overlap(box, other) for other in taken):
                ax.annotate(
                    text, (x, y), xytext=(dx, dy), textcoords="offset points", ha="center",
                    va="center", fontsize=FONT - 1,
                )  # fmt: skip
                taken.append(box)
                break


def _offsets(width: float) -> list[tuple[float, float]]:
    side, up = width / 2 + 5, FONT / 2 + 5
    return [(-side, up - 2), (0, up), (side, up - 2), (side, -up + 2), (side + 2, 0), (0, -up),
            (-side - 2, 0), (-side, -up + 2)]  # fmt: skip


def _box(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a[:2] < b[2:]).all() and (b[:2] < a[2:]).all())
