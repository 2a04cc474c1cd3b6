"""Progress: plain lines in a file, a bar on a terminal, nothing read as markup or obeyed."""

from __future__ import annotations

import ast
import io
import logging
import re
import time
from pathlib import Path

import pytest

from depthprobe import cli
from depthprobe.cli import terminal
from depthprobe.cli.terminal import (
    SHOWN,
    VisibleLines,
    echo,
    say,
    show_facts,
    show_progress,
    show_table,
)
from depthprobe.runs import store
from depthprobe.runs.processes import Progress
from depthprobe.runs.store import Working

HOSTILE = "\x1b[2Ja\x07b\x9bc\u202ed\x7f"
HARMLESS = r"\x1b[2Ja\x07b\x9bc\u202ed\x7f"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def play(progress: Progress) -> None:
    progress.message("training [bold]full[/bold]")
    progress.plan(["full-s0", "skip-5-s0"])
    progress.done("full-s0", "done", 12.34, "NDCG@10 0.31")
    progress.done("skip-5-s0", "failed", 0.0, "ValueError: [/red]\nsecond line")


def test_plain_lines_are_stamped_and_counted() -> None:
    stream = io.StringIO()
    with show_progress(stream) as progress:
        assert progress.bar is None
        play(progress)
        logging.getLogger(SHOWN).info("timing depth %d", 3)
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == [
        "training [bold]full[/bold]",
        "2 trials to run",
        "[1/2] full-s0  done  12.3 s  NDCG@10 0.31",
        "[2/2] skip-5-s0  failed  0.0 s  ValueError: [/red] second line",
        "timing depth 3",
    ]


@pytest.mark.parametrize("continued", [False, True])
def test_a_pipe_is_told_what_goes_on(
    continued: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(terminal, "SILENCE", 0.01)
    at_work = [Working("full-s0", "step 3/9  loss\x1b[2J", 1.0)]
    monkeypatch.setattr(store, "working", lambda folder: at_work if folder == tmp_path else [])
    stream = io.StringIO()

    def wait_for(line: str) -> None:
        until = time.monotonic() + 60  # else it never comes
        while line not in stream.getvalue():
            assert time.monotonic() < until, line
            time.sleep(0.001)

    with show_progress(stream, tmp_path) as progress:
        if not continued:  # else the depths are timed already
            progress.message("timing every depth")
            wait_for(" at work: timing every depth\n")
        progress.plan(["full-s0"])
        wait_for(r" at work: full-s0 step 3/9 loss\x1b[2J" + "\n")
        at_work[:] = [Working("full-s0", "", 0.0), Working("heal-s0", "", 0.0)]
        wait_for(" at work: full-s0; heal-s0\n")
        at_work.clear()
        wait_for(" at work: waiting for another sweep of this run\n")
        progress.message("writing the report")
        wait_for(" at work: writing the report\n")
    before = stream.getvalue()
    monkeypatch.setattr(terminal, "SILENCE", 1000.0)
    with show_progress(stream, tmp_path) as progress:
        progress.break_silence(tmp_path)
    assert stream.getvalue() == before


def test_a_terminal_gets_a_bar_and_a_line_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with show_progress(stream) as progress:
        play(progress)
        assert progress.bar is not None
        assert progress.bar.tasks[0].completed == progress.bar.tasks[0].total == 2
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "training [bold]full[/bold]" in text
    assert "full-s0  done  12.3 s  NDCG@10 0.31" in text
    assert "skip-5-s0  failed  0.0 s  ValueError: [/red] second line" in text


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with show_progress(Terminal()) as progress:
        assert progress.bar is None


def test_the_bar_is_taken_down_when_the_sweep_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), show_progress(stream):
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_silent_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    play(Progress())
    assert capfd.readouterr() == ("", "")


def test_words_stand_left_and_numbers_right(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(["method", "trials"], [["full", 1], ["popularity", 1200]], words=["method"])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert second.index("popularity") == first.index("full")
    assert second.index("1,200") + 4 == first.index("1")


def test_a_narrow_terminal_cuts_no_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header = ["method", "train_step_ms", "NDCG@10", "parameters", "note"]
    rows = [["early-exit", 2272.1, 0.19301, 64704, "the teacher read out after each block"]]
    monkeypatch.setattr("depthprobe.cli.terminal.PIPE_WIDTH", 60)
    show_table(header, rows, words=["method", "note"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    words = {"early-exit", "2,272", "0.193", "64,704", "NDCG@10", "parameters", "step", "block"}
    assert words <= set(text.split())


def test_what_others_wrote_is_shown_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    echo(HOSTILE)
    say(HOSTILE)
    show_facts({"name": HOSTILE})
    show_table([HARMLESS, ""], [[HOSTILE, 1], [f"{HOSTILE}\nfailed: all", 2]], title=HOSTILE)
    record = logging.LogRecord("depthprobe", logging.INFO, "", 0, HOSTILE, (), None)
    echo(VisibleLines("%(message)s").format(record))
    text = capsys.readouterr().out
    assert text.count(HARMLESS) == 8
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e", "\x7f"}
    assert "\nfailed" not in text


def test_a_sweep_shows_what_others_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for stream in (io.StringIO(), Terminal()):
        with show_progress(stream) as progress:
            progress.message(HOSTILE)
            progress.done(f"full-{HOSTILE}", "failed", 1.0, f"{HOSTILE}\n{HOSTILE}" + "x" * 5000)
            logging.getLogger(SHOWN).info(HOSTILE)
        text = stream.getvalue()
        assert text.count(HARMLESS) >= 4
        assert not set(text) & {"\x07", "\x9b", "\u202e", "\x7f"}
        assert "\x1b[2Ja" not in text
        assert len(text) < 5000


def test_a_sweep_goes_on_when_nobody_reads_of_it() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with show_progress(Gone()) as progress:
        play(progress)
    assert progress.ended == 2


def test_commands_print_through_one_module() -> None:
    for file in Path(str(cli.__file__)).parent.glob("*.py"):
        calls = [
            node.func.id
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert file.name == "terminal.py" or "print" not in calls, file
