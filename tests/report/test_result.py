"""result.json: of the schema in the docs, sealed, and the numbers of page, answer and tables."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from depthprobe.errors import BadInput
from depthprobe.evaluation.statistics import Interval
from depthprobe.report.answer import build_answer
from depthprobe.report.numbers import summarise
from depthprobe.report.page import tables_of
from depthprobe.report.result import (
    Estimate,
    Result,
    make_result,
    read_result,
    schema,
    write_result,
)
from depthprobe.report.tables import make_table

Make = Callable[..., Any]
SCHEMA = Path(__file__).parents[2] / "docs/result.schema.json"


def result_of(run: Any) -> Result:
    summary = summarise(run)
    return make_result(summary, build_answer(summary), tables_of(summary))


def written(run: Any, folder: Path) -> Any:
    return json.loads(write_result(result_of(run), folder).read_bytes())


@pytest.fixture(scope="module")
def valid() -> Draft202012Validator:
    content = json.loads(SCHEMA.read_text("utf-8"))
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)


def test_every_kind_of_answer_is_of_the_schema(
    make: Make, run: Any, tmp_path: Path, valid: Draft202012Validator
) -> None:
    gains = {("distill", 4): 0.4, ("sasrec", 0): -0.3}
    runs = {
        "shown": make(tmp_path, users=200, seeds=3, gain=lambda *key: gains.get(key, 0.0)),
        "SASRec is better": make(tmp_path, users=200, seeds=3, gain=lambda m, _: m == "sasrec"),
        "not shown": make(tmp_path, users=100, seeds=1, sampled=False, timing=False),
        "no teacher": make(tmp_path, users=50, methods={"popularity", "sasrec"}),
        "nothing finished": make(tmp_path, methods=set()),
    }
    for verdict, each in runs.items():
        content = written(each, tmp_path)
        valid.validate(content)
        assert content["verdict"] == verdict
        assert read_result(tmp_path) == msgspec.convert(content, Result)
        recommended = content["recommendation"]
        assert (recommended is not None) == (verdict in {"shown", "SASRec is better"})
    content = written(run, tmp_path)  # with all sections
    valid.validate(content)
    assert content["failed"] == ["random-init-1-1-11-1"]
    assert {"methods", "trials", "slices", "reliance"} <= content["tables"].keys()


def test_the_schema_refuses_what_is_not_a_result(
    make: Make, tmp_path: Path, valid: Draft202012Validator
) -> None:
    content = written(make(tmp_path, users=100, seeds=2), tmp_path)
    for path, value in {
        ("schema",): 2,
        ("verdict",): None,
        ("question", "margin"): "1 %",
        ("sufficiency", "candidates", 0, "retained"): 0.99,
        ("tables", "methods", "values", 0, "depth"): [1],
        ("other",): 1,
    }.items():
        changed = copy.deepcopy(content)
        *places, last = path
        inner: Any = changed
        for place in places:
            inner = inner[place]
        inner[last] = value
        assert not valid.is_valid(changed), path
    del content["tables"]
    assert not valid.is_valid(content)
    assert schema() == json.loads(SCHEMA.read_text("utf-8"))


def test_its_numbers_are_those_of_answer_and_tables(make: Make, tmp_path: Path) -> None:
    def gain(method: str, depth: int) -> float:
        return {("distill", 4): 0.4, ("sasrec", 0): -0.3}.get((method, depth), 0.0)

    made = make(tmp_path, users=200, seeds=3, gain=gain)
    made.study = replace(made.study, protocol=replace(made.study.protocol, margin=0.02, level=0.9))
    summary, result = summarise(made), result_of(made)
    answer, tables = build_answer(summary), tables_of(summary)
    assert (result.question.margin, result.question.level) == (0.02, 0.9)
    assert result.recommendation is not None
    chosen = result.recommendation
    assert (chosen.trial, chosen.method, chosen.depth) == (answer.trial, "distill", 4)
    assert chosen.trial.endswith(f"-{chosen.seed}")
    assert chosen.command == answer.command
    assert result.candidate is not None
    assert answer.kept is not None
    kept = answer.kept
    assert result.candidate.retained == Estimate(kept.value, kept.low, kept.high)
    assert result.answer == [line for line in answer.lines if line]
    assert summary.sufficiency is not None
    assert result.sufficiency is not None
    for row, own in zip(summary.sufficiency.rows, result.sufficiency.candidates, strict=True):
        assert (own.method, own.depth, own.p_value) == (row.method, row.depth, row.p_value)
        assert (own.lower, own.shown, own.retained.value) == (row.lower, row.shown, row.kept.value)
    assert result.tables.keys() == tables.keys()
    for name, table in tables.items():
        cells = result.tables[name]
        assert cells.rows == [list(row) for row in table.rows]  # as the page shows them
        assert len(cells.values) == len(table.frame)
        for values, whole in zip(cells.values, table.frame.to_dict("records"), strict=True):
            flat: dict[str, Any] = {}
            for key, value in values.items():
                if isinstance(value, Estimate):
                    ends = {f"{key} low": value.low, f"{key} high": value.high}
                    flat |= {key: value.value} | ends
                else:
                    flat[key] = value
            assert flat.keys() == whole.keys()
            for key, value in whole.items():
                known = not isinstance(value, float) or math.isfinite(value)
                assert flat[key] == (value if known else None), (name, key)


def test_cells_of_all_kinds(run: Any, tmp_path: Path) -> None:
    open_ended = Interval(0.5, -math.inf, math.inf)
    rows = [{"a": open_ended, "low": 1.0, "x low": 2, "when": tmp_path}, {"a": None, "b": True}]
    table = make_table("odd", rows, [("a", "a", str)])
    assert table is not None
    summary = summarise(run)
    result = make_result(summary, build_answer(summary), {"odd": table})
    first, second = result.tables["odd"].values
    assert first["a"] == Estimate(0.5, None, None)
    assert (first["low"], first["x low"], first["when"]) == (1.0, 2.0, str(tmp_path))
    assert (second["a"], second["b"]) == (Estimate(None, None, None), True)
    json.dumps(msgspec.to_builtins(result), allow_nan=False)


def test_a_result_that_was_changed_is_refused(make: Make, tmp_path: Path) -> None:
    write_result(result_of(make(tmp_path, users=50, methods={"full", "finetune"})), tmp_path)
    file = tmp_path / "result.json"
    assert read_result(file) == read_result(tmp_path)
    text = file.read_text("utf-8")
    file.write_text(re.sub('"verdict": "[^"]*"', '"verdict": "shown"', text), "utf-8")
    with pytest.raises(BadInput, match="it was changed"):
        read_result(file)
    file.write_text(text.replace('"schema": 1', '"schema": 2', 1), "utf-8")
    with pytest.raises(BadInput, match="format 2"):
        read_result(file)
