"""What is installed: a wheel with all that the package reads, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

import depthprobe

ROOT = Path(__file__).parent.parent
Build = Callable[[str], Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """``build("wheel")``: the file that hatchling makes, without network or isolation."""
    pytest.importorskip("hatchling", reason="the build backend; in the extra dev")

    def run(target: str) -> Path:
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (made,) = tmp_path.iterdir()
        return made

    return run


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_what_it_reads(build: Build) -> None:
    made = build("wheel")
    assert made.name == f"depthprobe-{depthprobe.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(made) as wheel:
        names = set(wheel.namelist())
        (info,) = {name.split("/")[0] for name in names} - {"depthprobe"}
        told = message_from_bytes(wheel.read(f"{info}/METADATA"))
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    inside = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "depthprobe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("depthprobe/")} == inside
    assert {"py.typed", "demo.toml", "report/templates/report.html.j2"} <= {
        name.removeprefix("depthprobe/") for name in names
    }
    assert told["Version"] == depthprobe.__version__
    assert "depthprobe = depthprobe.cli:main" in scripts


@pytest.mark.slow
def test_the_source_archive_holds_what_the_tests_read(build: Build) -> None:
    with tarfile.open(build("sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("docs/conf.py", "docs/index.md", "notebooks/01_first_sweep.ipynb", "CONTRIBUTING.md")
    assert {*needed, "tests/test_docs.py", "Makefile", "constraints.txt", "README.md"} <= names
    assert not any(name.startswith(("runs", ".venv", "build", "notebooks/runs")) for name in names)


def test_the_version_stands_in_one_place() -> None:
    """Elsewhere it is read from there, but for the citation, which names it."""
    assert f"version: {depthprobe.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
