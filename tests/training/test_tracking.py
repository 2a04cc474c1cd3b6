"""Trackers hear of a training, and none of them can spoil it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate import tracking as trackers
from accelerate.tracking import GeneralTracker

from depthprobe.errors import BadInput
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Recipe
from depthprobe.training import loop
from depthprobe.training.loop import Fit, fit
from depthprobe.training.objectives import NextItem
from depthprobe.training.tracking import Track, check_trackers, nobody, tracked


class Heard(GeneralTracker):
    """Keeps what it is told."""

    name = "heard"
    requires_logging_directory = True
    every: ClassVar[list[Heard]] = []

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir
        self.events: list[Any] = []
        self.every.append(self)

    @property
    def tracker(self) -> object:
        return self

    def start(self) -> None:
        self.events.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.events.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
        self.events.append((step, values))

    def finish(self) -> None:
        self.events.append("finish")


class Broken(Heard):
    """Fails at its second word."""

    name = "broken"

    def log(self, values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
        super().log(values, step)
        if step == 8:
            raise ConnectionError("nobody\nthere")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Heard, Broken):
        monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    monkeypatch.setattr(Heard, "every", [])


def train(windows: list[np.ndarray], track: Track, scores: list[float]) -> Fit:
    recipe, left = Recipe(epochs=len(scores), batch_size=8), iter(scores)
    torch.manual_seed(0)
    model = SASRec(12, width=8, blocks=1, heads=2, drop=0.1, longest=10)
    return fit(
        NextItem(model, recipe),
        windows,
        recipe=recipe,
        validate=lambda: next(left),
        seed=0,
        device=torch.device("cpu"),
        track=track,
    )


def test_a_training_tells_its_epochs_and_its_steps(
    windows: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(loop, "TOLD", 2)
    done = train(windows, lambda step, values: told.append((step, dict(values))), [0.1, 0.3])
    epochs = [(step, values) for step, values in told if "epoch" in values]
    assert epochs == [
        (4, {"epoch": 1, "loss": done.losses[0], "ndcg@10": 0.1}),
        (8, {"epoch": 2, "loss": done.losses[1], "ndcg@10": 0.3}),
    ]
    steps = [(step, values) for step, values in told if "step loss" in values]
    assert [step for step, _ in steps] == [2, 4, 6, 8]
    losses = [values["step loss"] for _, values in steps]
    assert np.mean(losses[:2]) == pytest.approx(done.losses[0])
    assert np.mean(losses[2:]) == pytest.approx(done.losses[1])
    rates = [values["learning rate"] for _, values in steps]
    assert rates == sorted(rates, reverse=True)  # half a cosine
    assert 0 < rates[-1] < rates[0] <= 1e-3


def test_trackers_hear_all_of_it_once(windows: list[np.ndarray], tmp_path: Path) -> None:
    folder = tmp_path / "tracking"
    settings = {"method": "full", "seed": 0}
    with tracked(
        ("heard",), folder=folder, project="study", run="full-s0", settings=settings
    ) as track:
        assert not Heard.every  # accelerate's state is not there before the training
        train(windows, track, [0.1, 0.3])
    (heard,) = Heard.every
    assert (heard.run_name, heard.logging_dir) == ("full-s0", str(folder))
    assert heard.events[:2] == ["start", settings]
    assert [step for step, _ in heard.events[2:-1]] == [4, 8]
    assert heard.events[-1] == "finish"


def test_a_tracker_that_fails_is_left_out(
    windows: list[np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tracked(
        ("broken", "heard", "gone"),
        folder=tmp_path,
        project="study",
        run="run",
        settings={},
    ) as track:
        done = train(windows, track, [0.1, 0.2, 0.3])
    assert done == train(windows, nobody, [0.1, 0.2, 0.3])
    broken, heard = Heard.every
    assert [step for step, _ in broken.events[2:-1]] == [4, 8]
    assert broken.events[-1] == "finish"
    assert [step for step, _ in heard.events[2:-1]] == [4, 8, 12]
    assert len(caplog.messages) == 2
    assert "gone" in caplog.messages[0]
    assert caplog.messages[1] == "not tracked by broken any more: ConnectionError: nobody there"


def test_trackers_end_with_a_training_that_fails(tmp_path: Path) -> None:
    def training() -> None:
        with tracked(("heard",), folder=tmp_path, project="p", run="r", settings={}) as track:
            track(1, {"loss": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        training()
    assert Heard.every[0].events[-1] == "finish"


def test_none_is_no_tracker(tmp_path: Path) -> None:
    with tracked((), folder=tmp_path / "t", project="p", run="r", settings={}) as track:
        track(1, {"loss": 1.0})
    assert track is nobody
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("wandb", {"args": ("study",), "name": "run"}),
        ("mlflow", {"args": ("study",), "run_name": "run"}),
        ("comet_ml", {"args": ("study",)}),
        ("tensorboard", {"args": ("run", "{folder}")}),
        ("dvclive", {"args": (), "dir": "{folder}/run"}),
    ],
)
def test_a_run_has_its_name_in_each_tracker(
    kind: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    real = trackers.LOGGER_TYPE_TO_CLASS[kind]

    class Stub(Heard):
        requires_logging_directory = real.requires_logging_directory

        def __init__(self, *args: object, **named: object) -> None:
            made.append({"args": args, **named})
            super().__init__("", "")

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, kind, Stub)
    with tracked((kind,), folder=tmp_path, project="study", run="run", settings={}) as track:
        track(1, {"loss": 1.0})
    place = str(tmp_path)
    filled = {
        key: tuple(word.format(folder=place) for word in value)
        if isinstance(value, tuple)
        else value.format(folder=place)
        for key, value in expected.items()
    }
    assert made == [filled]


def test_a_real_tracker_takes_its_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, Any] = {}

    def init(**named: object) -> object:
        seen.update(named)
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with tracked(("wandb",), folder=tmp_path, project="study", run="run", settings={}) as track:
        track(1, {"loss": 1.0})
        track(2, {"loss": 1.0})
    assert seen == {"project": "study", "name": "run"}
    assert caplog.messages == ["not tracked by wandb any more: OSError: no network"]


def test_trackers_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "depthprobe.training.tracking.get_available_trackers", lambda: ["tensorboard"]
    )
    check_trackers(())
    check_trackers(("tensorboard", "heard"))
    with pytest.raises(BadInput, match="'tensorbord'.*did you mean tensorboard"):
        check_trackers(("tensorbord",))
    with pytest.raises(BadInput, match="'mlflow'.*installed"):
        check_trackers(("tensorboard", "mlflow"))
