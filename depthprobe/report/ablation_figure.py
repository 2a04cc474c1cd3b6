"""Ways to a shallow model beside plain fine-tuning: the change of each, with its interval."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from depthprobe.evaluation.statistics import Interval
from depthprobe.report.ablation import ablation_table
from depthprobe.report.drawing import arms, need, new_axes, signed
from depthprobe.report.style import MUTED, figure_style, in_percent, method_style
from depthprobe.report.summary import HEADLINE, RunLike, Summary, as_summary

ROW = 0.2  # inches
Change = tuple[int, str, Interval]  # depth, method, relative change


def ablation_changes(run: RunLike | Summary | str | Path, *, ax: Axes | None = None) -> Axes:
    """Relative change of NDCG@10 against fine-tuning at the same depth, by depth and method.

    Bars are 95 % intervals of the paired ratio, over users and seeds; one comparison at a time.
    """
    summary = as_summary(run)
    changes = _changes(summary)
    need(changes, summary, "finetune and another way to train at the same depth")
    with figure_style():
        height = max(2.2, ROW * (len(changes) + len({d for d, _, _ in changes})) + 0.9)
        ax = ax or new_axes(right=0.97, left=0.36, bottom=0.5 / height, size=(4.7, height))
        places, names, place, last = [], [], 0.0, None
        for depth, method, change in changes:
            place += 1 if last == depth else 1.8
            style = method_style(method)
            if depth != last:
                ax.text(
                    0.005, place - 0.95, f"depth {depth}", transform=ax.get_yaxis_transform(),
                    va="center", fontsize=8, color=MUTED, fontweight="bold",
                )  # fmt: skip
            ax.errorbar(
                [100 * change.value], [place], xerr=100 * arms([change]), color=style.colour,
                marker=style.marker, linestyle="none", elinewidth=1.2,
            )  # fmt: skip
            places.append(place)
            names.append(style.label)
            last = depth
        ax.axvline(0, color=MUTED, linewidth=0.9)
        ax.set_yticks(places, names)
        ax.set_ylim(place + 0.8, 0.2)
        ax.grid(visible=False, axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: signed(v)))
        ax.set_title(f"Change of {HEADLINE} against fine-tuning", x=-0.5)
    return ax


def _changes(summary: Summary) -> list[Change]:
    table = ablation_table(summary)
    if table is None:
        return []
    frame = table.frame.dropna(subset="ratio")
    columns = (frame[name] for name in ("depth", "method", "ratio", "ratio low", "ratio high"))
    return [
        (int(depth), str(method), Interval(value - 1, low - 1, high - 1))
        for depth, method, value, low, high in zip(*columns, strict=True)
    ]


def ablation_reading(summary: Summary) -> str:
    """Which ways are shown better or worse than fine-tuning; empty without two to compare."""
    changes = _changes(summary)
    if not changes:
        return ""
    better = sum(change.low > 0 for _, _, change in changes)
    worse = sum(change.high < 0 for _, _, change in changes)
    text = (
        f"Of {len(changes)} comparisons with fine-tuning, {better or 'none'} "
        f"{'lies' if better < 2 else 'lie'} above zero with the whole interval, "
        f"{worse or 'none'} below; by chance alone about one in forty would on each side."
    )
    depth, method, best = max(changes, key=lambda change: change[2].value)
    sign = "+" if best.value >= 0 else ""
    return (
        f"{text} The highest is {method_style(method).label} at depth {depth}: "
        f"{sign}{in_percent(best)}."
    )
