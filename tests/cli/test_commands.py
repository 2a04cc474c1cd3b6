"""What the commands hand on and print, with the rooms they call replaced; exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from depthprobe.cli.sweep import results
from depthprobe.errors import BadInput
from depthprobe.study import Study, demo_study

Stub = Callable[..., None]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """``stub("depthprobe.runs.sweep", run_sweep=f)`` replaces a module of a room."""

    def replace_module(name: str, **members: object) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return replace_module


def finished(path: Path, failed: list[tuple[str, str]] | None = None) -> SimpleNamespace:
    rows = [
        ("sasrec-s0", "sasrec", 0, "done"),
        ("full-s0", "full", 12, "done"),
        ("full-s1", "full", 12, "done"),
        ("finetune-1-s0", "finetune", 1, "failed"),
        ("popularity", "popularity", 0, "done"),
        ("early-exit-2-s0", "early-exit", 2, "done"),
        ("early-exit-1-s0", "early-exit", 1, "done"),
        ("skip-5-s0", "skip", 11, "done"),  # of different blocks: no row
        ("skip-6-s0", "skip", 11, "done"),
    ]
    trials = pd.DataFrame(rows, columns=["trial", "method", "depth", "status"])
    costs = {"parameters_total": 1000, "train_step_ms": 2.0, "encode_ms": None, "score_ms": 1.0}
    values = {"full-s0": 0.2, "full-s1": 0.4}
    metrics = [
        (trial, split, protocol, "all", metric, values.get(trial, 0.1))
        for trial, *_ in rows
        for split in ("validation", "test")
        for protocol in ("full", "sampled-999")
        for metric in ("NDCG@10", "HR@10", "MRR")
    ]
    columns = ["trial", "split", "protocol", "slice", "metric", "value"]
    tidy = pd.DataFrame(metrics, columns=columns)
    # what must not be averaged in
    tidy.loc[(tidy["split"] == "validation") | (tidy["protocol"] != "full"), "value"] = 9.0
    return SimpleNamespace(
        path=path, trials=trials.assign(**costs), metrics=tidy, failed=failed or []
    )


def test_results_average_the_test_users_over_seeds(tmp_path: Path) -> None:
    frame = results(finished(tmp_path))  # type: ignore[arg-type]
    assert list(zip(frame["method"], frame["depth"], frame["trials"], strict=True)) == [
        ("popularity", 0, 1),
        ("sasrec", 0, 1),
        ("full", 12, 2),
        ("early-exit", 1, 1),
        ("early-exit", 2, 1),
    ]
    assert frame["NDCG@10"].tolist() == pytest.approx([0.1, 0.1, 0.3, 0.1, 0.1])
    assert frame["encode_ms"].isna().all()


@pytest.mark.parametrize(("failed", "code"), [([], 0), ([("finetune-1-s0", "Oops:\nbad")], 1)])
def test_sweep_prints_results_then_the_report(
    cli: Callable[..., Any], stub: Stub, failed: list[tuple[str, str]], code: int
) -> None:
    seen: dict[str, Any] = {}

    def run_sweep(study: object, output: Path, **rest: Any) -> SimpleNamespace:
        seen.update(study=study, output=output, **rest)
        rest["progress"].plan(["full-s0"])
        rest["progress"].done("full-s0", "done", 1.0, "")
        return finished(output, failed)

    stub("depthprobe.runs.sweep", run_sweep=run_sweep)
    stub("depthprobe.report.page", report_words=lambda run: f"Ship it.\n{run.path}/report.html")
    outcome = cli("sweep", "--jobs", "2")
    assert outcome.code == code
    assert (seen["study"], seen["output"], seen["jobs"]) == (demo_study(), Path("runs/demo"), 2)
    assert seen["command"] == "depthprobe sweep --jobs 2"
    *table, advice, last = outcome.out.splitlines()
    assert (advice, last) == ("Ship it.", str(Path("runs/demo/report.html")))
    assert any("early-exit" in line and "1,000" in line for line in table)
    assert "[1/1] full-s0  done" in outcome.err
    assert "--epochs" not in outcome.err
    assert "does not apply to SASRec: it keeps 14 " in cli("sweep", "--epochs", 3).err
    failures = [line for line in outcome.err.splitlines() if line.startswith("failed: ")]
    assert failures == (["failed: finetune-1-s0: Oops: bad"] if failed else [])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            BadInput("layers", "13", "depths from 1 to 12"),
            2,
            "error: layers: expected depths from 1 to 12, got '13'",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (RuntimeError("two\nlines"), 1, "error: internal: RuntimeError: two lines (run again with"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_an_error_inside_a_sweep_is_one_line(
    cli: Callable[..., Any], stub: Stub, error: BaseException, code: int, line: str
) -> None:
    def run_sweep(*_: object, **__: object) -> None:
        raise error

    stub("depthprobe.runs.sweep", run_sweep=run_sweep)
    stub("depthprobe.report.page", report_words=None)
    outcome = cli("sweep")
    assert outcome.code == code
    assert "Traceback" not in outcome.err
    if line:
        assert outcome.err.splitlines()[-1].startswith(line)


def opened(path: Path) -> SimpleNamespace:
    return SimpleNamespace(path=path, study=demo_study())


def test_report_is_written_where_asked(cli: Callable[..., Any], stub: Stub, tmp_path: Path) -> None:
    stub("depthprobe.runs.store", open_run=opened)
    stub(
        "depthprobe.report.page",
        report_words=lambda run, output: output or run.path / "report.html",
    )
    assert cli("report", "run").out == "run/report.html\n"
    assert cli("report", "run", "--output", "page.html").out == "page.html\n"
    outcome = cli("report", "run", "--output", tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)


def test_a_report_asks_a_run_something_else(cli: Callable[..., Any], stub: Stub) -> None:
    stub("depthprobe.runs.store", open_run=opened)

    def report_words(run: SimpleNamespace, output: None) -> tuple[float, float, str]:
        protocol = run.study.protocol
        return protocol.margin, protocol.level, protocol.metric

    stub("depthprobe.report.page", report_words=report_words)
    assert cli("report", "run").out == "(0.01, 0.95, 'NDCG@10')\n"
    asked = cli("report", "run", "--margin", "2%", "--level", "0.9", "--metric", "HR@20")
    assert asked.out == "(0.02, 0.9, 'HR@20')\n"


def test_report_prints_its_result(cli: Callable[..., Any], stub: Stub, tmp_path: Path) -> None:
    def build_report(run: SimpleNamespace, output: Path | None) -> None:
        folder = run.path if output is None else output.with_suffix("")
        folder.mkdir(exist_ok=True)
        (folder / "result.json").write_text(json.dumps({"margin": run.study.protocol.margin}))

    def folder_of(page: Path) -> Path | None:
        return None if page == Path("/dev/null") else page.with_suffix("")

    stub("depthprobe.runs.store", open_run=opened)
    stub("depthprobe.report.page", build_report=build_report, folder_of=folder_of)
    assert cli("report", "run", "--json").out == '{"margin": 0.01}\n'
    asked = cli("report", "run", "--json", "--margin", "2%", "--output", "page.html")
    assert asked.out == '{"margin": 0.02}\n'
    assert (tmp_path / "page" / "result.json").is_file()
    for words in (("a", "b"), ("run", "--output", "/dev/null")):
        outcome = cli("report", "--json", *words)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--json: expected one run" in cli("report", "a", "b", "--json").err


def test_several_runs_are_set_side_by_side(cli: Callable[..., Any], stub: Stub) -> None:
    stub("depthprobe.runs.store", open_run=opened)
    stub(
        "depthprobe.report.comparison",
        build_comparison=lambda runs, output: output or runs[0].path.parent / "comparison.html",
    )
    assert cli("report", "runs/books", "runs/games").out == "runs/comparison.html\n"
    assert cli("report", "a", "b", "--output", "page.html").out == "page.html\n"


@pytest.fixture
def exported(stub: Stub, tmp_path: Path) -> list[str]:
    """The trials that were exported, each to a folder of two items; a run has two."""
    trials: list[str] = []

    def export_trial(run: Path, trial: str, folder: Path, *, onnx: bool, **_: object) -> Path:
        trials.append(f"{trial} in ONNX" if onnx else trial)
        folder.mkdir()
        content = {"item_ids": ["The X", "i2", "i3"] if trial == "sasrec-s0" else ["i1", "i2"]}
        (folder / "recommender.json").write_text(json.dumps(content))
        (folder / "README.md").write_text("a" * 2345)
        pair = {"users": 64, "rounds": 5, "torch": 0.02, "onnxruntime": 0.01, "times_faster": 2}
        machine = {"device_name": "a processor", "threads": 2}
        facts = {"test_users": 60, "test_users_in_another_order": 3, "latencies": [pair]}
        (folder / "onnx.json").write_text(json.dumps(facts | {"machine": machine}))
        return folder

    class Url(str):
        repo_id = "me/small"

    def push_to_hub(folder: Path, name: str) -> Url:
        trials.append(f"pushed to {name}")
        return Url("https://hub/me/small")

    for trial in ("full-d12-s0", "distill-d04-s1", "sasrec-s0"):
        (tmp_path / "run" / "trials" / trial).mkdir(parents=True)
    stub(
        "depthprobe.runs.export",
        export_trial=export_trial,
        check_hub=lambda name: trials.append(f"checked {name}"),
        push_to_hub=push_to_hub,
    )
    return trials


def test_export_says_what_it_wrote_and_what_comes_next(
    cli: Callable[..., Any], exported: list[str]
) -> None:
    outcome = cli("export", "run", "full-d12-s0", "out")
    assert (outcome.code, exported) == (0, ["full-d12-s0"])
    first, *files, last = (" ".join(line.split()) for line in outcome.out.splitlines() if line)
    assert first == "out: full-d12-s0"
    assert files == [
        "README.md 2.35 kB the model card",
        "onnx.json 207 B how it compares with ours",
        "recommender.json 26 B items, titles, and how histories are read",
    ]
    assert last == "next: echo 'you i1 i2' | depthprobe recommend out --history /dev/stdin"
    # ids with blanks lie between tabs
    outcome = cli("export", "run", "sasrec-s0", "out 2")
    line = r"echo $'you\x09The X\x09i2' | depthprobe recommend 'out 2' --history /dev/stdin"
    assert outcome.out.splitlines()[-1] == f"next: {line}"


def test_export_in_onnx_and_to_the_hub(cli: Callable[..., Any], exported: list[str]) -> None:
    outcome = cli("export", "run", "full-d12-s0", "out", "--onnx", "--push-to-hub", "small")
    assert (outcome.code, outcome.err) == (0, "")
    assert exported == ["checked small", "full-d12-s0 in ONNX", "pushed to small"]
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    same = "ONNX: the same ten best items as ours for all 60 test users; 3 in another order, of"
    assert f"{same} scores equal up to rounding" in lines
    assert "64 20 ms 10 ms 2.00x" in lines
    assert "medians of 5 rounds in turn; a processor, threads: 2" in lines
    assert "https://hub/me/small: a new repository is private" in lines
    assert "elsewhere: hf download me/small --local-dir out" in lines
    assert lines[-1] == "next: echo 'you i1 i2' | depthprobe recommend out --history /dev/stdin"


def test_export_of_the_best_is_what_the_answer_ships(
    cli: Callable[..., Any], stub: Stub, exported: list[str]
) -> None:
    answer = SimpleNamespace(trial="distill-d04-s1", lines=("Ship it.",), method="distill", depth=4)
    margins: list[float] = []

    def build_answer(run: Any) -> Any:
        margins.append(run.study.protocol.margin)
        return answer

    stub("depthprobe.report.answer", build_answer=build_answer)
    stub("depthprobe.runs.store", open_run=lambda run: SimpleNamespace(study=Study()))
    assert cli("export", "run", "best", "out").code == 0
    assert cli("export", "run", "best", "wide", "--margin", "5%").code == 0
    assert (exported, margins) == (["distill-d04-s1"] * 2, [0.01, 0.05])
    exported.pop()
    answer.trial = ""
    answer.lines = ("Not decided: one seed never shows a depth.",)
    outcome = cli("export", "run", "best", "other")
    assert (outcome.code, exported, Path("other").exists()) == (2, ["distill-d04-s1"], False)
    assert outcome.err == (
        "error: TRIAL: 'best': the report recommends none (Not decided: one seed never shows a "
        "depth); name one of RUN/trials, such as distill-d04-s1\n"
    )
    answer.method, answer.depth = None, None
    assert cli("export", "run", "best", "other").err.endswith("; name one of RUN/trials\n")
    outcome = cli("export", "run", "distill-d04-s1", "other", "--margin", "5%")
    assert outcome.err.startswith("error: --margin: expected best as the trial")
    stub("depthprobe.report.answer")
    assert "TRIAL: expected best, or one of this run's 3, such as distill-d04-s1" in (
        cli("export", "run", "distill-d04-s0", "other").err
    )
