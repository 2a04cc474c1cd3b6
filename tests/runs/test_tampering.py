"""A run whose files were damaged, edited, exchanged or linked: named in one line, or made anew."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest

from depthprobe.cli.runs import status
from depthprobe.errors import BadInput
from depthprobe.report.page import build_report
from depthprobe.runs import layout
from depthprobe.runs.context import Context, same_backbone
from depthprobe.runs.layout import threads_of
from depthprobe.runs.plan import full_trial, trial_of
from depthprobe.runs.probing import removal
from depthprobe.runs.processes import Progress
from depthprobe.runs.records import read_users
from depthprobe.runs.store import Run, open_run, status_of
from depthprobe.runs.sweep import run_sweep
from depthprobe.runs.timing import read_timing
from depthprobe.runs.training import SECONDS, teacher_for
from depthprobe.study import Study

Reader = Callable[[Path], object]
TRIAL = "trials/full-d03-s0"


@pytest.fixture
def copy(small_run: Run, tmp_path: Path) -> Path:
    """The small run, by hard links: what is changed is written anew."""
    no_locks = shutil.ignore_patterns(".*")
    place = tmp_path / "run"
    return Path(shutil.copytree(small_run.path, place, ignore=no_locks, copy_function=os.link))


def context(run: Path) -> Context:
    return Context(run, open_run(run).study)


# which file, and who reads it
READERS: dict[str, Reader] = {
    "study.toml": open_run,
    "manifest.json": open_run,
    f"{TRIAL}/record.json": lambda run: open_run(run).records,
    f"{TRIAL}/users.parquet": lambda run: read_users(
        run / TRIAL, open_run(run).record("full-d03-s0")
    ),
    f"{TRIAL}/model/trained.safetensors": lambda run: context(run).trained(
        full_trial("full", 0, 3)
    ),
    "probes/similarity-s0/record.json": lambda run: open_run(run).scores("similarity"),
    "probes/similarity-s0/scores.parquet": lambda run: open_run(run).scores("similarity"),
    "shared/timing.json": lambda run: read_timing(run / "shared" / "timing.json"),
    "shared/data/items.npy": lambda run: open_run(run).slices,
    "shared/data/manifest.json": lambda run: open_run(run).slices,
    "shared/data/users.parquet": lambda run: context(run).sequences.user_ids,
    "shared/removal-s0": lambda run: removal(context(run), 0, 3),
}


def as_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.unlink()
        path.write_text(json.dumps(content, indent=1))

    return damage


def written(content: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        before = path.read_bytes()
        path.unlink()
        path.write_bytes(content(before))

    return damage


def in_place(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": written(lambda before: b""),
    "cut": written(lambda before: before[: len(before) // 2]),
    "flipped": written(lambda before: flipped(before, len(before) // 2)),
    "noise": written(lambda before: os.urandom(500)),
    "nested": written(lambda before: b'{"schema": 1, "a": ' + b"[" * 100_000),
    "folder": in_place(Path.mkdir),
    "pipe": in_place(os.mkfifo),
    "device": in_place(lambda path: path.symlink_to("/dev/null")),
}
EDITS: dict[str, Callable[[Path], object]] = {
    "null": written(lambda before: b"null"),
    "list": written(lambda before: b"[]"),
    "bare": written(lambda before: b"{}"),
    "not a number": written(lambda before: re.sub(rb": \d", b": NaN", before, count=1)),
    "huge": written(lambda before: re.sub(rb": \d", b": 1000000000", before, count=1)),
    "another key": as_json(lambda content: content.update(more=1)),
    "a key less": as_json(lambda content: content.pop([*content][-2])),
}
CASES = [(name, damage) for name in READERS for damage in DAMAGES]
CASES.remove(("study.toml", "flipped"))  # it may be in what decides nothing
CASES += [
    (name, edit) for name in READERS if name.endswith(("json", "removal-s0")) for edit in EDITS
]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_what_is_not_as_it_was_written_is_named(copy: Path, name: str, damage: str) -> None:
    (path,) = copy.glob(f"{name}*")
    (DAMAGES | EDITS)[damage](path)
    with pytest.raises(BadInput) as caught:
        READERS[name](copy)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert ("shared/data" if "data" in name else path.name) in message
    if name not in {"study.toml", "manifest.json"}:
        assert status_of(copy).total("damaged") == name.endswith("record.json")


@pytest.mark.parametrize("damage", [*DAMAGES, "edited"])
def test_the_table_of_metrics_is_derived_anew(copy: Path, damage: str, small_run: Run) -> None:
    path = copy / "metrics.parquet"
    if damage == "edited":
        table = pd.read_parquet(path)
        path.unlink()
        table.assign(value=0.5).to_parquet(path, index=False)
    else:
        DAMAGES[damage](path)
    assert open_run(copy).written_metrics() is None
    pd.testing.assert_frame_equal(open_run(copy).metrics, small_run.metrics)


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit JSON as an earlier version wrote it: without a digest."""
    content = json.loads(path.read_text())
    edit(content)
    content.pop("digest", None)
    path.unlink()
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("what", ["study", "data", "backbone"])
def test_a_record_of_another_run_is_neither_used_nor_replaced(copy: Path, what: str) -> None:
    path = copy / TRIAL / "record.json"
    change(path, lambda content: content["provenance"].update({what: "another"}))
    before = path.read_bytes()
    with pytest.raises(BadInput, match=f"its {what} is not that of the run"):
        open_run(copy).check()
    assert [task for task, _ in status_of(copy).damaged] == ["full-d03-s0"]
    with pytest.raises(BadInput, match="is not that of the run"):
        run_sweep(open_run(copy).study, copy, jobs=0)
    assert path.read_bytes() == before


def test_a_copy_of_a_trial_has_no_place_in_the_run(copy: Path) -> None:
    shutil.copytree(copy / TRIAL, copy / f"{TRIAL}.bak")
    (copy / "trials" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="the record in it is of full-d03-s0"):
        open_run(copy).check()
    shutil.rmtree(copy / f"{TRIAL}.bak")
    open_run(copy).check()
    shutil.rmtree(copy / TRIAL)
    (copy / TRIAL).write_text("mine")
    assert status_of(copy).total("damaged") == 1


def test_a_study_may_change_in_what_decides_no_numbers(copy: Path, small_run: Run) -> None:
    path = copy / "study.toml"
    text = path.read_text()
    path.unlink()
    path.write_text("# a note\n" + text.replace('name = "small"', 'name = "large"'))
    assert open_run(copy).study.name == "large"
    for changed in (text.replace("epochs = 3", "epochs = 4", 1), ""):
        path.write_text(changed)
        with pytest.raises(BadInput, match="another study than it was"):
            open_run(copy)


def test_a_run_of_an_earlier_version_has_no_digests(copy: Path, small_run: Run) -> None:
    def older(content: dict[str, Any]) -> None:
        for key in ("files", "digest", "studies"):
            content.pop(key, None)

    for path in [
        copy / "manifest.json",
        *copy.glob("*/*/record.json"),
        *copy.glob("shared/*.json"),
    ]:
        change(path, older)
    run = open_run(copy)
    run.check()
    pd.testing.assert_frame_equal(run.metrics, small_run.metrics)
    again = run_sweep(run.study, copy, jobs=0)
    assert not again.manifest.studies  # some record may be of a study that nobody knows
    pd.testing.assert_frame_equal(again.metrics, small_run.metrics)


@pytest.mark.parametrize("place", ["figures", "trials/full-d03-s0", "logs/full-s0.log", "shared/x"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_leads_out_of_the_run_is_refused_by_who_writes(
    copy: Path, place: str, kind: str, tmp_path: Path
) -> None:
    path = copy / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / ".tmp-notes").write_text("mine")
    path.symlink_to(tmp_path / "outside") if kind == "link" else os.mkfifo(path)
    with pytest.raises(BadInput, match="it is no plain file"):
        run_sweep(open_run(copy).study, copy, jobs=0)
    with pytest.raises(BadInput, match="no plain file|no folder"):
        build_report(copy)
    assert [each.name for each in (tmp_path / "outside").iterdir()] == [".tmp-notes"]


def test_status_shows_all_and_then_the_record_that_is_damaged(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES["noise"](copy / TRIAL / "record.json")
    with pytest.raises(BadInput, match=r"record\.json"):
        status(copy)
    shown = capsys.readouterr().out
    assert "finetune" in shown
    assert "not readable: full-d03-s0" in shown


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"revision": "sha256:0000000000000000-0000000000000000"}, "weights"),
        ({"prompt": [[1, 2, 3], []]}, "prompt"),
    ],
)
def test_a_backbone_that_has_changed_is_refused_by_who_loads_it(
    small_run: Run, change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, facts = small_run.study.backbone, small_run.manifest.backbone
    assert same_backbone(settings, facts) == settings
    other = msgspec.structs.replace(facts, **change)
    with pytest.raises(BadInput, match=f"has changed since this run began.*{says}"):
        same_backbone(settings, other)
    context = Context(small_run.path, small_run.study)
    context.manifest = msgspec.structs.replace(small_run.manifest, backbone=other)
    with pytest.raises(BadInput, match="has changed"):
        context.new_recommender(full_trial("full", 0, 3))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_features_that_were_changed_are_made_anew(copy: Path, small_run: Run, damage: str) -> None:
    (folder,) = copy.glob("shared/features-s0-*")
    file = next(path for path in sorted(folder.iterdir()) if path.suffix == ".npy")
    before = file.read_bytes()
    DAMAGES[damage](file)
    teacher_for(Context(copy, small_run.study), trial_of("distill", (0, 1), 0, 3))
    assert file.read_bytes() == before
    assert json.loads((folder / SECONDS).read_text())["files"].keys() >= {file.name}


class Moves(Progress):
    """Moves the run's folder when its first trial is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def done(self, trial: str, status: str, seconds: float, note: str) -> None:
        if self.folder.exists():
            self.folder.rename(self.folder.with_name("moved"))


def test_a_run_that_is_moved_under_a_sweep_leaves_no_ghost(tiny: Study, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(BadInput, match="it was moved or deleted while the sweep ran"):
        run_sweep(tiny, folder, jobs=0, progress=Moves(folder))
    assert not folder.exists()
    again = run_sweep(tiny, tmp_path / "moved", jobs=0)
    assert [record.done for record in again.records] == [True, True]


def test_threads_are_a_share_of_the_cores_and_no_more_than_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for asked, workers, expected in ((8, 0, 8), (8, 2, 4), (8, 16, 1), (1, 2, 1), (3, 0, 3)):
        monkeypatch.setattr(layout.torch, "get_num_threads", lambda asked=asked: asked)
        assert threads_of(workers, 8) == expected
