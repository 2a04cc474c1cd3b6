"""`data`: what is kept, counted, drawn and refused, through the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depthprobe.data.public import SETS
from depthprobe.data.readers.formats import FORMATS
from depthprobe.data.storage import load_data

Cli = Callable[..., Any]

# who, what, when, stars; 17 rows in no order
ROWS = """who,what,when,stars,called
a,x,100,5,The X
a,y,200,4,
a,x,300,5,The X
a,z,400,2,Zed
a,v,500,5,
b,x,110,4,The X
b,y,210,5,Why
b,v,310,4,
b,w,410,4,
c,w,150,5,
c,v,120,4,
c,y,140,4,Why
c,u,160,1,
d,x,170,4,The X
d,y,180,3,Why
e,t,190,5,
e,t,195,5,
"""
NAMED = [
    *("--user-column", "who", "--item-column", "what", "--time-column", "when"),
    *("--rating-column", "stars", "--title-column", "called"),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "shop.csv"
    path.write_text(ROWS, encoding="utf-8")
    return path


def rows(text: str) -> list[list[str]]:
    """The cells of every line: what two blanks or more separate."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


def facts(text: str) -> dict[str, str]:
    """The lines of two cells, by the first."""
    return {line[0]: line[1] for line in rows(text) if len(line) == 2}


def test_prepare_cleans_in_order_and_says_what_went(cli: Cli, log: Path) -> None:
    rules = ("--min-rating", "3", "--repeats", "last", "--latest", "3", "--core", "2")
    outcome = cli("data", "prepare", log, "out", "--name", "tiny", *NAMED, *rules)
    assert (outcome.code, outcome.err) == (0, "")
    steps = [line for line in rows(outcome.out) if len(line) == 5]
    assert steps == [
        ["cleaning", "interactions", "users", "items", "gone"],
        ["as read", "17", "5", "7", "-"],
        ["rating 3 or more", "15", "5", "5", "2"],  # a z and c u
        ["last of a repeat", "13", "5", "5", "2"],  # a x at 100, e t at 190
        ["latest 3 of a user", "12", "5", "5", "1"],  # b x
        ["2-core", "11", "4", "4", "1"],  # e t, and with it e
    ]
    assert outcome.out.splitlines()[-1] == "out"
    sequences = load_data("out")
    names = {user: sequences.item_ids[sequences.history(k) - 1].tolist()
             for k, user in enumerate(sequences.user_ids.tolist())}  # fmt: skip
    assert names == {
        "a": ["y", "x", "v"], "b": ["y", "v", "w"], "c": ["v", "y", "w"], "d": ["x", "y"]
    }  # fmt: skip
    assert dict(zip(sequences.item_ids.tolist(), sequences.titles or [], strict=True)) == {
        "v": "", "w": "", "x": "The X", "y": "Why"
    }  # fmt: skip
    said = facts(outcome.out)
    assert (said["name"], said["source"]) == ("tiny", str(log))
    assert (said["users"], said["items"], said["interactions"]) == ("4", "4", "11")
    assert said["density"] == "68.8 %"  # 11 of 16
    assert said["titles"] == "for 2 items"


def test_show_counts_and_draws(cli: Cli, log: Path) -> None:
    outcome = cli("data", "show", log.name, *NAMED)
    assert outcome.code == 0
    said = facts(outcome.out)
    assert (said["users"], said["items"], said["interactions"]) == ("5", "7", "17")
    assert said["repeats"].startswith("11.8 %")  # 2 of 17: a x, e t
    assert said["times"] == "1970-01-01 to 1970-01-01"
    assert said["same time"].startswith("0 %")
    assert said["split"] == "leave-one-out"
    assert said["training"] == "11 interactions of 4 items"  # d and e train alone
    assert said["test"] == "3 users, 2 of their targets unknown to training"  # b w, c u
    table = rows(outcome.out)
    assert ["of a user", "2", "2", "2", "4", "4", "5", "5"] in table
    assert ["of an item", "1", "1", "1", "2", "4", "4", "4"] in table
    assert ["2", "█" * 24, "2", "40 %"] in table
    assert ["3-4", "█" * 24, "2", "40 %"] in table
    assert ["5-8", "█" * 12, "1", "20 %"] in table
    assert ["50 %", "█" * 18 + "▍", "76.5 %", "4"] in table  # 4 + 4 + 3 + 2 of 17
    assert max(map(len, outcome.out.partition("warning: ")[0].splitlines())) <= 100
    assert [line for line in outcome.out.splitlines() if line.startswith("warning: ")] == [
        "warning: all times are before 1973: if they are not seconds, only their order holds",
        "warning: 4 of 7 items have no title",
        "warning: 2 of 5 users train only: fewer than 3 interactions",
        "warning: 2 of 3 test targets (67 %) are items that no training interaction holds: "
        "they stay in every score",
    ]


def test_show_says_which_columns_it_took(cli: Cli, log: Path) -> None:
    bare = [word for word in NAMED if word not in {"--time-column", "when"}]
    text = log.read_text("utf-8")
    log.write_text(re.sub(r",(\d)(\d)\d,", r",2\1/07/2024 08:0\2,", text), "utf-8")  # 21/07 08:00
    flags = "--time-column when --time-format '%d/%m/%Y %H:%M'"
    outcome = cli("data", "show", log.name, *bare)
    line = f"user = who, item = what, time = none, title = called, ignored: when (dates: {flags})"
    shown = " ".join(outcome.out.split())
    assert f"columns {line}, stars titles" in shown
    note = f"the column when looks like dates and is not read: {flags} orders the log by it"
    assert f"warning: {note}" in outcome.out
    # the flags that were named do it; another form is refused with the line
    timed = ("--time-column", "when", "--time-format", "%d/%m/%Y %H:%M")
    assert cli("data", "prepare", log.name, "out", *bare, *timed).code == 0
    outcome = cli("data", "show", "out")
    assert facts(outcome.out)["times"] == "2024-07-21 to 2024-07-25"
    shown = " ".join(outcome.out.split())
    assert "columns user = who, item = what, time = when, title = called, ignored: stars" in shown
    assert "looks like dates" not in outcome.out
    outcome = cli("data", "show", log.name, *bare, *timed[:2])
    form = "for another form say --time-format '%d/%m/%Y %H:%M'"
    assert (outcome.code, form in outcome.err) == (2, True)
    outcome = cli("data", "show", log.name, *bare, *timed[:3], "%m/%d/%Y %H:%M")
    assert "line 2 has the time '21/07/2024 08:00'; expected a time of the form" in outcome.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("embedded", "--time-format", "%Y"), "none for the embedded log"),
        (("shop.csv", *NAMED, "--time-format", "%d/%m"), "codes of strptime with a year"),
        (("shop.csv", *NAMED, "--time-format", "%Q %Y"), "codes of strptime with a year"),
        (("shop.csv", *NAMED[:4], "--time-format", "%Y"), "--time-column beside it, one of who"),
    ],
)
def test_a_time_format_that_is_none(
    cli: Cli, log: Path, words: tuple[str, ...], reason: str
) -> None:
    outcome = cli("data", "show", *words)
    assert outcome.code == 2
    assert outcome.err.startswith("error: --time-format: expected ")
    assert reason in outcome.err


def test_bars_are_plain_where_blocks_can_t_be_written(log: Path) -> None:
    command = [sys.executable, "-m", "depthprobe", "data", "show", str(log), *NAMED]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ["5-8", "#" * 12, "1", "20 %"] in rows(done.stdout.replace(" | ", "   "))


def test_show_a_temporal_split(cli: Cli, tmp_path: Path) -> None:
    day = 86_400
    log = [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 5), ("c", 6), ("b", 8), ("d", 9)]
    lines = [f"{user},i{k},{time * day}" for k, (user, time) in enumerate(log)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *lines]), encoding="utf-8")
    temporal = ("--split", "temporal", "--split-at", "1970-01-05,1970-01-08")
    said = facts(cli("data", "show", "log.csv", *temporal).out)
    assert said["split"] == "temporal, validation from 1970-01-05, test from 1970-01-08"
    assert said["training"] == "4 interactions of 4 items"
    assert said["validation"] == "1 users, 1 cold ones left out"
    assert said["test"] == ("1 users, 1 cold ones left out, 1 of their targets unknown to training")


def test_a_log_that_came_split_is_shown_so(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    parts = {"train": "ax ay bx by", "valid": "az", "test": "ay bx"}
    for name, pairs in parts.items():
        lines = ["user,item", *(",".join(pair) for pair in pairs.split())]
        (tmp_path / "parts" / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8")
    outcome = cli("data", "show", "parts", "--split", "given")
    said = facts(outcome.out)
    assert said["came split"].startswith("training 4, validation 1, test 2")
    assert (said["split"], said["validation"]) == ("given", "1 users")
    assert said["test"] == "2 users, 2 of their targets that the user had before"
    assert said["seen items"] == "ranked too"


def test_a_log_that_nobody_can_be_asked_about_is_still_shown(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "shop.txt").write_text("u1 i1 i2\nu2 i2 i3\n", encoding="utf-8")
    outcome = cli("data", "prepare", "shop.txt", "out")
    assert outcome.code == 0
    assert "warning: no times" in outcome.out
    assert "warning: no leave-one-out split (no user has 3 interactions, " in outcome.out
    assert facts(cli("data", "show", "out").out)["name"] == "shop"
    assert cli("data", "show", "out", "--split", "leave-one-out").code == 2


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_show_draws_a_figure(cli: Cli, log: Path, ending: str, start: bytes) -> None:
    outcome = cli("data", "show", log, *NAMED, "--figure", f"log.{ending}")
    assert outcome.out.splitlines()[-1] == f"log.{ending}"
    assert Path(f"log.{ending}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--min-rating", "four"], ["--min-rating", "'four'", "number"]),
        (["--min-rating", "nan"], ["--min-rating", "nan", "finite number"]),
        (["--min-rating", "6"], ["cleaning", "rating 6 or more", "leaves something"]),
        (["--repeats", "none"], ["repeats", "'none'", "keep, first, last"]),
        (["--latest", "0"], ["latest", "0", "at least 1"]),
        (["--core", "2.5"], ["--core", "'2.5'", "whole number"]),
        (["--core", "0"], ["core", "0", "at least 1"]),
        (["--core", "9"], ["cleaning", "9-core", "leaves something"]),
        (["--format", "cvs"], ["format", "'cvs'", "did you mean csv?"]),
        (["--items", "none.tsv"], ["items", "none.tsv"]),
        (["--item-column", "wat"], ["--item-column", "'wat'", "did you mean what?"]),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(
    cli: Cli, log: Path, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    for command in (["prepare", log, "out"], ["show", log]):
        outcome = cli("data", *command, *NAMED, *flags)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert all(word in outcome.err for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["shop.csv"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split", "random"], ["--split", "'random'", "leave-one-out, temporal, given"]),
        (["--split", "given"], ["--split", "training, validation and test files"]),
        (["--split-at", "0.8,0.9"], ["split-at", "'0.8,0.9'", "--split temporal"]),
        (["--split", "temporal", "--split-at", "0.8"], ["--split-at", "'0.8'", "two dates"]),
        (
            ["--split", "temporal", "--split-at", "0.9,0.8"],
            ["--split-at", "validation before test"],
        ),
        (["--figure", "log.jpg"], ["figure", "'log.jpg'", ".png, .svg, .pdf"]),
        (["--figure", "shop.csv/log.png"], ["figure", "is a file"]),
    ],
)
def test_bad_splits_and_figures(
    cli: Cli, log: Path, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    outcome = cli("data", "show", log, *NAMED, *flags)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert all(word in outcome.err for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["shop.csv"]


def test_a_name_that_is_no_log_is_refused_before_anything_is_fetched(cli: Cli) -> None:
    outcome = cli("data", "show", "amazon-2014:Beuty")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "did you mean amazon-2014:Beauty?" in outcome.err


def test_list_has_every_format_and_public_set(cli: Cli) -> None:
    outcome = cli("data", "list")
    assert (outcome.code, outcome.err) == (0, "")
    first = [line[0] for line in rows(outcome.out)]
    assert first[2 : 2 + len(FORMATS)] == list(FORMATS)
    words = " ".join(outcome.out.split())
    for one in SETS.values():
        family, _, category = one.name.partition(":")
        assert f" {family} " in words or f" {family}:CATEGORY " in words
        assert re.search(rf"[ ,]{category}[ ,]", words)
        if not category:
            assert one.terms in words
    assert " 5.9 " in words  # megabytes of ml-1m
