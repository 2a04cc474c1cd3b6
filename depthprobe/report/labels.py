"""Labels in figures that don't cover each other: names at the right edge, numbers at points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

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
