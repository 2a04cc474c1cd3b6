"""The notebooks run from start to end, and each pair says the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
# a last cell for each: what must hold of the names that the notebook leaves
CHECKS = {
    "01_first_sweep": """
assert report.is_file() and run.failed == []
value, low, high = (small[name] for name in kept)
assert len(small) == 4 and (low <= value).all() and (value <= high).all()
assert small[saved].notna().all(axis=None)
""",
    "02_read_a_run": """
theirs = table.loc["finetune", columns[1:]].to_numpy(float)
assert np.allclose(paired[1:], theirs, rtol=1e-6)
assert errors["paired"] < 0.9 * errors["not paired"]
assert len(share) == 2500
""",
    "03_your_model_your_data": """
shown = table["NDCG@10"]
assert shown["full", 6] > 3 * shown["popularity", 0]
assert ndcg(exits[4]) > ndcg(exits[0]) and len(skipped) == 4
assert log.n_users == 1000
""",
    "04_distil_and_ship": """
assert model.config.num_hidden_layers == 2
assert len(students) == 4 and (ends["ratio low"] <= students).all()
assert abs(np.isfinite(served).mean() - dp.metrics_from_ranks(ranks["rank"])["HR@10"]) < 1e-3
""",
}


def test_every_notebook_is_checked() -> None:
    assert [source.stem for source in SOURCES] == list(CHECKS)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_pair_says_the_same(source: Path) -> None:
    script, notebook = jupytext.read(source), nbformat.read(source.with_suffix(".ipynb"), 4)
    cells = [[(c.cell_type, c.source) for c in pair.cells] for pair in (script, notebook)]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kept_outputs_are_whole_and_speak_of_no_machine(source: Path) -> None:
    cells = nbformat.read(source.with_suffix(".ipynb"), 4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs) or "03" in source.stem
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        said = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not re.search(r"/(tmp|home|root|usr|var|Users)/|\\Users\\", said)


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_runs(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path)


@pytest.mark.notebook
def test_the_first_one_runs_with_short_trainings(tmp_path: Path) -> None:
    run(SOURCES[0], tmp_path, {"epochs = 12": "epochs = 2", "epochs = 5": "epochs = 1"})


def run(source: Path, folder: Path, changes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Execute a notebook in a folder, with some text replaced, and its checks as the last cell."""
    notebook = jupytext.read(source)
    for old, new in changes.items():
        assert any(old in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[source.stem]))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
