"""The guide to adding a method: its examples run as they are written, and others' are found."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from depthprobe.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def registered() -> Iterator[None]:
    """The methods of the page; they are gone after the test."""
    before = dict(METHODS)
    for code in EXAMPLES:
        exec(code, {"__name__": "example"})  # noqa: S102
    yield
    METHODS.clear()
    METHODS.update(before)


def test_an_example_is_short() -> None:
    assert len(EXAMPLES) == 2
    assert all(len(code.splitlines()) < 25 for code in EXAMPLES)


@pytest.mark.usefixtures("registered")
def test_the_examples_appear_in_table_figure_and_report(small_inputs: Path, tmp_path: Path) -> None:
    import depthprobe as dp

    few = "{ epochs = 1, batch_size = 16 }"
    (tmp_path / "study.toml").write_text(
        f"""
        layers = "1,2"
        methods = ["full", "finetune", "swap", "half-frozen"]
        seeds = 1
        device = "cpu"
        recipe = {few}
        sasrec = {{ width = 8, recipe = {few} }}
        data.source = '{small_inputs / "log.txt"}'
        backbone.source = '{small_inputs / "backbone"}'
        protocol = {{ resamples = 100 }}
        cost = {{ batch_size = 8, warmup = 1, rounds = 2 }}
        """,
        encoding="utf-8",
    )
    run = dp.run_sweep(dp.load_study(tmp_path / "study.toml"), tmp_path / "run", jobs=0)
    assert run.failed == []
    done = run.trials.groupby("method")["depth"].agg(list)
    assert (done["swap"], sorted(done["half-frozen"])) == ([3], [1, 2])

    counts = run.trials.set_index("trial")["parameters_trainable"]
    assert counts["half-frozen-d01-s0"] == counts["finetune-d01-s0"]
    assert counts["half-frozen-d02-s0"] < counts["finetune-d02-s0"]
    ranks = {name: group["rank"].to_numpy() for name, group in run.users.groupby("trial")}
    assert (ranks["swap-d03-s0"] != ranks["full-d03-s0"]).any()

    page = dp.build_report(run).read_text(encoding="utf-8")
    table = pd.read_csv(run.path / "tables" / "methods.csv")
    assert {"swap", "half-frozen"} <= set(table["method"])
    figure = (run.path / "figures" / "accuracy_vs_depth_ndcg10.svg").read_text(encoding="utf-8")
    for label in ("swap", "half frozen"):
        assert label in page
        assert label in figure


PLUGIN = """
from depthprobe.methods import Method, register
register(Method(name="mine", role="probe", run="mine:run", needs=("full",), summary="my own"))
"""


@pytest.mark.parametrize(("code", "warned"), [(PLUGIN, False), ("import nothing_like_it", True)])
def test_an_installed_package_adds_its_methods(tmp_path: Path, code: str, warned: bool) -> None:
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[depthprobe.methods]\nmine = mine\n")
    root = str(PAGE.parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "depthprobe", "probe", "--help"],
        env={"PYTHONPATH": f"{tmp_path}:{root}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("mine              my own" in done.stdout) != warned
    assert ("ModuleNotFoundError" in done.stderr) == warned
