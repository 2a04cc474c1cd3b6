"""The dozen public names: there, documented, and imported only when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import depthprobe

NAMES = {
    "load_study",
    "run_sweep",
    "open_run",
    "prepare_data",
    "load_data",
    "build_report",
    "figures",
    "load_backbone",
    "find_blocks",
    "keep_blocks",
    "skip_blocks",
    "rank_targets",
    "metrics_from_ranks",
    "load_recommender",
    "Method",
    "register",
}


def test_the_names_are_exactly_the_public_ones() -> None:
    assert set(depthprobe.__all__) == NAMES
    assert set(dir(depthprobe)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_is_a_documented_callable(name: str) -> None:
    value = getattr(depthprobe, name)
    assert callable(value) or name == "figures"
    assert (value.__doc__ or "").strip()


def test_figures_are_documented_functions() -> None:
    drawn = set(depthprobe.figures.__all__) - {"FIGURES", "FigureEntry"}
    assert {"accuracy_vs_depth", "accuracy_vs_cost", "span_map"} < drawn
    for name in drawn:
        assert (getattr(depthprobe.figures, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_studdy'"):
        _ = depthprobe.load_studdy


@pytest.mark.parametrize(
    "statement",
    ["import depthprobe", "import depthprobe.cli", "import depthprobe; depthprobe.load_study"],
)
def test_importing_loads_nothing_heavy(statement: str) -> None:
    heavy = {"torch", "numpy", "pandas", "matplotlib", "transformers", "pyarrow", "rich"}
    code = f"import sys; {statement}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
