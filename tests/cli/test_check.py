"""`check`: the verdict, the exit code, and the page over all families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from depthprobe.models import families as support
from depthprobe.models.check import CHECKS, CheckResult
from depthprobe.models.families import Family


def test_the_embedded_backbone_from_start_to_end(cli: Callable[..., Any]) -> None:
    outcome = cli("check", "--backbone", "embedded")
    assert outcome.code == 0
    names = [words[0] for line in outcome.out.splitlines() if "passed" in (words := line.split())]
    assert names == ["blocks", "tiny", *CHECKS]
    assert outcome.out.splitlines()[-1] == "embedded: can be cut"
    assert outcome.err == ""


def test_what_sees_later_positions(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    outcome = cli("check", "--backbone", "bert")
    assert outcome.code == 1
    marks = {
        words[0]: words[1] for line in outcome.out.splitlines() if len(words := line.split()) > 1
    }
    assert (marks["causal"], marks["parts"], marks["cut"]) == ("FAILED", "no", "passed")
    assert outcome.out.splitlines()[-1] == "bert: can NOT be cut safely"


def test_what_is_no_backbone_of_a_recommender(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [CheckResult(n, n != "recommender", "") for n in ("blocks", "tiny copy", *CHECKS)]
    monkeypatch.setattr("depthprobe.models.check.check_backbone", lambda *_, **__: found)
    outcome = cli("check", "--backbone", "trocr")
    assert outcome.code == 1
    last = outcome.out.splitlines()[-1]
    assert last == "trocr: can be cut, but can NOT be a recommender's backbone"


def test_all_families_make_a_page(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = [CheckResult(name, True, "") for name in ("blocks", "tiny copy", *CHECKS)]
    found = [
        Family("whole", "WholeForCausalLM", tuple(results)),
        Family("none", "NoneForCausalLM", (CheckResult("blocks", False, "no list"),)),
    ]
    monkeypatch.setattr(support, "families", lambda: ["whole", "none"])
    monkeypatch.setattr(support, "check_families", lambda names, *, jobs: iter(found))
    outcome = cli("check", "--all", "--output", "new/page.md")
    assert outcome.code == 0
    assert outcome.err.splitlines() == [
        "[1/2] whole  can be cut",
        "[2/2] none  no: blocks: no list",
    ]
    assert outcome.out.splitlines() == ["1 of 2 families can be cut", "new/page.md"]
    page = (tmp_path / "new" / "page.md").read_text(encoding="utf-8")
    assert "| `whole` | WholeForCausalLM | yes |" in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.md"]
