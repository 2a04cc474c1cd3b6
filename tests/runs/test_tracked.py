"""Every training of a study is tracked under its trial's name; nothing else is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as trackers
from accelerate.tracking import GeneralTracker

from depthprobe.errors import BadInput
from depthprobe.runs.context import TRACKING
from depthprobe.runs.store import open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Study, Tracking


class Files(GeneralTracker):
    """A file a run, a line a word."""

    name = "files"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.path = Path(logging_dir, run_name)

    @property
    def tracker(self) -> Path:
        return self.path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._write(str(values))

    def log(self, values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
        self._write(f"{step}: {', '.join(values)}")

    def _write(self, line: str) -> None:
        with self.path.open("a") as file:
            print(line, file=file)


def test_trainings_are_tracked(
    tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, Files.name, Files)
    study = replace(tiny, methods=("popularity", "elastic"), tracking=Tracking(to=("files",)))
    run = run_sweep(study, tmp_path / "run", jobs=0)
    assert not run.failed
    told = {path.name: path.read_text().splitlines() for path in (run.path / TRACKING).iterdir()}
    assert set(told) == {"sasrec-s0", "elastic-d03-s0"}  # what the item table needs, too
    settings, *epochs = told["elastic-d03-s0"]
    assert settings == "{'method': 'elastic', 'depth': 3, 'seed': 0}"
    assert [line.partition(": ")[2] for line in epochs] == ["epoch, loss, ndcg@10"] * 3
    again = run_sweep(replace(study, tracking=Tracking()), run.path, jobs=0)
    assert open_run(again.path).study.tracking == Tracking()


def test_an_unknown_tracker_is_refused_before_anything_is_written(
    tiny: Study, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"tracking\.to: expected .*'tensorbord'"):
        run_sweep(replace(tiny, tracking=Tracking(to=("tensorbord",))), tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()
