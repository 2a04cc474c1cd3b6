"""Runs whose item table does not come from SASRec: nobody trains it, and the run stands alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depthprobe.errors import BadInput
from depthprobe.models.backbones import load_backbone, load_tokenizer
from depthprobe.models.export import load_recommender
from depthprobe.models.item_tables import balanced, embed_titles
from depthprobe.report.page import build_report
from depthprobe.runs import layout
from depthprobe.runs.context import Context
from depthprobe.runs.export import export_trial
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Study

ITEMS = 40
IDS = [f"i{number}" for number in range(ITEMS)]
TABLE = "shared/item-table.npy"


@pytest.fixture
def titled(study: Study, tmp_path: Path) -> Study:
    """The small study with two trained trials, on a log with titles but for two items."""
    log = tmp_path / "titled" / "log.txt"
    log.parent.mkdir()
    shutil.copy(study.data.source, log)
    rows = ["item_id\ttitle", *(f"{raw}\tTitle of number {raw[1:]}" for raw in IDS[2:])]
    (log.parent / "items.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return replace(
        study,
        methods=("popularity", "full", "distill"),
        layers="1",
        seeds=1,
        item_table="text",
        data=replace(study.data, source=str(log)),
    )


def write_vectors(folder: Path, ids: list[str] = IDS) -> Path:
    """A vector an item in the order of ``ids``, the same for an item whatever the order."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    drawn = dict(zip(IDS, rng.normal(loc=3, size=(ITEMS, 12)).astype(np.float16), strict=True))
    path = folder / "vectors.npy"
    np.save(path, np.stack([drawn[raw] for raw in ids]))
    (folder / "vectors.ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return path


def check_complete(run: Run, folder: Path, width: int) -> None:
    """Every trial done and none of SASRec; the table in the run, in the model, in the report."""
    assert not run.failed
    assert set(run.trials["trial"]) == {"popularity-s0", "full-d03-s0", "distill-d01-s0"}
    trained = run.trials.set_index("trial").loc[["full-d03-s0", "distill-d01-s0"]]
    assert (trained["parameters_item_table"] == (ITEMS + 1) * width).all()
    assert (trained["encode_ms"] > 0).all()
    table = np.load(run.path / TABLE)
    assert (table.shape, table.dtype) == ((ITEMS + 1, width), np.float32)
    assert run.manifest.item_table.width == width
    exported = export_trial(run.path, "distill-d01-s0", folder)
    loaded = load_recommender(exported)
    np.testing.assert_array_equal(loaded.model.item_matrix().numpy(), table)
    (best,) = loaded.recommend([["i3", "i4"]], top=5)
    assert len({found.item for found in best} - {"i3", "i4"}) == 5
    page = build_report(run).read_text(encoding="utf-8")
    assert f"width {width}, frozen" in page
    assert str(run.manifest.item_table.sha256) in page


def test_titles_through_the_backbone(titled: Study, tmp_path: Path) -> None:
    run = run_sweep(titled, tmp_path / "run", jobs=0)
    check_complete(run, tmp_path / "model", 16)
    source = titled.backbone.source
    texts = [*IDS[:2], *(f"Title of number {raw[1:]}" for raw in IDS[2:])]
    (expected,) = embed_titles(load_backbone(source), load_tokenizer(source), texts)
    found = np.load(run.path / TABLE)
    np.testing.assert_allclose(found, balanced(expected, "text").numpy(), rtol=0, atol=1e-5)
    records = [json.loads(p.read_text()) for p in run.path.glob("trials/*/record.json")]
    assert {record["status"] for record in records} == {"done"}


def test_titles_are_embedded_once(
    titled: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(titled, methods=("popularity",))
    run_sweep(few, tmp_path / "run", jobs=0)
    monkeypatch.setattr(layout, "make_table", lambda *_, **__: pytest.fail("embedded again"))
    run = run_sweep(replace(few, methods=("full",)), tmp_path / "run", jobs=0)
    assert not run.failed


def test_vectors_from_a_file(titled: Study, tmp_path: Path) -> None:
    """The order of the rows does not matter, and once begun the run needs no other file."""
    backwards = write_vectors(tmp_path / "backwards", IDS[::-1])
    run = run_sweep(replace(titled, item_table=str(backwards)), tmp_path / "run", jobs=0)
    shutil.rmtree(backwards.parent)
    check_complete(run, tmp_path / "model", 12)
    plain = write_vectors(tmp_path / "plain")
    (plain.parent / "vectors.ids.txt").unlink()
    study = replace(titled, item_table=str(plain), seeds=2, methods=("popularity",))
    other = run_sweep(study, tmp_path / "other", jobs=0)
    assert other.manifest.item_table.sha256 == run.manifest.item_table.sha256
    context = Context(other.path, study)
    assert context.item_table(0) is context.item_table(1)
    np.testing.assert_array_equal(np.load(run.path / TABLE), context.item_table(1).numpy())


def test_changed_vectors_are_refused(titled: Study, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "vectors")
    study = replace(titled, item_table=str(path), methods=("popularity",))
    run = run_sweep(study, tmp_path / "run", jobs=0)
    before = (run.path / TABLE).read_bytes()
    run_sweep(study, run.path, jobs=0)
    np.save(path, np.load(path) * np.arange(1, 13))
    with pytest.raises(BadInput, match="the item table has changed"):
        run_sweep(study, run.path, jobs=0)
    assert (run.path / TABLE).read_bytes() == before


@pytest.mark.parametrize("fault", ["no titles", "no tokenizer", "no file", "rows", "constant"])
def test_a_bad_table_writes_nothing(titled: Study, tmp_path: Path, fault: str) -> None:
    study, path = titled, tmp_path / "vectors.npy"
    if fault == "no titles":
        Path(titled.data.source).with_name("items.tsv").unlink()
    elif fault == "no tokenizer":
        source = tmp_path / "backbone"
        shutil.copytree(titled.backbone.source, source)
        for file in source.glob("tokenizer*"):
            file.unlink()
        study = replace(titled, backbone=replace(titled.backbone, source=str(source)))
    else:
        study = replace(titled, item_table=str(path))
    if fault in {"rows", "constant"}:
        np.save(path, np.ones((ITEMS - (fault == "rows"), 4)))
    with pytest.raises(BadInput, match="backbone" if fault == "no tokenizer" else "item_table"):
        run_sweep(study, tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_worker_processes_read_the_same_table(titled: Study, tmp_path: Path) -> None:
    here = run_sweep(titled, tmp_path / "here", jobs=0)
    there = run_sweep(titled, tmp_path / "there", jobs=2)
    assert not there.failed
    for trial in ("full-d03-s0", "distill-d01-s0"):
        left, right = here.record(trial).metrics, there.record(trial).metrics
        assert left == right
