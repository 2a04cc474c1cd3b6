"""Peak memory and energy: planted amounts, and what can't be measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from depthprobe.cost import energy
from depthprobe.cost.memory import free_memory, peak_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZE = 200 * 2**20


def test_the_peak_of_a_process_is_seen_though_it_is_over_at_the_end() -> None:
    before = peak_memory(lambda: None, CPU)["rss"]

    def hold() -> None:
        torch.ones(SIZE // 4).sum()

    found = peak_memory(hold, CPU)
    assert set(found) == {"rss"}
    assert 0.9 * SIZE < found["rss"] - before < 1.6 * SIZE
    assert peak_memory(lambda: None, CPU)["rss"] < found["rss"] - 0.8 * SIZE


def test_no_more_than_half_of_what_is_free_may_be_had() -> None:
    import psutil

    assert 0 < free_memory(CPU) < 0.6 * psutil.virtual_memory().total


class FakeGpu:
    """NVML and the clock of a GPU that draws 200 W; a call takes half a second."""

    NVMLError = RuntimeError

    def __init__(self, *, works: bool = True) -> None:
        self.now, self.works, self.calls = 0.0, works, 0

    def nvmlInit(self) -> None:  # noqa: N802
        """As the bindings call it."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == "GPU-abc"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self.works:
            raise self.NVMLError("not supported")
        return int(200_000 * self.now)

    def call(self) -> None:
        self.calls += 1
        self.now += 0.5

    def seconds(self, action: Any, device: torch.device) -> float:
        began = self.now
        action()
        return self.now - began


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(energy, "_nvml", lambda: fake)
    monkeypatch.setattr(energy, "seconds", fake.seconds)
    properties = lambda device: SimpleNamespace(uuid="abc")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return fake


def test_energy_is_the_counters_difference_over_calls(gpu: FakeGpu) -> None:
    assert energy.joules(gpu.call, CUDA) == pytest.approx(100)  # 200 W for half a second
    assert gpu.calls == 1 + 4  # once for its duration, then two seconds
    assert energy.why_unmeasured(CUDA) is None


def test_energy_that_is_not_counted_is_none_and_not_zero(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert energy.joules(lambda: None, CPU) is None
    gpu.works = False
    assert energy.joules(gpu.call, CUDA) is None
    assert "no counter" in str(energy.why_unmeasured(CUDA))
    monkeypatch.setattr(energy, "_nvml", lambda: None)
    assert energy.joules(gpu.call, CUDA) is None
    assert "nvidia-ml-py" in str(energy.why_unmeasured(CUDA))


def test_a_counter_that_stands_still_has_measured_nothing(gpu: FakeGpu) -> None:
    assert energy.joules(lambda: None, CUDA) is None


@pytest.mark.gpu
def test_a_gpus_memory_is_allocated_and_reserved() -> None:
    found = peak_memory(lambda: torch.ones(SIZE // 4, device="cuda").sum(), CUDA)
    assert set(found) == {"allocated", "reserved"}
    assert SIZE <= found["allocated"] <= found["reserved"]
