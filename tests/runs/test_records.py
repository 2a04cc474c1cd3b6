"""Records and manifest: strict JSON, read back as they were, refused or remade when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from depthprobe.errors import BadInput
from depthprobe.files import write_json
from depthprobe.runs.records import (
    Manifest,
    Record,
    read_manifest,
    read_record,
    state_of,
    write_manifest,
)
from depthprobe.runs.store import Run

CONTRACT = {
    *("schema", "id", "method", "kept", "removed", "depth", "seed", "status", "error"),
    *("metrics", "validation", "costs", "provenance"),
}


def test_a_record_is_strict_json_with_the_promised_keys(small_run: Run) -> None:
    folder = small_run.path / "trials" / "finetune-d02-s0"
    text = (folder / "record.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert content.keys() >= CONTRACT
    assert content["validation"].keys() == {"NDCG@10", "users"}
    record = read_record(folder)
    assert record is not None
    assert json.loads(msgspec.json.encode(record)) == content


def test_a_number_that_is_none_is_refused(small_run: Run, tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(small_run.manifest, wall_seconds=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(tmp_path, manifest)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"kept": "all"}, "kept"),
        ({"seed": None}, "seed"),
        ({"status": "maybe"}, "status"),
        ({"costs": {"training": {}}}, "epochs"),
        ({"schema": 2}, "this one has format 2"),
        ({"id": "b"}, "the record in it is of b"),
    ],
)
def test_a_record_of_an_earlier_version_is_checked_by_its_types(
    damage: dict[str, object], says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "trials" / "a"
    assert read_record(folder) is None
    record = msgspec.to_builtins(Record(id="a", method="full", seed=0, status="failed"))
    del record["files"], record["digest"]
    write_json(folder / "record.json", record)
    assert state_of([folder]) == "failed"
    write_json(folder / "record.json", record | damage)
    with pytest.raises(BadInput, match=says):
        read_record(folder)


def test_a_manifest_is_read_by_attribute_or_as_its_file(small_run: Run) -> None:
    manifest = small_run.manifest
    assert manifest["data"]["warnings"] is manifest.data.warnings
    assert manifest["machine"]["device"] == manifest.machine.device
    with pytest.raises(KeyError, match="cost"):
        manifest["cost"]


def test_a_manifest_of_another_format_is_refused(small_run: Run, tmp_path: Path) -> None:
    manifest: Manifest = small_run.manifest
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    write_manifest(tmp_path, msgspec.structs.replace(manifest, schema=2))
    with pytest.raises(BadInput, match="this one has format 2"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 1, "created": 3}')
    with pytest.raises(BadInput, match=r"readable manifest\.json"):
        read_manifest(tmp_path)
