"""`recommend`: any number of users in the order of the file, all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.cli import recommend as command
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.exits import Exit
from depthprobe.models.export import load_recommender, write_exit, write_recommender
from depthprobe.models.recommender import Recommender

ITEMS = 12
IDS = [f"i{number}" for number in range(1, ITEMS + 1)]
TITLES = ["A\ttitle\nof two lines", *(f"Title {number}" for number in range(2, ITEMS)), ""]
HEADER = "user\trank\titem\tscore\ttitle"
Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, llama_config: Callable[..., LlamaConfig]
) -> Path:
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(llama_config(num_hidden_layers=1)).eval()
    model = Recommender(backbone, torch.randn(ITEMS + 1, 4), [1]).eval()
    path = tmp_path_factory.mktemp("exports") / "model"
    write_recommender(
        path, model, backbone, item_ids=IDS, titles=TITLES, max_history=5, filter_seen=True
    )
    return path


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty users, read three at a time."""
    monkeypatch.setattr(command, "USERS", 3)
    path = tmp_path / "users.txt"
    lines = [f"u{n} " + " ".join(IDS[n % 5 : n % 5 + 1 + n % 7]) for n in range(20)]
    path.write_text("\ufeff" + "\r\n\n".join(lines) + "\n", encoding="utf-8")
    return path


def check(text: str, folder: Path, users: Path, top: int) -> None:
    """The rows of each user asked alone; scores differ in rounding with who is asked together."""
    header, *rows = text.splitlines()
    assert header == HEADER
    loaded = load_recommender(folder)
    for line in filter(None, users.read_text(encoding="utf-8-sig").splitlines()):
        user, *items = line.split()
        (answer,) = loaded.recommend([items], top=top)
        for rank, found in enumerate(answer, start=1):
            *cells, score, title = rows.pop(0).split("\t")
            assert cells == [user, str(rank), found.item]
            assert float(score) == pytest.approx(found.score, abs=1e-3)
            assert title == " ".join((found.title or "").split())
    assert rows == []


def test_users_are_answered_in_their_order(cli: Cli, folder: Path, users: Path) -> None:
    outcome = cli("recommend", folder, "--history", users, "--top", "4", "--device", "cpu")
    assert (outcome.code, outcome.err) == (0, "")
    check(outcome.out, folder, users, 4)
    assert outcome.out.count("\n") == 1 + 20 * 4


def test_json_lines_say_the_same(cli: Cli, folder: Path, users: Path, tmp_path: Path) -> None:
    words = ("recommend", folder, "--history", users, "--top", "4", "--device", "cpu")
    _, *rows = cli(*words).out.splitlines()
    outcome = cli(*words, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    answers = [json.loads(line) for line in outcome.out.splitlines()]
    flat = [
        [
            one["user"],
            str(rank),
            found["item"],
            f"{found['score']:.4f}",
            " ".join((found["title"] or "").split()),
        ]
        for one in answers
        for rank, found in enumerate(one["items"], start=1)
    ]
    assert ["\t".join(cells[:3]) for cells in flat] == [row.rsplit("\t", 2)[0] for row in rows]
    for cells, row in zip(flat, rows, strict=True):
        assert cells[3:] == row.split("\t")[3:]
    target = tmp_path / "answers.jsonl"
    assert cli(*words, "--json", "--output", target).out == ""
    assert target.read_text("utf-8") == outcome.out


def test_a_file_is_written_whole(cli: Cli, folder: Path, users: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "answers.tsv"
    outcome = cli("recommend", folder, "--history", users, "--output", target, "--top", "2")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    check(target.read_text(encoding="utf-8"), folder, users, 2)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_a_failure_on_the_way_leaves_no_file(
    cli: Cli,
    folder: Path,
    users: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    target = tmp_path / f"out.{suffix}"
    target.write_text("before\n", encoding="utf-8")

    def recommendations(*_: object, **__: object) -> Iterator[Any]:
        yield [("u0", [("i1", None, 0.5)])]
        raise MemoryError("no room")

    monkeypatch.setattr(command, "recommendations", recommendations)
    outcome = cli("recommend", folder, "--history", users, "--output", target)
    assert outcome.code == 1
    assert "no room" in outcome.err
    assert target.read_text(encoding="utf-8") == "before\n"
    assert not list(tmp_path.glob(".tmp-*"))


def test_an_unknown_item_in_the_last_line_prints_nothing(
    cli: Cli, folder: Path, users: Path, tmp_path: Path
) -> None:
    with users.open("a", encoding="utf-8") as file:
        file.write("late i1 nowhere i2\n")
    number = len(users.read_text(encoding="utf-8").splitlines())
    target = tmp_path / "out.tsv"
    for more in ((), ("--output", target)):
        outcome = cli("recommend", folder, "--history", users, *more)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.count("\n") == 1
        for word in (
            "got 'nowhere'",
            f"{users}, line {number}",
            "12 in the",
            "--skip-unknown",
        ):
            assert word in outcome.err
        assert not target.exists()


def test_unknown_items_are_left_out_and_counted(cli: Cli, folder: Path, tmp_path: Path) -> None:
    history = tmp_path / "users.txt"
    history.write_text("a i1 x i2\nb x y\nc i3\nd z\n", encoding="utf-8")
    outcome = cli("recommend", folder, "--history", history, "--skip-unknown", "--top", "1")
    assert outcome.code == 0
    answers = load_recommender(folder).recommend([["i1", "i2"], ["i3"]], top=1)
    rows = [line.split("\t")[:3] for line in outcome.out.splitlines()[1:]]
    assert rows == [[user, "1", answer[0].item] for user, answer in zip("ac", answers, strict=True)]
    assert outcome.err == "left out: 4 items outside the catalogue, 2 users with no other\n"
    history.write_text("c i3\n", encoding="utf-8")
    assert cli("recommend", folder, "--history", history, "--skip-unknown").err == ""


def test_users_who_have_had_nearly_all_are_told(cli: Cli, folder: Path, tmp_path: Path) -> None:
    history = tmp_path / "users.txt"
    history.write_text(f"all {' '.join(IDS)}\nmost {' '.join(IDS[2:])}\nb i1 i1\n")
    outcome = cli("recommend", folder, "--history", history, "--top", "3")
    assert [line.split("\t")[0] for line in outcome.out.splitlines()[1:]] == ["most"] * 2 + [
        "b"
    ] * 3
    rest = "the rest of the catalogue is in their histories"
    assert outcome.err == f"2 users with fewer than 3 items: {rest}\n"
    outcome = cli("recommend", folder, "--history", history, "--top", "2")
    assert outcome.err == f"1 user with fewer than 2 items: {rest}\n"


def test_nobody_with_a_known_item(cli: Cli, folder: Path, tmp_path: Path) -> None:
    history = tmp_path / "users.txt"
    history.write_text("b x y\n", encoding="utf-8")
    outcome = cli("recommend", folder, "--history", history, "--skip-unknown")
    assert (outcome.code, outcome.out) == (0, HEADER + "\n")
    assert outcome.err == "left out: 2 items outside the catalogue, 1 user with no other\n"


def test_a_pipe_is_read_once(cli: Cli, folder: Path, users: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = users.read_bytes()
    writer = threading.Thread(target=lambda: pipe.write_bytes(content))
    writer.start()
    outcome = cli("recommend", folder, "--history", pipe, "--top", "2")
    writer.join()
    check(outcome.out, folder, users, 2)


def test_only_some_users_are_in_memory(
    cli: Cli, folder: Path, users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import depthprobe.models.export as exported

    sizes = []
    answer = exported.ExportedRecommender.recommend

    def watch(self: Any, histories: list[list[str]], **more: Any) -> Any:
        sizes.append(len(histories))
        return answer(self, histories, **more)

    monkeypatch.setattr(exported.ExportedRecommender, "recommend", watch)
    cli("recommend", folder, "--history", users)
    assert sizes == [3] * 6 + [2]


@pytest.mark.parametrize("top", ["0", "13"])
def test_a_number_that_the_catalogue_does_not_have(
    cli: Cli, folder: Path, users: Path, top: str
) -> None:
    outcome = cli("recommend", folder, "--history", users, "--top", top)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"from 1 to the 12 items of the catalogue, got {top}" in outcome.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n", ["at least one line"]),
        (b"u1 i1\nu2\n", ["line 2", "at least one item"]),
        (b"u1 i1\nu2 caf\xe9\n", ["line 2", "UTF-8"]),
        (None, ["No such file"]),
    ],
)
def test_a_file_that_is_no_history(
    cli: Cli, folder: Path, tmp_path: Path, content: bytes | None, words: list[str]
) -> None:
    history = tmp_path / "history.txt"
    if content is not None:
        history.write_bytes(content)
    outcome = cli("recommend", folder, "--history", history)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert all(word in outcome.err for word in ["history: ", str(history), *words])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_every_format_says_the_same(
    cli: Cli, folder: Path, users: Path, tmp_path: Path, suffix: str
) -> None:
    words = ("recommend", folder, "--history", users, "--top", "4", "--output")
    target = tmp_path / f"answers.{suffix.upper()}"
    assert cli(*words, target).code == cli(*words, tmp_path / "a.tsv").code == 0
    expected = pd.read_csv(tmp_path / "a.tsv", sep="\t", keep_default_na=False)
    if suffix == "jsonl":
        answers = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
        rows = [
            (one["user"], rank, *item.values())
            for one in answers
            for rank, item in enumerate(one["items"], start=1)
        ]
        found = pd.DataFrame(rows, columns=["user", "rank", "item", "title", "score"])
    else:
        found = (pd.read_csv if suffix == "csv" else pd.read_parquet)(target)
    assert found["title"].isna().any()  # one item has none
    assert found["title"].dropna().str.contains("\n").any()  # as it is, but for tab-separated text
    found["title"] = found["title"].fillna("").str.split().str.join(" ")
    pd.testing.assert_frame_equal(
        found[expected.columns], expected, check_dtype=False, atol=1e-4, rtol=0
    )


def test_nobody_gets_a_table_of_no_rows(cli: Cli, folder: Path, tmp_path: Path) -> None:
    history, target = tmp_path / "users.txt", tmp_path / "answers.parquet"
    history.write_text("b x y\n", encoding="utf-8")
    words = ("--history", history, "--skip-unknown", "--output", target)
    assert cli("recommend", folder, *words).code == 0
    assert pd.read_parquet(target).columns.tolist() == HEADER.split("\t")


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("answers.xlsx", (), [".tsv, .csv, .jsonl, .parquet", "answers.xlsx"]),
        ("answers", (), [".tsv, .csv, .jsonl, .parquet"]),
        ("answers.csv", ("--json",), ["ending in .jsonl (beside --json)", "answers.csv"]),
    ],
)
def test_a_name_that_tells_no_format(
    cli: Cli, folder: Path, users: Path, tmp_path: Path, name: str, more: Any, words: list[str]
) -> None:
    target = tmp_path / "out" / name
    outcome = cli("recommend", folder, "--history", users, "--output", target, *more)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert all(word in outcome.err for word in ["--output: expected a file", *words])
    assert not target.parent.exists()


def test_a_device_gets_text(cli: Cli, folder: Path, users: Path) -> None:
    assert cli("recommend", folder, "--history", users, "--output", "/dev/null").code == 0


def test_users_leave_early(
    cli: Cli, tmp_path: Path, users: Path, llama_config: Callable[..., LlamaConfig]
) -> None:
    """Where everybody leaves at the second block, the third one changes nothing."""
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(llama_config(num_hidden_layers=3)).eval()
    with torch.no_grad():
        for weight in backbone.model.layers.parameters():
            weight.mul_(6)
    model = Recommender(backbone, torch.randn(ITEMS + 1, 4), [1]).eval()
    for depth in (3, 2):
        keep_blocks(backbone, range(depth))
        path = tmp_path / f"of-{depth}"
        write_recommender(
            path, model, backbone, item_ids=IDS, titles=None, max_history=5, filter_seen=False
        )
    rule = Exit(same=0, metric="HR@10", margin=0.1, level=0.9, users=9, depth=2.0, kept=1.0)
    words = ("--history", users, "--top", "3", "--device", "cpu", "--json")
    target = tmp_path / "answers.jsonl"
    refused = cli("recommend", tmp_path / "of-3", *words, "--exit", "--output", target)
    assert (refused.code, refused.err.count("\n"), target.exists()) == (2, 1, False)
    assert refused.err.startswith("error: --exit: expected a rule in the export")
    write_exit(tmp_path / "of-3", rule)
    whole, early, cut = (
        cli("recommend", tmp_path / name, *words, *more)
        for name, more in (("of-3", ()), ("of-3", ("--exit",)), ("of-2", ()))
    )
    assert early.err == "early exit: after 2.0 blocks on average\n"
    assert (whole.err, cut.err) == ("", "")
    assert chosen(early.out) == chosen(cut.out) != chosen(whole.out)


def chosen(text: str) -> list[list[str]]:
    return [[item["item"] for item in json.loads(line)["items"]] for line in text.splitlines()]


def test_an_id_can_not_end_its_column() -> None:
    line = command._row(("u", 1, "an\tid\n", -0.25, None)).removesuffix("\n")
    assert line.split("\t") == ["u", "1", "an id ", "-0.2500", ""]


@pytest.fixture(scope="module")
def with_blanks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose items are called otherwise: two words of one id are ids themselves."""
    path = tmp_path_factory.mktemp("blanks") / "model"
    shutil.copytree(folder, path)
    card = json.loads((path / "recommender.json").read_text())
    card["item_ids"][:3] = ["The Wire", "The", "Wire"]
    (path / "recommender.json").write_text(json.dumps(card))
    return path


def test_ids_with_blanks_are_split_at_tabs(cli: Cli, with_blanks: Path, tmp_path: Path) -> None:
    history = tmp_path / "users.txt"
    history.write_text("ann lee\tThe Wire\ti5\n\nbob\t The Wire\r\n", encoding="utf-8")
    outcome = cli("recommend", with_blanks, "--history", history, "--top", str(ITEMS))
    assert outcome.code == 0
    rows = [line.split("\t") for line in outcome.out.splitlines()[1:]]
    assert {row[0] for row in rows} == {"ann lee", "bob"}
    items = [row[2] for row in rows if row[0] == "ann lee"]
    assert sorted(items) == sorted(set(["The", "Wire", *IDS[3:]]) - {"i5"})


@pytest.mark.parametrize("line", ["bob The Wire", "bob", "bob\tThe Wire\t\ti5"])
def test_a_line_without_tabs_is_refused_where_ids_hold_blanks(
    cli: Cli, with_blanks: Path, tmp_path: Path, line: str
) -> None:
    history = tmp_path / "users.txt"
    history.write_text(f"ann\tThe Wire\n{line}\n", encoding="utf-8")
    outcome = cli("recommend", with_blanks, "--history", history)
    assert (outcome.code, outcome.out) == (2, "")
    for word in ("line 2", "with one tab between", "as 'The Wire' does"):
        assert word in outcome.err


@pytest.mark.parametrize("line", ["ann i1 i2", "ann\ti1\ti2", "ann \t i1  i2 ", "ann\ti1 i2"])
def test_other_ids_are_split_at_any_blanks(
    cli: Cli, folder: Path, tmp_path: Path, line: str
) -> None:
    history = tmp_path / "users.txt"
    history.write_text(f"{line}\n", encoding="utf-8")
    outcome = cli("recommend", folder, "--history", history, "--top", "1")
    (answer,) = load_recommender(folder).recommend([["i1", "i2"]], top=1)
    assert outcome.out.splitlines()[1].split("\t")[:3] == ["ann", "1", answer[0].item]


DAY = 1_700_000_000  # seconds since 1970
LOG = [
    ("i5", "ann lee", DAY + 3),
    ("The Wire", "ann lee", DAY + 1),
    ("Wire", "bob", DAY + 2),
    ("i6", "bob", DAY + 1),
]


def write_log(
    path: Path, *, columns: tuple[str, ...] = ("item_id", "user_id", "timestamp")
) -> None:
    table = pd.DataFrame(LOG, columns=list(columns))
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "jsonl"])
def test_a_table_that_names_its_columns_is_read_as_a_log(
    cli: Cli, with_blanks: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, lines, other = (tmp_path / name for name in (f"log.{suffix}", "users.txt", "other.csv"))
    write_log(log)
    lines.write_text("ann lee\tThe Wire\ti5\nbob\ti6\tWire\n")
    reads: list[object] = []
    read = command.read_users
    monkeypatch.setattr(command, "read_users", lambda data: reads.append(data) or read(data))
    answers = [cli("recommend", with_blanks, "--history", file) for file in (log, lines)]
    assert [(one.code, one.err) for one in answers] == [(0, "")] * 2
    assert answers[0].out == answers[1].out
    assert len(reads) == 1  # once, although its users are gone through twice
    write_log(other, columns=("product", "shopper", "day"))
    named = ("--user-column", "shopper", "--item-column", "product", "--time-column", "day")
    assert cli("recommend", with_blanks, "--history", other, *named).out == answers[1].out
    text = other.read_text("utf-8").replace("i6", "The Sopranos")
    other.write_text(text, encoding="utf-8")
    outcome = cli("recommend", with_blanks, "--history", other, *named)
    assert (outcome.code, outcome.out) == (2, "")
    assert "user 'bob'" in outcome.err
    assert "'The Sopranos'" in outcome.err


def test_a_log_of_one_user_from_a_pipe(cli: Cli, folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = "user_id,item_id,seen\nu,i2,2024-05-02\nu,i1,2024-05-01\n"
    writer = threading.Thread(target=lambda: pipe.write_text(content))
    writer.start()
    outcome = cli("recommend", folder, "--history", pipe, "--top", "1")
    writer.join()
    (answer,) = load_recommender(folder).recommend([["i2", "i1"]], top=1)
    assert outcome.out.splitlines()[1].split("\t")[:3] == ["u", "1", answer[0].item]
    note = "the column seen looks like dates and is not read: --time-column seen"
    assert outcome.err.count(note) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("h.csv", "shopper,product\nu,i1\n", ["shopper, product", "--user-column"]),
        ("h.jsonl", '{"user": "u"}\n', ["none is known as the item's"]),
        ("h.txt", "user_id\titem_id\nu\t\n", ["item"]),
        ("h.parquet", "no table", ["format", "parquet"]),
        ("h.txt", "u1 i1\nu2 i1\nu1 i2\n", ["each user once", "line 3", "'u1'"]),
    ],
)
def test_a_history_that_can_not_be_read(
    cli: Cli, folder: Path, tmp_path: Path, name: str, content: str, words: list[str]
) -> None:
    history, target = tmp_path / name, tmp_path / "answers.csv"
    history.write_text(content)
    outcome = cli("recommend", folder, "--history", history, "--output", target)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert all(word in outcome.err for word in ["--history", *words]), outcome.err
    assert not target.exists()
