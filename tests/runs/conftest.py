"""One small run, made once: sixty users, three blocks, methods without titles, some variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from depthprobe.runs.processes import Progress
from depthprobe.runs.store import Run, open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import (
    METHODS,
    Backbone,
    Cost,
    Data,
    Distillation,
    Protocol,
    Recipe,
    SasRecSettings,
    Study,
    Variant,
)


@pytest.fixture(scope="session")
def study(small_inputs: Path) -> Study:
    few = Recipe(epochs=3, batch_size=16, learning_rate=0.01)
    return Study(
        name="small",
        layers="1,2",
        methods=(
            *(name for name, each in METHODS.items() if not (each.titles or each.lever)),
            *("finetune:angular", "heal:greedy", "distill:logits", "distill:top"),
        ),
        variants={
            "logits": Variant(
                distillation=Distillation(cosine=0, norm=0, supervision=0, logits=1, init="teacher")
            ),
            "top": Variant(
                select="1",
                distillation=Distillation(logits=1, top=5, features="online", init="random"),
            ),
        },
        seeds=2,
        device="cpu",
        data=Data(source=str(small_inputs / "log.txt"), max_history=10),
        backbone=Backbone(source=str(small_inputs / "backbone"), prompt="Next:"),
        sasrec=SasRecSettings(width=8, blocks=1, dropout=0.1, recipe=few),
        recipe=few,
        protocol=Protocol(resamples=100),
        cost=Cost(batch_size=16, warmup=1, rounds=3),
    )


@pytest.fixture(scope="session")
def small_run(study: Study, shared_folder: Callable[..., Path]) -> Iterator[Run]:
    """All of its methods, run once for all workers; tests only read it."""
    folder = shared_folder(
        "small-run", lambda folder: run_sweep(study, folder, jobs=0, command="test")
    )
    before = contents(folder)
    yield open_run(folder)
    assert contents(folder) == before, "a test has written into the run that all tests read"


def contents(folder: Path) -> dict[Path, int]:
    """When each file was written last."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


class Recorder(Progress):
    """Keeps what a sweep shows."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.planned: list[str] = []
        self.ended: list[str] = []

    def plan(self, trials: Sequence[str]) -> None:
        self.planned = list(trials)

    def message(self, text: str) -> None:
        self.texts.append(text)

    def done(self, trial: str, status: str, seconds: float, note: str) -> None:
        self.ended.append(f"{trial} {status}")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def tiny(study: Study) -> Study:
    """Two quick trials."""
    return replace(study, methods=("popularity", "sasrec"), seeds=1)
