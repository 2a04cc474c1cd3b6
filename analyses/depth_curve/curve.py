"""What a depth is worth in several runs: a table of each, and one figure with a panel a run.

    python analyses/depth_curve/curve.py RUN... --figure reports/depth_curve/depth.png

All in per cent of the run's own teacher, with paired 95 % intervals over users and seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from depthprobe.evaluation.statistics import Interval
from depthprobe.report.drawing import figure_style, save_figure
from depthprobe.report.numbers import FULL, HEADLINE, Point, Summary, summarise
from depthprobe.report.style import INK, MUTED, method_info
from depthprobe.runs.store import open_run

CURVES = ("early-exit", "readout", "finetune", "random-init")
FLAT = ("popularity", "sasrec")


def share(point: Point) -> Interval:
    """Of the teacher's NDCG@10, in per cent; of the teacher itself 100."""
    if point.method == "full":
        return Interval(100.0, 100.0, 100.0)
    found = point.ratio[FULL, HEADLINE]
    return Interval(100 * found.value, 100 * found.low, 100 * found.high)


def points_of(summary: Summary, method: str) -> dict[int, Point]:
    """By depth; at full depth a model read without training is the teacher."""
    found = {point.depth: point for point in summary.of(method)}
    if method in ("early-exit", "finetune"):
        found |= {point.depth: point for point in summary.of("full")}
    return dict(sorted(found.items()))


def cell(found: Interval, *, digits: int = 1, unit: str = "") -> str:
    """A number and its interval."""
    return f"{found.value:.{digits}f}{unit} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def table(summary: Summary) -> Iterator[str]:
    """A row a method, a column a depth."""
    curves = {method: points_of(summary, method) for method in CURVES}
    depths = sorted({depth for points in curves.values() for depth in points})
    yield f"| {summary.run.study.name}, % of the teacher | {' | '.join(map(str, depths))} |"
    yield "|---" * (len(depths) + 1) + "|"
    for method, points in curves.items():
        cells = {d: cell(share(p)) for d, p in points.items() if p.method != "full"}
        yield f"| {method_info(method).label} | {' | '.join(cells.get(d, '') for d in depths)} |"
    yield ""
    for point in summary.of("full", *FLAT):
        value, of = cell(point.accuracy[FULL, HEADLINE], digits=4), cell(share(point), unit=" %")
        yield (
            f"- {method_info(point.method).label}: {HEADLINE} {value}, {of} of the teacher; "
            f"{point.users:,} users, seeds: {len(point.seeds)}"
        )
    yield ""


def panel(ax: Axes, summary: Summary, title: str) -> None:
    """The curves with their intervals; baselines as bands; the teacher at 100."""
    for point in summary.of(*FLAT):
        of, style = share(point), method_info(point.method)
        ax.axhspan(of.low, of.high, color=style.colour, alpha=0.18, linewidth=0)
        ax.axhline(
            of.value, color=style.colour, linestyle=style.line, linewidth=1.1, label=style.label
        )
    ax.axhline(100, color=INK, linewidth=1.1, label="teacher")
    for method in CURVES:
        points, style = points_of(summary, method), method_info(method)
        if not points:
            continue
        found = [share(point) for point in points.values()]
        ax.errorbar(
            list(points), [of.value for of in found],
            yerr=[[of.value - of.low for of in found], [of.high - of.value for of in found]],
            color=style.colour, marker=style.marker, markersize=5, linestyle=style.line,
            elinewidth=1, label=style.label,
        )  # fmt: skip
    blocks = summary.blocks or 0
    ax.set_xticks(range(0, blocks + 1, 2 if blocks > 6 else 1))
    ax.set_xlabel(f"blocks kept, of {blocks}")
    ax.set_title(title, fontsize=10)


def figure(summaries: list[Summary], titles: list[str]) -> list[Axes]:
    """A panel a run on one scale, two in a row, and one legend below."""
    columns = min(2, len(summaries))
    rows = -(-len(summaries) // columns)
    height = 2.9 * rows + 0.6  # inches
    with figure_style():
        drawn = Figure(figsize=(3.4 * columns, height))
        axes = list(drawn.subplots(rows, columns, sharey=True, squeeze=False).flat)
        for ax, summary, title in zip(axes, summaries, titles, strict=False):
            panel(ax, summary, title)
            ax.set_ylim(0, 119)
        for ax in axes[len(summaries) :]:
            ax.set_visible(False)
        for ax in axes[::columns]:
            ax.set_ylabel(f"% of the teacher's {HEADLINE}")
        drawn.legend(
            *axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False,
            fontsize=9, labelcolor=MUTED,
        )  # fmt: skip
        drawn.subplots_adjust(
            left=0.2 / columns, right=0.99, top=1 - 0.3 / height, bottom=1.05 / height,
            wspace=0.06, hspace=0.42,
        )  # fmt: skip
    return axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--titles", nargs="*", help="of the panels; the runs' names by default")
    options = parser.parse_args()
    summaries = [summarise(open_run(run)) for run in options.runs]
    for summary in summaries:
        print("\n".join(table(summary)))
    if options.figure:
        titles = options.titles or [summary.run.study.name for summary in summaries]
        save_figure(figure(summaries, titles)[0], options.figure.with_suffix(""))


if __name__ == "__main__":
    main()
