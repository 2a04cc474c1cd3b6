"""The notebooks run from start to end, and each pair says the same."""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))


def test_there_are_notebooks() -> None:
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_pair_says_the_same(source: Path) -> None:
    script, notebook = jupytext.read(source), nbformat.read(source.with_suffix(".ipynb"), 4)
    cells = [[(c.cell_type, c.source) for c in pair.cells] for pair in (script, notebook)]
    assert cells[0] == cells[1]


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_runs(source: Path, tmp_path: Path) -> None:
    notebook = jupytext.read(source)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    printed = "\n".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    kept = re.findall(r"keeps (\d+\.\d)% \[(\d+\.\d)%, (\d+\.\d)%\]", printed)
    assert len(kept) == 4
    assert all(float(low) <= float(value) <= float(high) for value, low, high in kept)
    assert (tmp_path / "runs" / "first-sweep" / "report.html").is_file()
