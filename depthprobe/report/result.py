"""RUN/result.json: the answer of a run and every number of its tables, for programs.

The page is made of the same answer and tables. The structures below define the format, and
docs/result.schema.json follows from them. A value that was not measured, or an infinite bound, is
null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

import depthprobe
from depthprobe.evaluation.statistics import Interval
from depthprobe.report.answer import Answer
from depthprobe.report.numbers import Summary
from depthprobe.report.tables import Table
from depthprobe.runs.records import read_sealed, typed, write_sealed
from depthprobe.study import study_to_dict

RESULT, SCHEMA = "result.json", 1
AGAIN = "depthprobe report RUN writes it anew"


class Estimate(msgspec.Struct):
    """A value with its bounds, at the level of the question."""

    value: float | None
    low: float | None
    high: float | None


Cell = float | int | bool | str | None | Estimate


class Question(msgspec.Struct):
    """The question of the verdict: the metric, the acceptable loss, the confidence."""

    metric: str
    margin: float
    level: float


class Quantized(msgspec.Struct):
    """A quantised trial: its shares of the unquantised one's metric and bytes, and its speed-up.

    ``latency_times_faster`` is for one user. Whether the trial suffices is not tested.
    """

    trial: str
    retained: Estimate | None
    bytes: float | None
    latency_times_faster: Estimate | None
    command: str


class Recommendation(msgspec.Struct):
    """The trial to ship, and the command that exports it."""

    trial: str
    method: str
    depth: int
    seed: int
    kept: list[int]
    command: str
    quantized: Quantized | None = None


class Candidate(msgspec.Struct):
    """The sufficient depth, or the best candidate, compared with the teacher and SASRec.

    ``retained`` and ``of_sasrec`` are shares of the teacher's and SASRec's value of the question's
    metric, ``parameters`` of the teacher's; the others say how many times faster than the teacher.
    """

    method: str
    depth: int
    retained: Estimate | None
    parameters: float | None
    inference_times_faster: Estimate | None
    training_times_faster: Estimate | None
    of_sasrec: Estimate | None


class Tested(msgspec.Struct):
    """A candidate's test: ``shown`` says that its loss is within the margin.

    ``lower`` is its one-sided bound at the level ``tested_at``, which allows for all candidates.
    """

    method: str
    depth: int
    retained: Estimate
    lower: float | None
    tested_at: float
    p_value: float | None
    shown: bool


class Needed(msgspec.Struct):
    """How many test users, or seeds, would decide about a candidate: for even odds and for 80 %."""

    method: str
    depth: int
    users: list[int | None]
    seeds: list[int | None]


class Sufficiency(msgspec.Struct):
    """All candidates by depth, and the smallest depth that is shown to suffice, if one is."""

    method: str | None
    depth: int | None
    candidates: list[Tested]
    needed: Needed | None


class Searched(msgspec.Struct):
    """A search: how many models it trained ``of`` a full sweep's, and its share of the compute.

    ``refuted`` and ``open`` are depths; ``ended`` says why the search ended, and is empty before.
    """

    trained: int
    of: int
    compute: float
    refuted: list[int]
    open: list[int]
    ended: str


class Cells(msgspec.Struct):
    """A table: ``values`` with every digit, and ``columns`` and ``rows`` as the page shows them."""

    columns: list[str]
    rows: list[list[str]]
    values: list[dict[str, Cell]]


class Result(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The result of a run.

    ``verdict`` is ``shown``, ``not shown``, ``SASRec is better``, ``weak teacher``, or what is
    missing for an answer; ``answer`` and ``caveats`` are the sentences of the page's first screen.
    ``provenance`` is the run's manifest. ``digest`` is the beginning of a sha256 of all before it.
    """

    schema: Literal[1] = 1
    depthprobe: str
    name: str
    verdict: str
    question: Question
    recommendation: Recommendation | None
    candidate: Candidate | None
    sufficiency: Sufficiency | None
    search: Searched | None = None
    answer: list[str]
    caveats: list[str]
    blocks: int
    users: int
    seeds: list[int]
    failed: list[str]
    seen_items: str
    tables: dict[str, Cells]
    study: dict[str, Any]
    provenance: dict[str, Any]
    digest: str | None = None


def make_result(summary: Summary, answer: Answer, tables: Mapping[str, Table]) -> Result:
    """Make the result of a run from the content of its page."""
    run, found = summary.run, summary.sufficiency
    recommended = candidate = sufficiency = None
    if answer.trial:
        smaller = answer.quantized
        point = next(each for each in summary.points if answer.trial in each.trials)
        record = next(each for each in run.records if each.id == answer.trial)
        recommended = Recommendation(
            record.id, point.method, point.depth, record.seed, list(record.kept), answer.command,
            smaller and Quantized(
                smaller.trial, _estimate(smaller.kept), _number(smaller.bytes),
                _estimate(smaller.latency), smaller.command,
            ),
        )  # fmt: skip
    if answer.method is not None and answer.depth is not None:
        candidate = Candidate(
            answer.method, answer.depth, _estimate(answer.kept), _number(answer.parameters),
            _estimate(answer.inference), _estimate(answer.training), _estimate(answer.sasrec),
        )  # fmt: skip
    if found is not None:
        rows = [
            Tested(
                row.method, row.depth, Estimate(*map(_number, _ends(row.kept))), _number(row.lower),
                row.tested_at, _number(row.p_value), bool(row.shown),
            )
            for row in found.rows
        ]  # fmt: skip
        needed = found.needed
        sufficiency = Sufficiency(
            found.method, found.depth, rows,
            needed and Needed(needed.method, needed.depth, list(needed.users), list(needed.seeds)),
        )  # fmt: skip
    searched = None
    if (search := summary.found) is not None:
        searched = Searched(
            *search.models, search.cost / search.full_cost, list(search.state.refuted),
            list(search.state.open), search.ended,
        )  # fmt: skip
    provenance = msgspec.to_builtins(run.manifest, enc_hook=lambda value: value.item())
    for private in ("files", "digest"):
        provenance.pop(private)
    return Result(
        depthprobe=depthprobe.__version__,
        name=run.study.name,
        verdict=answer.verdict,
        question=Question(summary.headline, summary.margin, summary.level),
        recommendation=recommended,
        candidate=candidate,
        sufficiency=sufficiency,
        search=searched,
        answer=[line for line in answer.lines if line],
        caveats=list(answer.caveats),
        blocks=summary.blocks,
        users=answer.users,
        seeds=sorted({seed for point in summary.points for seed in point.seeds}),
        failed=[str(trial) for trial in summary.failed.get("trial", [])],
        seen_items=run.seen_items,
        tables={name: _cells(table) for name, table in tables.items()},
        study=study_to_dict(run.study),
        provenance=provenance,
    )


def write_result(result: Result, folder: Path) -> Path:
    """Write FOLDER/result.json, sealed; returns its path."""
    content = msgspec.to_builtins(result)
    del content["digest"]
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / RESULT, content)
    return folder / RESULT


def read_result(path: str | Path) -> Result:
    """Read the result that a report wrote, from a run's folder or a result.json.

    Raises:
        BadInput: if it was changed since, or has another version of the format.
        FileNotFoundError: if there is none.
    """
    file = Path(path) / RESULT if Path(path).is_dir() else Path(path)
    return typed(read_sealed(file, AGAIN, SCHEMA), Result, file, AGAIN)


def schema() -> dict[str, Any]:
    """The JSON Schema of a result (draft 2020-12)."""
    made = msgspec.json.schema(Result)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": RESULT} | made


def _cells(table: Table) -> Cells:
    """A table for programs: columns `X`, `X low` and `X high` of its frame become one estimate."""
    values = []
    records: list[dict[str, Any]] = table.frame.astype(object).to_dict("records")  # type: ignore[assignment]
    for row in records:
        cells: dict[str, Cell] = {}
        bounded = {name for name in row if f"{name} low" in row and f"{name} high" in row}
        ends = {f"{name} {end}" for name in bounded for end in ("low", "high")}
        for name, cell in row.items():
            if name in ends:
                continue
            value = _plain(cell)
            if name in bounded:
                value = Estimate(value, _plain(row[f"{name} low"]), _plain(row[f"{name} high"]))
            cells[name] = value
        values.append(cells)
    return Cells(list(table.columns), [list(row) for row in table.rows], values)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is None or isinstance(plain, bool | int | str):
        return plain
    return _number(plain) if isinstance(plain, float) else str(plain)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _ends(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _estimate(interval: Interval | None) -> Estimate | None:
    return None if interval is None else Estimate(*map(_number, _ends(interval)))
