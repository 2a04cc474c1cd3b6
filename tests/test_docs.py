"""What is written: links lead somewhere, commands parse, pages say what the code says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from typer.main import get_command

import depthprobe
from depthprobe.cli.app import app, main
from depthprobe.study import Study, study_from_dict

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "analyses").glob("*/README.md")),
    ROOT / "reports" / "README.md",
]
GUIDES = [page for page in PAGES if page.parent.name == "docs" or page.name == "README.md"]
MARKDOWN = MarkdownIt("commonmark").enable("table")
GROUP: Any = get_command(app)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load_generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = load_generate()


def anchors(page: Path) -> set[str]:
    """The headings' anchors, as GitHub makes them."""
    tokens = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(each.content for each in inline.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(slug if slug not in found else f"{slug}-1")
    return found


def links(page: Path) -> Iterator[str]:
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target:
                yield str(target)


def test_anchors_are_githubs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `[data.columns]`\n\n## What is *not* done, and why\n\n## a-b c\n")
    assert anchors(page) == {"datacolumns", "what-is-not-done-and-why", "a-b-c"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in anchors(target), link


def commands(group: Any = GROUP, before: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by its words."""
    found: dict[tuple[str, ...], Any] = {}
    for word, command in group.commands.items():
        path = (*before, word)
        found |= commands(command, path) if hasattr(command, "commands") else {path: command}
    return found


COMMANDS = commands()


def written(page: Path) -> list[str]:
    """The lines of code blocks that call depthprobe, continued ones joined, comments cut off."""
    found = []
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        if token.type not in {"code_block", "fence"} or token.info.strip() not in {
            "",
            "sh",
            "bash",
        }:
            continue
        text = re.sub(r"\\\n\s*|\n {8,}(?=[\[-])", " ", token.content)
        for line in text.splitlines():
            call = re.search(r"(?:^|-m )\s*depthprobe (\S.*)", line)
            if call:
                found.append(re.split(r"\s#|\s&$", call[1])[0].strip())
    return found


WRITTEN = [(page, line) for page in GUIDES for line in written(page)]


def test_there_are_commands_in_the_guides() -> None:
    assert len(WRITTEN) > 40
    assert {page.name for page, _ in WRITTEN} >= {"README.md", "sweep.md", "data.md", "cost.md"}


@pytest.mark.parametrize(("page", "line"), WRITTEN, ids=lambda value: Path(str(value)).name)
def test_a_written_command_parses(page: Path, line: str) -> None:
    words = shlex.split(line)
    if words[0].startswith("-"):
        assert words[0] in {option for parameter in GROUP.params for option in parameter.opts}
        return
    path = tuple(words[: 2 if words[0] == "data" else 1])
    if path == ("COMMAND",):
        return
    command, rest = COMMANDS[path], words[len(path) :]
    if "[" in line:  # a synopsis: what it names must be there
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z][a-z-]*", line)) <= known
        return
    values = command.make_context(" ".join(path), rest).params
    given = {key: values[key] for key in ("layers", "methods") if values.get(key)}
    if "methods" in given:
        given["methods"] = [word.strip() for word in given["methods"].split(",")]
    study_from_dict(given)  # refuses a depth or a method that is none


def test_the_quick_ones_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [line for page, line in WRITTEN if re.match(r"data (show|prepare) embedded", line)]
    assert len(quick) == 2
    for line in [*quick, "data list"]:
        with pytest.raises(SystemExit) as exit_:
            main(shlex.split(line))
        assert exit_.value.code == 0, line
    assert (tmp_path / "log.png").is_file()
    assert (tmp_path / "films" / "manifest.json").is_file()


def test_every_command_and_option_is_in_the_guides() -> None:
    guides = "\n".join(page.read_text(encoding="utf-8") for page in GUIDES)
    for path, command in COMMANDS.items():
        assert f"depthprobe {' '.join(path)}" in guides
        for parameter in command.params:
            for option in parameter.opts:
                assert not option.startswith("-") or option in guides


@pytest.mark.parametrize("page", list(GENERATE.PAGES))
def test_a_generated_page_is_as_new_as_the_code(page: str) -> None:
    """If not: ``python docs/generate.py``."""
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == GENERATE.PAGES[page]()


# each once, in the same order in every worker
KINDS = list(dict.fromkeys(GENERATE.dataclasses_of(Study)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_setting_is_documented(kind: type) -> None:
    docs = GENERATE.field_docs(kind)
    assert list(docs) == [field.name for field in fields(kind)]  # type: ignore[arg-type]
    assert all(len(text) > 5 and text.endswith((".", "...")) for text in docs.values())


def test_a_setting_without_a_word_is_found() -> None:
    class Bare:
        #: what it is, in
        #: two lines.
        first: int
        bare: int
        second: int = 2  #: behind it.

    assert GENERATE.field_docs(Bare) == {
        "first": "what it is, in two lines.",
        "second": "behind it.",
    }


PYTHON = [
    (page, token.content)
    for page in GUIDES
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8"))
    if token.type == "fence" and token.info.strip() == "python"
]


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=lambda value: getattr(value, "name", ""))
def test_python_in_the_guides_is_python(page: Path, code: str) -> None:
    compile(code, page.name, "exec")
    for module in re.findall(r"^from (depthprobe[\w.]*) import (.+)$", code, flags=re.MULTILINE):
        for each in module[1].split(", "):
            assert hasattr(importlib.import_module(module[0]), each)


def test_the_recommender_of_the_guide_to_probing_is_probed() -> None:
    (code,) = (code for page, code in PYTHON if page.name == "probing.md" and "Mine" in code)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    ranks = names["early_exit"](names["model"], names["eval_set"], device=names["device"])
    assert [each["full"].shape for each in ranks] == [(2,)] * 5
    assert all((each["full"] >= 1).all() for each in ranks)


def test_the_metric_of_the_guide_is_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [(m, d, s) for m, d in (("distill", 4), ("full", 12)) for s in (0, 1, 2)]
    names = [f"{method}-{seed}" for method, _, seed in trials]
    frame = pd.DataFrame(trials, columns=["method", "depth", "seed"]).assign(trial=names)
    places = {"distill": [1.0, 9.0, math.inf, 7.0], "full": [5.0, 2.0, 40.0, 10.0]}
    rows = [
        {"trial": name, "user": user, "protocol": "full", "rank": rank}
        for name, (method, *_) in zip(names, trials, strict=True)
        for user, rank in enumerate(places[method])
    ]
    run = SimpleNamespace(trials=frame, users=pd.DataFrame(rows))
    monkeypatch.setattr(depthprobe, "open_run", lambda path: run, raising=False)
    (code,) = (code for page, code in PYTHON if page.name == "metrics.md")
    exec(code, {})  # noqa: S102
    assert capsys.readouterr().out.startswith("80.0% of the teacher's, ")


WITH_DOCTESTS = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "depthprobe").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", WITH_DOCTESTS)
def test_doctests(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0
    assert failed == 0
