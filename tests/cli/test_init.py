"""`init`: a study file that is read again, and whose comments are true of the log."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depthprobe.cli.init import CHOSEN, TABLES, commented
from depthprobe.cli.options import make_study
from depthprobe.study import Columns, Recipe, Study, Variant, load_study, study_to_dict

Cli = Callable[..., Any]
ROWS = """shopper,code,ordered_on,qty
a,x,2024-05-01,1
a,y,2024-05-02,1
a,z,2024-05-03,1
a,x,2024-05-03,1
b,x,2024-05-01,1
b,y,2024-05-02,1
b,z,2024-05-09,1
"""
NAMED = ("--data", "shop.csv", "--user-column", "shopper", "--item-column", "code")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "shop.csv"
    path.write_text(ROWS, encoding="utf-8")
    return path


def here(text: str, key: str) -> str:
    """What the file says of a key in this log: in the comment above it."""
    above = re.split(rf"\n(?:# )?{re.escape(key)}", text, maxsplit=1)[0].rpartition("\n\n")[2]
    return " ".join(above.replace("\n# ", " ").partition("Here: ")[2].split())


def test_the_file_is_the_study_of_the_flags(cli: Cli, log: Path) -> None:
    more = ("--time-column", "ordered_on", "--layers", "1-3", "--set", "recipe.batch_size=16")
    outcome = cli("init", "own.toml", *NAMED, *more, "--set", "variants.kd.select=ends")
    assert (outcome.code, outcome.err) == (0, "")
    columns = "user = shopper, item = code, time = ordered_on, ignored: qty"
    assert outcome.out.splitlines()[0] == f"columns: {columns}"
    assert outcome.out.splitlines()[-2:] == [
        "own.toml",
        "next: depthprobe sweep own.toml --dry-run",
    ]
    study = load_study("own.toml")
    assert (study.name, study.layers, study.recipe) == ("shop", "1-3", Recipe(batch_size=16))
    assert study.data.columns == Columns(user="shopper", item="code", time="ordered_on")
    assert study.variants == {"kd": Variant(select="ends")}
    assert study_to_dict(study) == study_to_dict(make_study(Path("own.toml")))
    text = Path("own.toml").read_text("utf-8")
    assert here(text, "[data.columns]") == columns
    assert here(text, "source") == "2 users, 3 items, 7 interactions, 2024-05-01 to 2024-05-09."
    assert here(text, "layers").startswith("12 blocks (llama); this stands for depths 1, 2, 3.")
    assert here(text, "max_history") == (
        "histories of 3.5 items in the median, 4 at most; 0 % have more than 50."
    )
    assert here(text, "ties = ") == "20 % of neighbours in a history have the same time."
    assert here(text, "core") == "2 users and 3 items have fewer than 5."
    assert here(text, "split = ") == "2 test users with leave-one-out."
    assert here(text, "filter_seen") == "14 % of the interactions repeat an item of their user."


def test_a_file_that_can_t_be_written_is_the_study_file(cli: Cli, log: Path) -> None:
    Path("folder").mkdir()
    for name, why in (("folder", "a file, not a folder"), ("shop.csv/study.toml", "a folder (")):
        outcome = cli("init", name, *NAMED, "--overwrite")
        assert outcome.code == 2
        assert outcome.err.startswith(f"error: STUDY.toml: expected {why}")


def test_dates_that_are_not_read_are_named(cli: Cli, log: Path) -> None:
    outcome = cli("init", *NAMED)
    assert "looks like dates and is not read: --time-column ordered_on" in outcome.out
    assert "dates: --time-column ordered_on" in here(Path("study.toml").read_text(), "[data.col")
    again = cli("init", *NAMED)
    assert (again.code, again.err) == (
        2,
        "error: STUDY.toml: 'study.toml': already exists; --overwrite replaces it\n",
    )
    assert cli("init", *NAMED, "--overwrite", "--seeds", "4").code == 0
    assert load_study("study.toml").seeds == 4


def test_nothing_is_written_of_what_cannot_be_used(cli: Cli, log: Path) -> None:
    for words in (
        NAMED[:2],
        (*NAMED, "--backbone", "missing/folder/x"),
        (*NAMED, "--layers", "13"),
        (*NAMED, "--set", "recipe.epoch=2"),
    ):
        outcome = cli("init", *words)
        assert outcome.code == 2
        assert len(outcome.err.splitlines()) == 1
        assert not Path("study.toml").exists()


def test_a_log_that_came_split_keeps_its_split(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name, pairs in {"train": "ax ay bx by", "valid": "az", "test": "ay bx"}.items():
        lines = ["user,item", *(",".join(pair) for pair in pairs.split())]
        (tmp_path / "parts" / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8")
    assert cli("init", "--data", "parts").code == 0
    study = load_study("study.toml")
    assert study.protocol.split == "given"
    assert study.data.columns == Columns(user="user", item="item")  # that were guessed
    # the columns of a prepared folder have no names any more
    assert cli("data", "prepare", "parts", "folder").code == 0
    assert cli("init", "--data", "folder", "--overwrite").code == 0
    assert load_study("study.toml").data.columns == Columns()


def test_every_default_may_be_uncommented(tmp_path: Path) -> None:
    """What the comments call a default is one: the study stays the same."""
    text = commented(Study(), {})
    bare = re.sub(r"(?m)^# (\w+ = (?!\.\.\.).*)$", r"\1", text)
    assert bare != text
    for each in (text, bare):
        path = tmp_path / "study.toml"
        path.write_text(each, encoding="utf-8")
        assert load_study(path) == Study()
    # all keys of the tables are there, each once and with a comment of more than a word
    written = re.findall(r"(?m)^(?:# )?(\w+) = ", text)
    content = study_to_dict(Study())
    for name in TABLES:
        table = content
        for part in filter(None, name.split(".")):
            table = table[part]
        assert {key for key, value in table.items() if not isinstance(value, dict)} <= {*written}
    assert {key.rpartition(".")[2] for key in CHOSEN} <= {*re.findall(r"(?m)^(\w+) = ", text)}
    assert max(map(len, text.splitlines())) <= 140
