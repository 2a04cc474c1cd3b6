"""Trackers get the values of a training, and none of them can spoil it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from accelerate import tracking as trackers
from accelerate.tracking import GeneralTracker
from torch import nn

from depthprobe.errors import BadInput
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Recipe
from depthprobe.training import loop
from depthprobe.training.loop import Fit
from depthprobe.training.objectives import NextItem
from depthprobe.training.tracking import check_trackers, tracked

RUN: dict[str, Any] = {"project": "study", "run": "full-s0", "settings": {"seed": 0}}
RECIPE = Recipe(epochs=2, batch_size=8)  # 4 steps an epoch
Train = Callable[..., Fit]


class Recorder(GeneralTracker):
    """Keeps what it gets."""

    name = "recorder"
    requires_logging_directory = True
    every: ClassVar[list[Recorder]] = []

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir
        self.events: list[Any] = []
        self.every.append(self)

    @property
    def tracker(self) -> object:
        return self

    @property
    def steps(self) -> list[int]:
        return [event[0] for event in self.events if isinstance(event, tuple)]

    def start(self) -> None:
        self.events.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.events.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
        self.events.append((step, values))

    def finish(self) -> None:
        self.events.append("finish")


class Broken(Recorder):
    """Fails at its second value."""

    name = "broken"

    def log(self, values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
        super().log(values, step)
        if step == 8:
            raise ConnectionError("nobody\nthere")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Recorder, Broken):
        monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    monkeypatch.setattr(Recorder, "every", [])


@pytest.fixture
def objective(make_sasrec: Callable[..., SASRec]) -> nn.Module:
    return NextItem(make_sasrec(), RECIPE)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]


def test_epochs_and_some_steps_are_tracked(
    objective: nn.Module, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(loop, "TRACKED", 2)
    done = train(
        objective, RECIPE, [0.1, 0.3], track=lambda step, values: given.append((step, values))
    )
    assert [(step, values) for step, values in given if "epoch" in values] == [
        (4, {"epoch": 1, "loss": done.losses[0], "ndcg@10": 0.1}),
        (8, {"epoch": 2, "loss": done.losses[1], "ndcg@10": 0.3}),
    ]
    steps = [(step, values) for step, values in given if "step loss" in values]
    assert [step for step, _ in steps] == [2, 4, 6, 8]
    losses = [values["step loss"] for _, values in steps]
    assert np.mean(losses[:2]) == pytest.approx(done.losses[0])
    assert np.mean(losses[2:]) == pytest.approx(done.losses[1])
    rates = [values["learning rate"] for _, values in steps]
    assert rates == sorted(rates, reverse=True)  # half a cosine
    assert 0 < rates[-1] < rates[0] <= 1e-3


def test_a_tracker_gets_all_of_it_once(objective: nn.Module, train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "tracking"
    with tracked(("recorder",), folder=folder, **RUN) as track:
        assert not Recorder.every  # started by the first value
        train(objective, RECIPE, track=track)
    (recorder,) = Recorder.every
    assert (recorder.run_name, recorder.logging_dir) == ("full-s0", str(folder))
    assert recorder.events[:2] == ["start", {"seed": 0}]
    assert recorder.steps == [4, 8]
    assert recorder.events[-1] == "finish"


def test_a_tracker_that_fails_is_left_out(
    objective: nn.Module, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tracked(("broken", "recorder", "gone"), folder=tmp_path, **RUN) as track:
        train(objective, Recipe(epochs=3, batch_size=8), track=track)
    broken, recorder = Recorder.every
    assert (broken.steps, broken.events[-1]) == ([4, 8], "finish")
    assert (recorder.steps, recorder.events[-1]) == ([4, 8, 12], "finish")
    gone, broken_line = warnings_in(caplog)
    assert "gone" in gone
    assert broken_line == "tracking by broken stopped: ConnectionError: nobody there"


def test_a_real_tracker_takes_its_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, Any] = {}

    def init(**named: object) -> object:
        seen.update(named)
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with tracked(("wandb",), folder=tmp_path, **RUN) as track:
        track(1, {"loss": 1.0})
        track(2, {"loss": 1.0})
    assert seen == {"project": "study", "name": "full-s0"}
    assert warnings_in(caplog) == ["tracking by wandb stopped: OSError: no network"]


def test_trackers_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "depthprobe.training.tracking.get_available_trackers", lambda: ["tensorboard"]
    )
    check_trackers(())
    check_trackers(("tensorboard", "recorder"))
    with pytest.raises(BadInput, match="did you mean tensorboard.*'tensorbord'"):
        check_trackers(("tensorbord",))
    with pytest.raises(BadInput, match="installed.*'mlflow'"):
        check_trackers(("tensorboard", "mlflow"))
