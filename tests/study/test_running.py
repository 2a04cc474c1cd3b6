"""How a study is run is checked where it is written, and decides no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from depthprobe.errors import BadInput
from depthprobe.study import (
    Slurm,
    Study,
    Tracking,
    differences,
    load_study,
    override,
    study_to_toml,
)

TEXT = """
[slurm]
partition = "gpu"
minutes = 90
setup = ["module load cuda"]

[tracking]
to = ["tensorboard", "wandb"]
"""


def test_tables_of_a_study_file(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(TEXT, encoding="utf-8")
    study = load_study(path)
    assert study.slurm == Slurm(partition="gpu", minutes=90, setup=("module load cuda",))
    assert study.tracking == Tracking(to=("tensorboard", "wandb"))
    path.write_text(study_to_toml(study), encoding="utf-8")
    assert load_study(path) == study


def test_a_run_may_go_on_elsewhere_and_be_tracked_otherwise() -> None:
    study = Study()
    other = override(study, **{"slurm.gpus": 0, "tracking.to": ("wandb",)})
    assert other != study
    assert other.digest() == study.digest()
    assert differences(study, other) == []
    assert differences(study, override(other, **{"recipe.epochs": 9})) == ["recipe.epochs: 6 -> 9"]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Slurm(minutes=0), "slurm.minutes"),
        (lambda: Slurm(gpus=-1), "slurm.gpus"),
        (lambda: Slurm(memory_gb=0), "slurm.memory_gb"),
        (lambda: Tracking(to=("wandb", "wandb")), "tracking.to"),
    ],
)
def test_what_can_not_be_is_refused(make: Any, named: str) -> None:
    with pytest.raises(BadInput, match=f"^{named}"):
        make()
