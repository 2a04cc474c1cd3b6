"""The pages of a run and of several: valid, escaped, self-contained, without empty sections."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from depthprobe.errors import BadInput
from depthprobe.formatting import in_percent, with_bounds
from depthprobe.report.comparison import build_comparison
from depthprobe.report.figures import FIGURES
from depthprobe.report.numbers import summarise
from depthprobe.report.page import build_report, folder_of, inline_svg
from depthprobe.runs.records import Machine
from depthprobe.study import override

html5lib = pytest.importorskip("html5lib")
Make = Callable[..., Any]
NAMESPACES = {f"http://www.w3.org/{name}" for name in ("1999/xhtml", "2000/svg", "1999/xlink")}


class Page:
    """A page as a browser reads it; an error of the parser is one of the page."""

    def __init__(self, path: Path) -> None:
        self.source = path.read_text(encoding="utf-8")
        parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
        self.tree = parser.parse(self.source)
        self.elements = [(_name(e), e.attrib) for e in self.tree.iter()]
        words = (e for e in self.tree.iter() if _name(e) not in ("script", "style"))
        self.text = " ".join(t for e in words for t in (e.text, e.tail) if t)

    def all(self, *names: str) -> list[Any]:
        """Attributes of each element of some names."""
        return [attributes for name, attributes in self.elements if name in names]

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for attributes in self.all("section")]


def _name(element: Any) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


@pytest.fixture(scope="module")
def page(run: Any) -> Page:
    path = build_report(run)
    assert path == run.path / "report.html"
    return Page(path)


@pytest.fixture(scope="module")
def pages(page: Page, run: Any, make: Make, tmp_path_factory: pytest.TempPathFactory) -> list[Page]:
    """The report of a run, that of an empty one, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    methods = {"full", "finetune", "skip", "sasrec"}
    other = make(folder / "other", users=60, seeds=1, methods=methods)
    empty = make(folder / "empty", users=60, seeds=1, methods=set())
    comparison = build_comparison([run, other], folder / "both.html")
    return [page, Page(build_report(empty)), Page(comparison)]


def test_every_section_figure_and_table_is_there(page: Page, run: Any) -> None:
    assert page.sections == [
        *("depth", "pareto", "blocks", "maps", "budgets", "reliance", "hurt", "ablation", "titles"),
        *("cost", "methods", "trials", "measured"),
    ]
    drawn = [name for name, entry in FIGURES.items() if entry.section != "search"]
    assert len(page.all("svg")) == len(drawn)
    assert {path.name for path in (run.path / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in drawn for suffix in ("svg", "png", "pdf")
    }
    names = ("methods", "methods_sampled", "trials", "ablation", "slices", "lists", "reliance",
             "left_out", "cost", "order", "selections", "prompt_only_sampled", "front",
             "interaction", "budgets")  # fmt: skip
    assert {path.name for path in (run.path / "tables").iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("csv", "md", "tex")
    }


def test_pages_are_valid_and_labelled(pages: list[Page]) -> None:
    for page in pages:
        assert page.tree.attrib["lang"] == "en"
        assert (page.tree.findtext("head/title") or "").strip()
        ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
        assert len(ids) == len(set(ids))
        levels = [int(n[1]) for n, _ in page.elements if re.fullmatch("h[1-4]", n)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(later - level <= 1 for level, later in zip(levels, levels[1:], strict=False))
        for picture in page.all("svg"):
            assert picture["role"] == "img"
            assert len(picture["aria-label"]) > 20
        for _, attributes in page.elements:
            if attributes.get("role") == "region":
                assert attributes["aria-label"]
                assert attributes["tabindex"] == "0"  # so that a keyboard can scroll it
            for name, target in attributes.items():
                if str(name).endswith("href") and target.startswith("#"):
                    assert target[1:] in ids


def test_nothing_is_fetched(pages: list[Page]) -> None:
    for page in pages:
        assert not page.all("iframe", "img", "object")
        assert page.all("script") == [{}]  # inline: it sorts
        assert set(re.findall(r"https?://[\w./-]+", page.source)) <= NAMESPACES
        assert "@import" not in page.source
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))
        assert len(page.source.encode()) < 3e6


def test_numbers_are_rounded(page: Page) -> None:
    # of seven digits or more after the point; ids and SVG paths are no text
    assert re.findall(r"\d\.\d{7,}", page.text) == []
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())


def test_the_glossary_explains_the_methods_of_the_run(page: Page) -> None:
    assert "a student: a variant trained to follow the teacher's states or scores" in page.text
    assert "ReplaceMe" not in page.text  # of a method that is not in the run


def test_sampled_numbers_are_labelled(page: Page, make: Make, tmp_path: Path) -> None:
    assert "Sampled: the next item among 999 random negatives" in page.text
    regions = [a["aria-label"] for _, a in page.elements if a.get("role") == "region"]
    assert [label for label in regions if "sampled" in label] == [
        "All methods, sampled ranking with 999 random negatives"
    ]
    run = make(tmp_path, users=60, seeds=1, methods={"full"})
    run.study = override(run.study, **{"protocol.negatives": "popularity"})
    other = Page(build_report(run)).text
    assert "Sampled: the next item among 999 negatives drawn by popularity in training" in other
    assert "random negatives" not in other


def test_the_sampled_table_is_folded(page: Page) -> None:
    (folded,) = (e for e in page.tree.iter("details") if e.attrib.get("class") == "sampled")
    assert "open" not in folded.attrib
    labels = [e.attrib.get("aria-label") for e in folded.iter()]
    assert "All methods, sampled ranking with 999 random negatives" in labels


def test_points_say_what_they_are(page: Page, run: Any) -> None:
    tips = [e.findtext(".//*") for e in page.tree.iter() if e.attrib.get("class") == "tip"]
    assert '"tip:' not in page.source
    assert len(tips) > 100
    (point,) = (p for p in summarise(run).of("distill") if p.depth == 4)
    kept, reached = point.ratio["full", "NDCG@10"], point.accuracy["full", "NDCG@10"]
    assert f"distilled 4: {in_percent(kept)}" in tips
    assert f"distilled 4: {with_bounds(reached)}" in tips
    saved = (run.path / "figures" / "kept_vs_depth.svg").read_text(encoding="utf-8")
    assert f"<title>distilled 4: {in_percent(kept)}</title>" in saved


def test_wide_tables_say_that_they_scroll(page: Page) -> None:
    wide = [len(e.findall("./tr/th")) for e in page.tree.iter("thead")]
    hints = [a for a in page.all("p") if a.get("class") == "swipe"]
    assert len(hints) == sum(columns > 3 for columns in wide)


def test_the_run_s_own_study_reproduces_it(page: Page, run: Any) -> None:
    assert f"depthprobe sweep {run.path}/study.toml --output DIR" in page.text


def test_foreign_names_do_nothing(make: Make, tmp_path: Path) -> None:
    """As a data set, model, study, method, variant, group of users, warning, error and folder."""
    evil, runs = "<script>alert(1)</script><img src=x onerror=alert(1)>", []
    for number in range(2):
        run = make(
            tmp_path / f"{evil.replace('/', '')}{number}", users=60, seeds=1, dataset=evil,
            methods={"full", "finetune", "distill", "skip", "early-exit"}, backbone=evil,
            failing=[("distill", 2, 0)], error=evil,
        )  # fmt: skip
        run.study = override(run.study, name=evil)
        names = {"distill": f"distill:{evil}$x$", "early-exit": evil}
        for frame in (run.trials, run.metrics):
            frame["method"] = frame["method"].replace(names)
            frame["trial"] = frame["trial"] + evil
        run.users["trial"] += evil
        for record in run.records:
            record.id += evil
        users = np.unique(run.users["user"])
        run.slices = pd.DataFrame({"user": users, evil: pd.Categorical([evil] * len(users))})
        run.manifest.command, run.manifest.versions = evil, {evil: evil}
        run.manifest.machine = Machine(cpu=evil)
        run.manifest.data.warnings, run.manifest.data.statistics = [evil], {evil: evil}
        runs.append(run)
    for path in (build_report(runs[0]), build_comparison(runs, tmp_path / "both.html")):
        page = Page(path)
        assert len(page.all("script")) == 1  # the page's own
        assert not page.all("img")
        names = [str(name).lower() for _, attributes in page.elements for name in attributes]
        assert not [name for name in names if name.startswith("on")]
        assert evil in page.text


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ({"popularity", "sasrec"}, ["methods", "trials", "measured"]),
        ({"full", "finetune"}, ["depth", "pareto", "methods", "trials", "measured"]),
        ({"full", "skip"}, ["blocks", "methods", "trials", "measured"]),
        (set(), ["measured"]),
    ],
)
def test_sections_without_data_are_absent(
    make: Make, tmp_path: Path, methods: set[str], expected: list[str]
) -> None:
    stale = tmp_path / "figures" / "span_damage.svg"  # of an older report
    stale.parent.mkdir()
    stale.write_text("old", encoding="utf-8")
    run = make(tmp_path, users=60, seeds=1, methods=methods, timing=False)
    assert Page(build_report(run)).sections == expected
    assert not stale.exists()


def test_a_run_with_infinite_intervals_has_a_report(make: Make, tmp_path: Path) -> None:
    """One user says nothing of others."""
    run = make(
        tmp_path, users=1, seeds=1, methods={"full", "finetune"}, timing=False,
        gain=lambda method, depth: 5.0,
    )  # fmt: skip
    assert "have an infinite end, which is not drawn" in Page(build_report(run)).text


def test_attributes_that_a_run_lacks_are_an_error(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full", "finetune"})
    for name in ("slices", "scores"):  # an empty table is no lack
        lacking = replace(run)
        hidden = property(lambda self, name=name: object.__getattribute__(self, f"no {name}"))
        lacking.__class__ = type("Lacking", (type(run),), {name: hidden})
        with pytest.raises(AttributeError, match=name):
            build_report(lacking)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="run"):
        build_report(tmp_path)


def test_the_page_is_written_where_output_says(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path / "run", users=60, seeds=1, methods={"full", "skip"}, timing=False)
    target = tmp_path / "elsewhere" / "page.html"
    assert build_report(run, target) == target
    # the run's own folder may be one that can only be read; and nothing temporary stays
    assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in target.parent.iterdir()) == ["page", "page.html"]
    assert (target.parent / "page" / "figures" / "skip_sensitivity.svg").exists()
    assert (target.parent / "page" / "tables" / "trials.csv").exists()
    assert "The folder page/ beside this page holds" in target.read_text()


def test_the_files_of_a_page_are_never_where_the_page_is(tmp_path: Path) -> None:
    assert folder_of(tmp_path / "a.html") == tmp_path / "a"
    assert folder_of(tmp_path / "a") == tmp_path / "a-files"
    os.mkfifo(tmp_path / "pipe")  # as /dev/stdout: there is no beside
    assert folder_of(tmp_path / "pipe") is None


def test_inline_svg_takes_its_own_ids() -> None:
    inside = (
        '<g id="a"/>\n  <g id="never-used"/><use href="#a" clip="url(#a)" x="1.23456" y="7"/>'
        '<path d="M 0.5 1.999 \nL -12.3456 7"/><text>1.23456</text>'
    )
    svg = f'<?xml version="1.0"?><svg viewBox="0 0 1 1">{inside}</svg>'
    text = inline_svg(svg, "one", label='a "quoted" <finding>')
    for expected in ('id="one-a"', 'href="#one-a"', "url(#one-a)", "&lt;finding&gt;"):
        assert expected in text
    # coordinates to a hundredth of a point, and nothing that nobody sees
    for expected in ('x="1.23" y="7"', 'd="M 0.5 2 L -12.35 7"', "<text>1.23456</text>", "/><g/>"):
        assert expected in text
    assert "<?xml" not in text
