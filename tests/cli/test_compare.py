"""`compare` as a user sees it: verdicts, the page, JSON; and what is refused in a line."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import pandas as pd
import pytest

from depthprobe.evaluation.metrics import metrics_from_ranks
from depthprobe.evaluation.statistics import difference_interval, ratio_interval

Cli = Callable[..., Any]
PAGE = Path(__file__).parents[2] / "docs" / "compare.md"


def write(path: Path, ranks: np.ndarray, **columns: Any) -> pd.DataFrame:
    """Ranks (S, U) as a file with a column of seeds, its rows in any order."""
    seeds, users = np.indices(ranks.shape)
    table = {"user": users.ravel(), "seed": seeds.ravel(), "rank": ranks.ravel(), **columns}
    frame = pd.DataFrame(table).sample(frac=1, random_state=0)
    frame.to_csv(path, index=False)
    return frame


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, np.ndarray]:
    """A reference, one as good, one better, one worse; (3, 400) each."""
    draw = np.random.default_rng(0)
    common = draw.geometric(0.1, size=400)
    base, same = common + draw.integers(2, size=(2, 3, 400))
    ranks = {"a": base, "same": same, "better": np.maximum(1, base - 2), "worse": base + 2}
    for name, own in ranks.items():
        write(tmp_path / f"{name}.csv", own, land=np.tile(["DE", "FR"], 600))
    return ranks


def as_json(cli: Cli, *words: object) -> dict[str, Any]:
    outcome = cli("compare", *words, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return dict(json.loads(outcome.out))


def test_numbers_are_those_of_the_ranks(cli: Cli, arms: dict[str, np.ndarray]) -> None:
    found = as_json(cli, "a.csv", "worse.csv", "--metric", "MRR", "--slices", "land")
    (one,) = found["others"]
    x, r = 1 / arms["worse"], 1 / arms["a"]
    assert (found["users"], found["seeds"], found["metric"]) == (400, 3, "MRR")
    for key, interval in (
        ("difference", difference_interval(x, r)), ("share", ratio_interval(x, r)),
    ):  # fmt: skip
        assert one[key] == pytest.approx(vars(interval))
        assert one["metrics"]["MRR"][key] == one[key]
    for name, value in metrics_from_ranks(arms["worse"].ravel()).items():
        if name in one["means"]:
            assert one["means"][name]["value"] == pytest.approx(value, abs=1e-12)
    german = np.arange(400) % 2 == 0
    row = next(row for row in one["slices"] if row["slice"] == "land:DE")
    assert (row["users"], row["value"]) == (200, pytest.approx(x[:, german].mean()))
    assert row["difference"] == pytest.approx(vars(difference_interval(x[:, german], r[:, german])))


def test_verdicts_and_what_a_pipeline_makes_of_them(cli: Cli, arms: dict[str, np.ndarray]) -> None:
    files = ("a.csv", "better.csv", "worse.csv")
    better, worse = as_json(cli, *files)["others"]
    assert (better["verdict"], worse["verdict"]) == ("superior", "inferior")
    assert better["tested_at"] == pytest.approx(0.025)
    assert better["claims"]["non-inferior"]["shown"]
    assert better["users_to_decide"] == []
    assert cli("compare", "a.csv", "better.csv", "--fail-unless", "superior").code == 0
    assert cli("compare", *files, "--fail-unless", "non-inferior").code == 1
    undecided = as_json(cli, "a.csv", "same.csv", "--margin", "0.1%")["others"][0]
    assert undecided["verdict"] == "undecided"
    assert undecided["users_to_decide"][0] is None or undecided["users_to_decide"][0] > 400


def test_one_seed_speaks_of_these_models_and_stands_beside_several(
    cli: Cli, arms: dict[str, np.ndarray], tmp_path: Path
) -> None:
    write(tmp_path / "one.csv", arms["a"][:1])
    write(tmp_path / "two.csv", arms["worse"][:1])
    outcome = cli("compare", "one.csv", "two.csv")
    assert "two.csv is worse than one.csv" in outcome.out
    assert "One seed each: this is about these very models" in outcome.out
    outcome = cli("compare", "one.csv", "worse.csv")
    assert "one.csv has one seed: it stands for itself alone." in outcome.out
    assert as_json(cli, "one.csv", "worse.csv")["seeds"] == 3
    # a file a seed is the same as a column
    for seed in range(3):
        write(tmp_path / f"w{seed}.csv", arms["worse"][[seed]])
        table = pd.read_csv(tmp_path / f"w{seed}.csv").drop(columns="seed")
        table.to_csv(tmp_path / f"w{seed}.csv", index=False)
    joined = as_json(cli, "a.csv", "w0.csv,w1.csv,w2.csv")["others"][0]
    assert joined["share"] == as_json(cli, "a.csv", "worse.csv")["others"][0]["share"]


def test_few_users_who_differ_are_said(cli: Cli, tmp_path: Path) -> None:
    ranks = np.ones((1, 300))
    write(tmp_path / "a.csv", ranks)
    write(tmp_path / "b.csv", ranks)
    outcome = cli("compare", "a.csv", "b.csv")
    assert "b.csv differs from the reference for 0 users; the tests count one more" in outcome.out


def test_users_that_not_all_files_have(
    cli: Cli, arms: dict[str, np.ndarray], tmp_path: Path
) -> None:
    write(tmp_path / "fewer.csv", arms["a"][:, :390])
    outcome = cli("compare", "a.csv", "fewer.csv", "--output", "page.html")
    assert outcome.code == 2
    assert "they have 400, 390 (390 in common; --common compares these)" in outcome.err
    assert not (tmp_path / "page.html").exists()
    found = as_json(cli, "a.csv", "fewer.csv", "--common")
    assert (found["users"], found["reference"]["users_left_out"]) == (390, 10)
    write(tmp_path / "hole.csv", arms["a"]).iloc[1:].to_csv(tmp_path / "hole.csv", index=False)
    outcome = cli("compare", "a.csv", "hole.csv")  # one seed lacks one user
    assert "they have 400, 399 (399 in common" in outcome.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.csv"], "file: expected a second file to compare it with, got 'a.csv'"),
        (["a.csv", "a.csv"], "each file once"),
        (["a.csv", "no.csv"], "No such file"),
        (["a.csv", "b.csv", "--slices", "land"], "--slices: expected a column of one of the files"),
        (["a.csv", "b.csv", "--margin", "0"], "--margin"),
        (["a.csv", "b.csv", "--metric", "AUC"], "--metric"),
        (["a.csv", "b.csv", "--fail-unless", "good"], "--fail-unless: expected one of non-inf"),
        (["a.csv", "b.csv", "--output", "."], "--output: expected a file, not a folder"),
        (["a.csv", "two.csv"], "'two.csv': expected the seeds 0, 1, 2, or one; it has 0, 1"),
        (["zero.csv", "b.csv"], "its NDCG@10 is 0, and no share of it can be kept"),
        (["l.csv", "b.csv", "--targets", "t.csv"], "longer lists: the longest have 2, all"),
        (["l.csv", "b.csv", "--targets", "t.csv", "--metric", "MRR"], "needs lists of one length"),
        (["a.csv", "b.csv", "--targets", "no.csv"], "--targets: expected a file that can"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(cli: Cli, tmp_path: Path, words: list[str], said: str) -> None:
    ones = np.ones((3, 4))
    for name, ranks in {"a": ones, "b": ones, "two": ones[:2], "zero": ones * np.inf}.items():
        write(tmp_path / f"{name}.csv", ranks)
    (tmp_path / "l.csv").write_text("user,items\n" + "".join(f"{u},x y\n" for u in range(4)))
    (tmp_path / "t.csv").write_text("user,item\n" + "".join(f"{u},x\n" for u in range(4)))
    before = sorted(tmp_path.iterdir())
    outcome = cli("compare", *words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert said in outcome.err
    assert sorted(tmp_path.iterdir()) == before


def test_the_page_is_valid_alone_and_the_same_each_time(
    cli: Cli, arms: dict[str, np.ndarray], tmp_path: Path
) -> None:
    lands = np.tile(["<script>x</script>", "a & b"], 600)
    write(tmp_path / "<b>.csv", arms["same"], land=lands)
    words = ("compare", "a.csv", "<b>.csv", "--slices", "land", "--output")
    outcome = cli(*words, "page.html")
    assert outcome.out.endswith("\npage.html\n")
    page = (tmp_path / "page.html").read_text()
    html5lib.HTMLParser(strict=True).parse(page)
    assert "<script>x" not in page
    assert "<b>.csv" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert cli(*words, "again.html").code == 0
    assert (tmp_path / "again.html").read_text() == page


def test_it_fits_a_terminal_of_80_columns(arms: dict[str, np.ndarray], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "depthprobe", "compare", "a.csv", "worse.csv"]
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    lines = shown.decode().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if re.match(r" (HR|NDCG|MRR)", line)]
    assert len(rows) == 6
    assert all(row.count("[") == row.count("]") == 2 for row in rows)  # none is wrapped


def test_it_needs_no_torch(arms: dict[str, np.ndarray], tmp_path: Path) -> None:
    code = (
        "import sys; from depthprobe.cli import main\n"
        "try: main(['compare', 'a.csv', 'worse.csv', '--output', 'page.html'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "page.html").exists()


def test_the_guide_runs_as_it_is_written(cli: Cli, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    files = re.findall(r"^`(\S+)`:\n\n((?: {4}.*\n)+)", text, flags=re.MULTILINE)
    assert len(files) == 8
    for name, content in files:
        (tmp_path / name).write_text(re.sub("^ {4}", "", content, flags=re.MULTILINE))
    calls = re.findall(r"^ {4}depthprobe (compare \S+\.\S+ .*)", text, flags=re.MULTILINE)
    assert len(calls) == 4
    for call in calls:
        assert cli(*shlex.split(call)).code == 0, call
    keys = set(re.findall(r"`(?:others\[\]\.)?(\w+)`", text.partition("| key |")[2]))
    found = json.loads(cli(*shlex.split(calls[-1])).out)
    assert {*found, *found["others"][0]} - keys <= {"depthprobe", "others"}
