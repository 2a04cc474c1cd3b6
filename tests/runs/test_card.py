"""The model card: figures of the record, front matter that YAML reads, quoted names."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from depthprobe.runs.card import model_card
from depthprobe.runs.store import Run, open_run

CARD_OF = "distill-d02-s1"
HOSTILE = 'x`](evil)\n---\n# owned\n<script>|``"\x1b[31m\u202e' + "y" * 500


def front_and_body(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def hostile(run: Run) -> Run:
    """The run as if its data and backbone had been named by somebody who wants a page broken."""
    changed = open_run(run.path)
    changed.manifest = copy.deepcopy(run.manifest)
    changed.manifest.data.name = HOSTILE
    changed.manifest.backbone.source = f"org/{HOSTILE}"
    changed.study = replace(run.study, name=HOSTILE)
    return changed


def test_figures_are_the_records(small_run: Run) -> None:
    record = small_run.record(CARD_OF)
    front, body = front_and_body(model_card(small_run, record))
    assert front["library_name"] == "transformers"
    assert {"depthprobe", "sequential-recommendation"} <= set(front["tags"])
    assert "base_model" not in front  # a folder is nobody's base on the hub
    row = r"^\| (\S+) \| (\S+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| (\d+) \|$"
    rows = re.findall(row, body, re.M)
    metrics = small_run.metrics
    chosen = metrics[(metrics["trial"] == CARD_OF) & (metrics["split"] == "test")]
    chosen = chosen[(chosen["slice"] == "all") & chosen["ci_low"].notna()]
    assert len(rows) == len(chosen)
    for metric, protocol, *numbers, users in rows:
        found = chosen[(chosen["metric"] == metric) & (chosen["protocol"] == protocol)]
        expected = found.iloc[0][["value", "ci_low", "ci_high"]].to_list()
        assert list(map(float, numbers)) == pytest.approx(expected, abs=5.1e-5)
        assert int(users) == found.iloc[0]["users"]
    total = record.costs.parameters["total"]
    assert f"| total | {total:,} |" in body
    for fact in (
        "depth 2: blocks 0-1 of the 3",
        small_run.study.digest(),
        small_run.manifest.data.fingerprint,
        small_run.manifest.backbone.revision,
        f"transformers {record.provenance.versions['transformers']}",
        "its own licence applies",
    ):
        assert fact in body


def test_a_base_on_the_hub_is_named(small_run: Run) -> None:
    run = open_run(small_run.path)
    run.manifest.backbone.source = "org/model"
    run.manifest.backbone.revision = "a" * 40
    front, body = front_and_body(model_card(run, small_run.record(CARD_OF)))
    assert front["base_model"] == "org/model"
    assert "`org/model`, revision" in body


def test_names_from_outside_stay_inside_their_quotes(small_run: Run) -> None:
    record = small_run.record(CARD_OF)
    plain = model_card(small_run, record)
    card = model_card(hostile(small_run), record)
    front, body = front_and_body(card)
    assert set(front) == {"library_name", "license", "license_name", "tags"}  # no id of the hub
    assert len(body.splitlines()) == len(front_and_body(plain)[1].splitlines())
    assert re.findall(r"^#+ .*$", body, re.M) == re.findall(r"^#+ .*$", plain, re.M)
    # what stands outside inline code, by CommonMark's rule: as many backticks close as have opened
    outside = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", body)
    for piece in ("evil", "script", "owned", "\x1b", "\u202e"):
        assert piece not in outside
    assert "\x1b" not in card


def test_the_card_is_strict_about_nothing_missing(small_run: Run) -> None:
    """Records of trials without a training, and of a run outside a checkout, have a card too."""
    for trial in ("early-exit-d01-s0", "skip-b01-s0", "full-d03-s0"):
        record = copy.deepcopy(small_run.record(trial))
        record.provenance.git = None
        assert "not from a checkout" in model_card(small_run, record)


def test_the_card_says_what_is_kept_of_the_teacher(small_run: Run) -> None:
    body = front_and_body(model_card(small_run, small_run.record(CARD_OF)))[1]
    assert "all blocks), over 60 test users." in body
    share = float(re.search(r"It keeps ([\d.]+) % .* NDCG@10 of the teacher", body)[1])  # type: ignore[index]
    table = small_run.metrics.query("split == 'test' and protocol == 'full' and slice == 'all'")
    ndcg = table[table["metric"] == "NDCG@10"].set_index("trial")["value"]
    assert share == pytest.approx(100 * ndcg[CARD_OF] / ndcg["full-d03-s1"], abs=0.051)
    assert "It keeps" not in model_card(small_run, small_run.record("full-d03-s1"))
