"""Several runs on one page: each with its own answer, what differs said, nonsense refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from depthprobe.errors import BadInput
from depthprobe.report.answer import build_answer
from depthprobe.report.comparison import build_comparison, default_output, differences
from depthprobe.report.numbers import Summary, summarise
from depthprobe.study import override

METHODS = {"full", "sasrec", "finetune", "distill", "early-exit"}


@pytest.fixture(scope="module")
def two(make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[Summary]:
    """A run that shows a sufficient depth, and one on other data that does not."""
    folder = tmp_path_factory.mktemp("runs")
    good = {("distill", 4): 0.4}
    return [
        summarise(make(folder / "books", users=400, methods=METHODS, dataset="books",
                       gain=lambda method, depth: good.get((method, depth), 0.0))),
        summarise(make(folder / "games", users=90, methods=METHODS, dataset="games", seeds=1)),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def page(two: list[Summary]) -> Path:
    return build_comparison(two)


def test_each_run_has_its_answer_in_a_line(page: Path, two: list[Summary]) -> None:
    text = page.read_text(encoding="utf-8").replace("\u00a0", " ").replace("&#39;", "'")
    assert page == two[0].run.path.parent / "comparison.html"
    assert "1 of 2 runs shows that fewer blocks suffice: books 4 of 12." in text
    for summary in two:
        assert build_answer(summary).lines[0] in text
    assert "data: books (abababab), games (abababab)" in text
    assert "seeds: 2, 1" in text
    assert text.count('<svg viewBox="') == 2


def test_table_holds_what_each_answer_says(page: Path, two: list[Summary]) -> None:
    frame = pd.read_csv(page.parent / "comparison" / "answers.csv").set_index("run")
    assert frame.index.tolist() == ["books", "games"]
    assert frame.loc["books", "verdict"] == "shown"
    assert frame.loc["games", "verdict"] == "not shown"
    for summary in two:
        answer, row = build_answer(summary), frame.loc[summary.run.path.name]
        assert answer.kept is not None
        assert row["kept"] == pytest.approx(answer.kept.value)
        assert row["depth"] == answer.depth
    assert {p.name for p in (page.parent / "comparison").iterdir()} == {
        *(f"answers.{suffix}" for suffix in ("csv", "md", "tex")),
        *(f"kept_side_by_side.{suffix}" for suffix in ("svg", "png", "pdf")),
    }
    markdown = (page.parent / "comparison" / "answers.md").read_text(encoding="utf-8")
    assert "not shown best candidate: " in markdown


def test_another_question_is_said_to_be_one(two: list[Summary], tmp_path: Path) -> None:
    other = replace(two[1], margin=0.05)
    assert differences([two[0], other])["margin"] == "1 %, 5 %"
    assert differences([two[0], two[0]]) == {}
    text = build_comparison([two[0], other], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The runs do not answer the same question: margin differs" in text


def test_another_split_is_named(make: Callable[..., Any], two: list[Summary]) -> None:
    run = make(two[1].run.path, users=90, methods=METHODS, seeds=1)
    run.study = override(run.study, **{"protocol.split": "temporal", "protocol.filter_seen": False})
    found = differences([two[1], summarise(run)])
    assert found["split"] == "leave-one-out, temporal at 0.8 and 0.9"
    assert found["seen items"] == "left out, ranked too"


def test_what_cannot_be_compared_is_refused(
    make: Callable[..., Any], two: list[Summary], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="each run once"):
        build_comparison([two[0], two[0]])
    alone = summarise(make(tmp_path / "alone", users=60, methods={"full"}, seeds=1))
    with pytest.raises(BadInput, match="finished teacher and a shallower model, got .alone"):
        build_comparison([two[0], alone])


def test_the_default_page_lies_where_the_runs_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = default_output([Path("runs/a"), Path("runs/old/b")])
    assert found == Path("runs/comparison.html")
    assert default_output([Path("a"), Path("../b")]) == Path("../comparison.html")
    assert default_output([tmp_path / "a", Path("b")]) == tmp_path / "comparison.html"


def test_runs_of_one_name_are_told_apart_by_their_folders(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    runs = [
        make(tmp_path / name / "run", users=60, methods=METHODS, seeds=1) for name in ("a", "b")
    ]
    page = build_comparison(runs)
    assert page == default_output([run.path for run in runs]) == tmp_path / "comparison.html"
    text = page.read_text(encoding="utf-8")
    assert "a/run" in text
    assert "b/run" in text
    assert f"depthprobe report {tmp_path}/a/run" in text  # none of its own yet
