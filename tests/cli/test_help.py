"""Help and version: every command says what it takes, in half a second, without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.main import get_command

import depthprobe
from depthprobe.cli.app import EXAMPLES, app
from depthprobe.methods import METHODS

COMMANDS = {
    "sweep": ["STUDY.toml", "--data", "--backbone", "--layers", "--methods", "--seeds", "--epochs"]
    + ["--output", "--device", "--executor", "--jobs", "--item-embeddings", "--revision"],
    "init": ["STUDY.toml", "--data", "--backbone", "--user-column", "--set", "--overwrite"],
    "find": ["STUDY.toml", "--data", "--backbone", "--layers", "--seeds", "--hours", "--margin"],
    "report": ["RUN", "--output", "--margin", "--level", "--metric"],
    "status": ["RUN"],
    "compare": ["A B...", "--targets", "--slices", "--common", "--margin", "--json", "--output"]
    + ["--fail-unless"],
    "cost": ["--backbone", "--layers"],
    "export": ["RUN", "TRIAL", "DIR", "--exit", "--onnx", "--push-to-hub"],
    "recommend": ["DIR", "--history", "--top", "--device", "--skip-unknown", "--output", "--exit"]
    + ["--user-column", "--format"],
    "data": ["prepare", "show", "list"],
    "check": ["--backbone"],
}


def test_help_lists_every_command(cli: Callable[..., Any]) -> None:
    outcome = cli("--help")
    listed = re.findall(r"^  ([a-z]+)  ", outcome.out.partition("Commands:")[2], flags=re.MULTILINE)
    assert set(listed) == {*COMMANDS, "train", "probe", "distill"}
    assert outcome.code == 0
    assert cli().out == outcome.out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_its_arguments(cli: Callable[..., Any], name: str) -> None:
    outcome = cli(name, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    for word in COMMANDS[name]:
        assert word in outcome.out


def test_a_command_begins_with_an_example_that_it_takes() -> None:
    """Parsed, not run: the options and the number of arguments are those of the command."""
    for name, words in EXAMPLES.items():
        command, given = get_command(app), words.split()
        while command is not None and hasattr(command, "commands"):
            command = command.commands.get(given.pop(0))
        if command is None:
            assert name == "compare"
            continue
        assert command.name == name
        assert command.help.startswith(f"Example: depthprobe {words}\n\n")
        assert len(f"  Example: depthprobe {words}") <= 80  # of one line
        command.make_context(name, given)


def test_the_help_says_how_to_run_the_demo(cli: Callable[..., Any]) -> None:
    assert "Run the demo: depthprobe sweep\n" in cli("--help").out


@pytest.mark.parametrize("name", ["train", "probe", "distill"])
def test_a_phase_takes_what_sweep_takes(cli: Callable[..., Any], name: str) -> None:
    options = re.findall(r"^  --[a-z]+", cli("sweep", "--help").out, flags=re.MULTILINE)
    assert re.findall(r"^  --[a-z]+", cli(name, "--help").out, flags=re.MULTILINE) == options


def test_version(cli: Callable[..., Any]) -> None:
    assert cli("--version").out == f"depthprobe {depthprobe.__version__}\n"


def test_the_shell_can_complete_commands_and_options() -> None:
    code = "from depthprobe.cli import main; main([])"
    for typed, expected in {
        "depthprobe sta": "status",
        "depthprobe sweep --dry": "--dry-run",
    }.items():
        asked = {"_DEPTHPROBE_COMPLETE": "complete_bash", "COMP_WORDS": typed}
        words = {**os.environ, **asked, "COMP_CWORD": str(len(typed.split()) - 1)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=words, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [expected]


def test_the_package_is_a_command_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "depthprobe", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"depthprobe {depthprobe.__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["sweep", "--help"], ["data", "show", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """What keeps it under half a second."""
    heavy = {"torch", "numpy", "pandas", "pyarrow", "matplotlib", "transformers", "rich", "scipy"}
    code = (
        "import atexit, sys; from depthprobe.cli import main;"
        f"atexit.register(lambda: print('loaded:', *sorted({heavy!r} & set(sys.modules))));"
        f"main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


def test_the_help_of_a_phase_says_what_each_of_its_methods_is(cli: Callable[..., Any]) -> None:
    listed = {name: cli(name, "--help").out for name in ("sweep", "train", "probe", "distill")}
    for name, method in METHODS.items():
        line = f"  {name:16}  {method.summary}"
        assert line in listed["sweep"]
        assert (line in listed["probe"]) == (method.role == "probe")
