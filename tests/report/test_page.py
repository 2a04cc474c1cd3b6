"""Any page of the report: valid, labelled, in order, from one file; foreign names do nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from depthprobe.report.comparison import build_comparison
from depthprobe.report.page import build_report
from depthprobe.runs.records import Machine
from depthprobe.study import override

html5lib = pytest.importorskip("html5lib")
Make = Callable[..., Any]
NAMESPACES = {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}
SCRIPT, IMAGE = "<script>alert(1)</script>", "<img src=x onerror=alert(1)>"


def _tree(path: Path) -> Any:
    """The page as a browser reads it; an error of the parser is one of the page."""
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    return parser.parse(path.read_text(encoding="utf-8"))


def _name(element: Any) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


@pytest.fixture(scope="module")
def pages(
    run: Any, make: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The whole report of a run, that of an empty one, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    methods = {"full", "finetune", "skip", "sasrec"}
    other = make(folder / "other", users=60, seeds=1, methods=methods)
    empty = make(folder / "empty", users=60, seeds=1, methods=set())
    return [
        build_report(run, folder / "whole.html"),
        build_report(empty, folder / "empty.html"),
        build_comparison([run, other], folder / "both.html"),
    ]


def test_pages_parse_without_an_error_and_say_their_language(pages: list[Path]) -> None:
    for path in pages:
        tree = _tree(path)
        assert tree.attrib["lang"] == "en"
        assert (tree.findtext("head/title") or "").strip()


def test_ids_are_unique(pages: list[Path]) -> None:
    for path in pages:
        ids = [found for e in _tree(path).iter() if (found := e.attrib.get("id"))]
        assert len(ids) == len(set(ids))


def test_headings_are_in_order(pages: list[Path]) -> None:
    for path in pages:
        levels = [int(name[1]) for e in _tree(path).iter() if (name := _name(e)) in
                  {"h1", "h2", "h3", "h4"}]  # fmt: skip
        assert levels.count(1) == 1
        assert levels[0] == 1
        assert all(later - level <= 1 for level, later in zip(levels, levels[1:], strict=False))


def test_pictures_and_tables_are_labelled(pages: list[Path]) -> None:
    for path in pages:
        for element in _tree(path).iter():
            if _name(element) in {"svg", "img"}:
                assert len(element.attrib.get("aria-label", "")) > 20
                assert element.attrib["role"] == "img"
            if element.attrib.get("role") == "region":
                assert element.attrib["aria-label"]
                assert element.attrib["tabindex"] == "0"  # so that a keyboard can scroll it


def test_nothing_is_fetched(pages: list[Path]) -> None:
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[\w./-]+", text)) <= NAMESPACES | {
            "http://www.w3.org/1999/xlink"
        }
        assert len(text.encode()) < 3e6


@pytest.mark.parametrize("evil", [SCRIPT, IMAGE])
def test_foreign_names_do_nothing(make: Make, tmp_path: Path, evil: str) -> None:
    """As a data set, model, study, method variant, group of users, warning and folder."""
    folders = [tmp_path / f"{evil.replace('/', '')}{number}" for number in range(2)]
    runs = []
    for folder in folders:
        run = make(
            folder, users=60, seeds=1, methods={"full", "finetune", "distill", "skip"},
            dataset=evil, backbone=evil, failing=[("distill", 2, 0)], error=evil,
        )  # fmt: skip
        run.study = override(run.study, name=evil)
        for frame in (run.trials, run.metrics):
            frame["method"] = frame["method"].replace("distill", f"distill:{evil}$x$")
            frame["trial"] = frame["trial"] + evil
        run.users["trial"] += evil
        for record in run.records:
            record.id += evil
        users = sorted(set(run.users["user"]))
        kinds = pd.Categorical([evil] * len(users))
        run.slices = pd.DataFrame({"user": users, evil: kinds})
        run.manifest.command, run.manifest.versions = evil, {evil: evil}
        run.manifest.machine = Machine(cpu=evil)
        run.manifest.data.warnings, run.manifest.data.statistics = [evil], {evil: evil}
        runs.append(run)
    pages = [build_report(runs[0]), build_comparison(runs, tmp_path / "both.html")]
    for path in pages:
        elements = list(_tree(path).iter())
        names = [_name(element) for element in elements]
        assert names.count("script") == 1  # the page's own
        assert "img" not in names
        assert not [a for e in elements for a in e.attrib if str(a).lower().startswith("on")]
        assert evil in "".join(text for e in elements for text in e.itertext())
