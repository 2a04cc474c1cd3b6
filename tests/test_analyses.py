"""What the analyses ask for can be run; what is published names nobody and no machine."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from depthprobe.methods import base_of, method_of
from depthprobe.runs.plan import plan
from depthprobe.study import load_study

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "analyses").glob("*/*.toml"))
READMES = sorted((ROOT / "analyses").glob("*/README.md"))
REPORTS = ROOT / "reports"
BLOCKS = {"plaintext": 12, "smollm2": 30}  # of the backbones that the studies name
TEXT = {".html", ".csv", ".md", ".toml"}


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_study_can_be_planned(file: Path) -> None:
    study = load_study(file)
    source = study.backbone.source
    blocks = next((n for part, n in BLOCKS.items() if part in source), 5)
    tasks = plan(study, blocks)
    trials = [trial for task in tasks for trial in task.trials]
    planned = {trial.method for trial in trials}
    planned |= {base_of(trial.method) for trial in trials if trial.of}  # in fewer bits
    assert all(method_of(name).table for name in set(study.methods) - planned)


def test_every_question_has_its_answer_beside_it() -> None:
    assert len(READMES) > 10
    assert {file.parent for file in STUDIES} <= {readme.parent for readme in READMES}


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_the_files_that_a_page_names_are_there(readme: Path) -> None:
    named = re.findall(r"analyses/[\w./-]+\.(?:py|toml)", readme.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).is_file()] == []


SCRIPTS = sorted([*(ROOT / "analyses").rglob("*.py"), *(ROOT / "notebooks").glob("*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_what_a_script_imports_from_the_package_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("depthprobe"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):  # a module, then
                    importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.parametrize("folder", sorted(REPORTS.iterdir()), ids=lambda folder: folder.name)
def test_what_is_published_is_small_and_of_nobody(folder: Path) -> None:
    files = [file for file in (folder, *folder.rglob("*")) if file.is_file()]
    assert files
    for file in files:
        assert file.suffix in TEXT | {".png"}, file
        assert file.stat().st_size < 1_000_000, file
        if file.suffix in TEXT:
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"/(home|root|tmp|work|Users)/", text), file
