"""How many layers does an LLM-based recommender need? The public API, imported lazily."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depthprobe.data.prepared import prepare_data as prepare_data
    from depthprobe.data.storage import load_data as load_data
    from depthprobe.evaluation.metrics import metrics_from_ranks as metrics_from_ranks
    from depthprobe.evaluation.ranks import rank_targets as rank_targets
    from depthprobe.methods import Method as Method
    from depthprobe.methods import register as register
    from depthprobe.models.backbones import load_backbone as load_backbone
    from depthprobe.models.blocks import find_blocks as find_blocks
    from depthprobe.models.cutting import keep_blocks as keep_blocks
    from depthprobe.models.export import load_recommender as load_recommender
    from depthprobe.models.skipping import skip_blocks as skip_blocks
    from depthprobe.report import figures as figures
    from depthprobe.report.page import build_report as build_report
    from depthprobe.runs.store import open_run as open_run
    from depthprobe.runs.sweep import run_sweep as run_sweep
    from depthprobe.study import load_study as load_study

__version__ = "0.1.0"

_HOME = {
    "Method": "methods",
    "build_report": "report.page",
    "figures": "report.figures",
    "find_blocks": "models.blocks",
    "keep_blocks": "models.cutting",
    "load_backbone": "models.backbones",
    "load_data": "data.storage",
    "load_recommender": "models.export",
    "load_study": "study",
    "metrics_from_ranks": "evaluation.metrics",
    "open_run": "runs.store",
    "prepare_data": "data.prepared",
    "rank_targets": "evaluation.ranks",
    "register": "methods",
    "run_sweep": "runs.sweep",
    "skip_blocks": "models.skipping",
}
__all__ = list(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    # a command that needs no model must not pay seconds for importing torch
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOME[name]}")
    value = home if _HOME[name].endswith(f".{name}") else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
