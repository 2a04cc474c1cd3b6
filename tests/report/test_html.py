"""The page: whole, escaped, self-contained, without empty sections."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins

from depthprobe.errors import BadInput
from depthprobe.report.figures import FIGURES
from depthprobe.report.page import build_report, inline_svg
from depthprobe.study import override, study_to_toml

Make = Callable[..., Any]
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Collects tags, ids and text, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "br", "img", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text += data


def _write_folder(run: Any, folder: Path) -> None:
    """The made-up run as files."""
    (folder / "manifest.json").write_text(json.dumps(to_builtins(run.manifest)), encoding="utf-8")
    (folder / "study.toml").write_text(study_to_toml(run.study), encoding="utf-8")
    for record, (_, row) in zip(run.records, run.trials.iterrows(), strict=True):
        place = folder / "trials" / record.id
        place.mkdir(parents=True)
        removed = _numbers(row["removed"])
        kept = [block for block in range(12) if block not in removed]
        whole = to_builtins(record)
        costs = whole["costs"] | {"parameters": {"total": int(row["parameters_total"])}}
        whole |= {"kept": kept, "removed": removed, "costs": costs, "validation": None}
        whole |= {name: row[name] for name in ("depth", "seed", "status", "error")}
        (place / "record.json").write_text(json.dumps(whole), encoding="utf-8")
        users = run.users[run.users["trial"] == record.id]
        users.drop(columns="trial").to_parquet(place / "users.parquet", index=False)


def _numbers(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1)) if text else []


def _read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def page(run: Any) -> Page:
    path = build_report(run)
    assert path == run.path / "report.html"
    return _read(path)


def test_page_has_every_section_and_figure(page: Page, run: Any) -> None:
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == [
        *("depth", "pareto", "blocks", "maps", "reliance", "hurt", "ablation", "cost", "methods"),
        *("trials", "measured"),
    ]
    pictures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(pictures) == len(FIGURES)
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in pictures)
    figures = run.path / "figures"
    assert sorted(path.name for path in figures.iterdir()) == sorted(
        f"{entry.name}.{suffix}" for entry in FIGURES for suffix in ("svg", "png", "pdf")
    )
    assert {p.name for p in (run.path / "tables").iterdir()} == {
        f"{name}.{suffix}"
        for name in (
            *("methods", "methods_sampled", "trials", "ablation", "slices", "lists", "reliance"),
            *("left_out", "cost"),
        )
        for suffix in ("csv", "md", "tex")
    }


def test_page_asks_the_network_for_nothing(page: Page) -> None:
    assert not [tag for tag, _ in page.tags if tag in {"iframe", "img", "object"}]
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}]  # inline: it sorts
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)


def test_styles_load_nothing(page: Page, run: Any) -> None:
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:
        for name in ("href", "xlink:href"):
            target = attrs.get(name) or ""
            assert not target.startswith("#") or target[1:] in ids


def test_numbers_are_rounded(page: Page) -> None:
    # of seven digits or more after the point; ids and SVG paths are no text
    assert re.findall(r"\d\.\d{7,}", page.text) == []
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())


def test_sampled_numbers_are_labelled(page: Page) -> None:
    assert "Sampled: the next item among 999 random negatives" in page.text
    tables = [attrs for tag, attrs in page.tags if attrs.get("role") == "region"]
    labels = [attrs["aria-label"] or "" for attrs in tables]
    assert [label for label in labels if "sampled" in label] == [
        "All methods, sampled ranking with 999 random negatives"
    ]


def test_popular_negatives_are_named(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full"})
    run.study = override(run.study, **{"protocol.negatives": "popularity"})
    text = _read(build_report(run)).text
    assert "Sampled: the next item among 999 negatives drawn by popularity in training" in text
    assert "Beside it, the item among 999 negatives drawn by popularity in training" in text
    assert "random negatives" not in text


def test_everything_foreign_is_escaped(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full", "distill", EVIL},
               failing=[("distill", 4, 0)], error=f"ValueError: {EVIL}", dataset=EVIL,
               backbone=EVIL)  # fmt: skip
    run.study = override(run.study, name=EVIL)
    run.manifest.data.warnings = [EVIL]
    run.manifest.data.statistics = {EVIL: EVIL}
    run.manifest.command = f"depthprobe sweep '{EVIL}'"
    run.manifest.machine.cpu = EVIL
    page = _read(build_report(run))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(EVIL) >= 6  # shown, as text


def test_a_foreign_method_name_is_escaped_in_figures(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full", "finetune"})
    for frame in (run.trials, run.metrics):
        frame["method"] = frame["method"].replace("finetune", EVIL)
    page = _read(build_report(run))
    assert [tag for tag, _ in page.tags].count("script") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"methods": {"popularity", "sasrec"}, "timing": False}, ["methods", "trials", "measured"]),
        (
            {"methods": {"full", "finetune"}, "timing": False},
            ["depth", "pareto", "methods", "trials", "measured"],
        ),
        (
            {"methods": {"full", "skip"}, "timing": False},
            ["blocks", "methods", "trials", "measured"],
        ),
        ({"methods": set()}, ["measured"]),
    ],
)
def test_sections_without_data_are_absent(
    make: Make, tmp_path: Path, options: dict[str, object], expected: list[str]
) -> None:
    run = make(tmp_path, users=60, seeds=1, **options)
    page = _read(build_report(run))
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == expected


def test_an_older_figure_without_data_now_is_removed(make: Make, tmp_path: Path) -> None:
    stale = tmp_path / "figures" / "skip_sensitivity.svg"
    stale.parent.mkdir()
    stale.write_text("old", encoding="utf-8")
    build_report(make(tmp_path, users=60, seeds=1, methods={"full"}))
    assert not stale.exists()


def test_a_folder_is_opened(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=40, seeds=1, methods={"full", "finetune", "skip"})
    _write_folder(run, tmp_path)
    page = _read(build_report(str(tmp_path)))
    assert "fine-tuned" in page.text
    assert "blocks" in [attrs["id"] for tag, attrs in page.tags if tag == "section"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="run"):
        build_report(tmp_path)


def test_output_goes_where_it_is_asked(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path / "run", users=60, seeds=1, methods={"full", "distill"})
    target = tmp_path / "elsewhere" / "page.html"
    assert build_report(run, target) == target
    assert not (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "figures" / "kept_vs_depth.svg").exists()
    assert [p.name for p in target.parent.iterdir()] == ["page.html"]  # nothing temporary is left


def test_inline_svg_takes_its_own_ids() -> None:
    inside = '<g id="a"/><use href="#a" clip="url(#a)"/>'
    svg = f'<?xml version="1.0"?><svg viewBox="0 0 1 1">{inside}</svg>'
    text = inline_svg(svg, "one", label='a "quoted" <finding>')
    assert 'id="one-a"' in text
    assert 'href="#one-a"' in text
    assert "url(#one-a)" in text
    assert "&lt;finding&gt;" in text
    assert "<?xml" not in text
