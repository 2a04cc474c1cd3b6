"""Names of GPUs, and their roofs by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from depthprobe.cost.gpus import GPUS, Roof, check_gpus, find_gpu
from depthprobe.cost.roofline import MEASURED, roof_of
from depthprobe.errors import BadInput


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("H100-SXM", "H100-SXM"),
        ("h100 sxm", "H100-SXM"),
        ("NVIDIA H100", "H100-SXM"),
        ("a100", "A100-80GB"),
        ("A100 40GB", "A100-40GB"),
        ("GeForce RTX 4090", "RTX-4090"),
        ("l4", "L4"),
    ],
)
def test_a_gpu_in_any_spelling(name: str, known: str) -> None:
    assert find_gpu(name) is GPUS[known]


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(BadInput, match="gpu: 'L40X' .* did you mean L40S"):
        find_gpu("L40X")


def test_a_dtype_that_a_gpu_has_no_units_for() -> None:
    assert [roof.name for roof in check_gpus("T4, L4", "float16")] == ["T4", "L4"]
    with pytest.raises(BadInput, match="dtype: 'bfloat16' .* T4"):
        check_gpus("L4,T4", "bfloat16")


def test_the_longer_of_computing_and_moving() -> None:
    roof = Roof("toy", {"float32": 100.0}, bandwidth=10, memory=1)
    assert roof.seconds(1000, 10, "float32") == 10
    assert roof.seconds(1000, 1000, "float32") == 100


def test_datasheets_are_dense_and_of_the_right_size() -> None:
    for roof in GPUS.values():
        assert 4 <= roof.peak["float16"] / roof.peak["float32"] * 2 <= 33
        # FLOPs that a byte must give to be bound by the peak: 80 to 600 in these generations
        assert 80 <= roof.peak["float16"] / roof.bandwidth <= 600
    names = [name for roof in GPUS.values() for name in roof.devices]
    assert len(names) == len(set(names))


def test_a_roof_that_is_measured() -> None:
    roof = roof_of(torch.device("cpu"), "bfloat16")
    assert roof.source == MEASURED
    assert set(roof.peak) == {"bfloat16", "float32"}
    assert all(1e8 < peak < 1e14 for peak in roof.peak.values())
    assert 1e8 < roof.bandwidth < 1e13
    assert math.isnan(roof.memory)


def test_the_guide_lists_the_table() -> None:
    guide = Path(__file__).parents[2] / "docs" / "cost.md"
    if not guide.exists():
        pytest.skip("an sdist has no guides")
    assert f"what to predict for: {', '.join(GPUS)};" in guide.read_text(encoding="utf-8")
