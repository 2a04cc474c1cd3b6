"""The figures of a report: each a function on a run that returns its Axes, and one table of them.

Every function takes a run, its folder or its :func:`summarise`, and draws into ``ax`` where one is
given. A run's numbers take seconds to compute: for several figures, summarise it once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes

from depthprobe.report.block_figures import (
    ablation_changes,
    ablation_reading,
    block_influence,
    influence_reading,
    settling_depth,
    settling_reading,
    skip_sensitivity,
    span_map,
    span_reading,
)
from depthprobe.report.depth_figures import (
    accuracy_vs_cost,
    accuracy_vs_depth,
    cost_reading,
    depth_reading,
    kept_reading,
    kept_side_by_side,
    kept_vs_depth,
    skip_reading,
    speed_reading,
    speed_vs_depth,
)
from depthprobe.report.numbers import Summary, summarise

__all__ = [
    "FIGURES",
    "FigureEntry",
    "ablation_changes",
    "accuracy_vs_cost",
    "accuracy_vs_depth",
    "block_influence",
    "kept_side_by_side",
    "kept_vs_depth",
    "settling_depth",
    "skip_sensitivity",
    "span_map",
    "speed_vs_depth",
    "summarise",
]


@dataclass(frozen=True)
class FigureEntry:
    """A figure of the page: where it stands, how it is drawn, what it shows."""

    name: str
    section: str
    draw: Callable[[Summary], Axes]
    reading: Callable[[Summary], str]  # caption and spoken label; empty means there is no data


def _entry(
    name: str,
    section: str,
    draw: Callable[..., Axes],
    reading: Callable[..., str],
    **chosen: str,
) -> FigureEntry:
    return FigureEntry(name, section, partial(draw, **chosen), partial(reading, **chosen))


FIGURES = (
    _entry("kept_vs_depth", "depth", kept_vs_depth, kept_reading),
    _entry("accuracy_vs_depth_ndcg10", "depth", accuracy_vs_depth, depth_reading, metric="NDCG@10"),
    _entry("accuracy_vs_depth_hr10", "depth", accuracy_vs_depth, depth_reading, metric="HR@10"),
    _entry("accuracy_vs_parameters", "pareto", accuracy_vs_cost, cost_reading, cost="parameters"),
    _entry(
        "accuracy_vs_inference_time", "pareto", accuracy_vs_cost, cost_reading, cost="inference"
    ),
    _entry("accuracy_vs_training_time", "pareto", accuracy_vs_cost, cost_reading, cost="training"),
    _entry("skip_sensitivity", "blocks", skip_sensitivity, skip_reading),
    _entry("block_influence", "blocks", block_influence, influence_reading),
    _entry("span_damage", "maps", span_map, span_reading, score="damage"),
    _entry("angular_distance", "maps", span_map, span_reading, score="angular-distance"),
    _entry("cka", "maps", span_map, span_reading, score="cka"),
    _entry("settling_depth", "hurt", settling_depth, settling_reading),
    _entry("ablation_changes", "ablation", ablation_changes, ablation_reading),
    _entry("speed_vs_depth", "cost", speed_vs_depth, speed_reading),
)
