"""The study of the headline runs from end to end on a small shape, and compares what it says."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

STUDY = Path(__file__).parents[2] / "analyses" / "cost_curve"
TASKS, LAYOUTS = ("train", "answer", "one"), ("padded", "shared")

pytestmark = pytest.mark.skipif(not STUDY.is_dir(), reason="an sdist has no analyses")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """``script("measure")``: one of the study's scripts, as if it ran from its folder."""
    monkeypatch.syspath_prepend(str(STUDY))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"cost_curve_{name}", STUDY / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look there
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("layouts", None)


@pytest.fixture
def small(tmp_path: Path, llama_config: Callable[..., Any]) -> Path:
    folder = tmp_path / "small"
    llama_config(num_hidden_layers=3, max_position_embeddings=128, vocab_size=70).save_pretrained(
        folder
    )
    return folder


def test_the_study_measures_both_layouts_at_every_depth(
    script: Callable[[str], ModuleType], small: Path, tmp_path: Path
) -> None:
    shape = ["--device", "cpu", "--config", str(small), "--depths", "2,1", "--dtype", "float32"]
    sizes = ["--users", "12", "--batch", "8", "--rounds", "6", "--output", str(tmp_path / "out")]
    script("measure").main([*shape, *sizes])
    (path,) = (tmp_path / "out").glob("*.csv")
    table = pd.read_csv(path)
    found = list(zip(table["task"], table["layout"], table["depth"], strict=True))
    assert found == [(task, name, k) for task in TASKS for name in LAYOUTS for k in (3, 2, 1)]
    assert (table[["ms_per_user", "low", "high", "times_full", "times_paper"]] > 0).all(axis=None)
    whole = table["depth"] == 3
    assert (table.loc[whole, "times_full"] == 1).all()
    assert (table.loc[whole & (table["layout"] == "padded"), "times_paper"] == 1).all()
    assert (table["difference"] < 1e-5).all()  # both layouts say the same of the same users
    assert (table["device"] == "cpu").all()
    assert table.loc[table["task"] != "one", "rss_bytes"].notna().all()
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["conditions"]["slots"] == "61 + 30 + 8"
    assert {len(values) for values in content["seconds"].values()} == {6}


def _grid(
    grid: ModuleType, small: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> pd.DataFrame:
    """The table of two depths, with few calls a case."""
    for name, value in {"WARMUP": 1, "CALLS": 3, "LEAST": 0.0, "MOST": 2}.items():
        monkeypatch.setattr(grid, name, value)
    shape = ["--device", "cpu", "--config", str(small), "--depths", "1,3", "--dtype", "float32"]
    grid.main([*shape, "--output", str(output), *more])
    return pd.read_csv(output / "grid.csv").set_index(["blocks", "layout", "task", "batch"])


def test_the_grid_measures_every_case(
    script: Callable[[str], ModuleType],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = script("grid")
    counter = iter(range(0, 10_000, 6))  # the GPU uses 6 joules between two readings
    monkeypatch.setattr(grid, "energy_counter", lambda device: lambda: float(next(counter)))
    table = _grid(grid, small, tmp_path, monkeypatch)
    cases = itertools.product((3, 1), LAYOUTS, ("encode", "train"), ("one", "saturating"))
    assert list(table.index) == list(cases)
    assert (table["state"] == "measured").all()
    assert (table[["calls", "warmup"]] == [3, 1]).all(axis=None)
    assert (table["joules_per_user"] * table["users"]).tolist() == pytest.approx([2.0] * 16)
    assert (table["rss_bytes"] > 0).all()
    assert table["users_per_second"].to_numpy() == pytest.approx(1000 / table["ms_per_user"])
    # a target a user; or, of a training in our layout, one after each of thirty items
    targets = table["ms_per_user"] / table["ms_per_target"]
    assert targets.round(6).unstack("task").loc[(slice(None), "shared"), "train"].eq(30).all()
    assert (targets.round(6) == 30).sum() == 4
    own, paper = table["ms_per_user"], table["ms_per_user"].loc[3, "padded", "train", "one"]
    assert table["times_paper"].loc[1, "shared", "train", "one"] == pytest.approx(
        paper / own.loc[1, "shared", "train", "one"]
    )
    assert (table["times_full"].loc[3] == 1).all()
    content = json.loads((tmp_path / "grid.json").read_text())
    assert {len(values) for values in content["seconds"].values()} == {3}
    assert set(content["users_per_second"]) == {
        f"{task}:{layout}" for task in ("encode", "train") for layout in LAYOUTS
    }


def test_the_grid_says_what_it_could_not_measure(
    script: Callable[[str], ModuleType],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = script("grid")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(grid, "steps", full)
    table = _grid(grid, small, tmp_path, monkeypatch).unstack("task")
    assert (table["state", "encode"] == "measured").all()
    assert (table["joules_per_user", "encode"] == "unavailable").all()  # and never 0
    assert table["state", "train"].str.startswith("failed: ").all()
    assert table["ms", "train"].isna().all()
    late = _grid(grid, small, tmp_path, monkeypatch, "--seconds", "0")
    assert (late["state"] == "skipped: no time left").all()


def test_energy_is_read_off_the_gpu_that_torch_uses(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    millijoules = {"GPU-1f-2e": 2500}
    nvml = ModuleType("pynvml")
    vars(nvml).update(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: millijoules[gpu],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = {"cuda": SimpleNamespace(uuid="1f-2e"), "other": SimpleNamespace(uuid="3d")}
    monkeypatch.setattr("torch.cuda.get_device_properties", properties.__getitem__)
    energy_counter = script("grid").energy_counter
    assert energy_counter("cuda")() == 2.5
    assert math.isnan(energy_counter("other")())


def test_the_saturating_batch_is_the_smallest_that_is_nearly_fastest(
    script: Callable[[str], ModuleType],
) -> None:
    saturating = script("grid").saturating
    assert saturating({1: 10.0, 2: 19.0, 4: 30.0, 8: 31.0, 16: 29.0}) == 4
    assert saturating({1: 10.0}) == 1


def test_batches_hold_every_user_once_in_parts(script: Callable[[str], ModuleType]) -> None:
    layouts = script("layouts")
    users = layouts.draw_users(21, "beauty")
    for name in LAYOUTS:
        batches = list(layouts.batches_of(users, name, 8, torch.device("cpu"), part=3))
        assert sorted(i for parts in batches for part in parts for i in part.chosen) == [*range(21)]
        assert [sum(len(part.chosen) for part in parts) for parts in batches] in (
            [8, 8, 5],
            [5, 8, 8],
        )
        assert max(len(part.chosen) for parts in batches for part in parts) == 3
    assert {len(user) for user in layouts.draw_users(3, "full")} == {31}


def test_a_step_in_parts_is_the_whole_batchs(
    script: Callable[[str], ModuleType], llama_config: Callable[..., Any]
) -> None:
    from transformers import LlamaForCausalLM

    layouts, device = script("layouts"), torch.device("cpu")
    backbone = LlamaForCausalLM(llama_config(max_position_embeddings=128, vocab_size=70))
    users = layouts.draw_users(6, "beauty")
    model = layouts.recommender(backbone, 2).eval()  # without the dropout of low-rank updates
    found = []
    for name in LAYOUTS:
        for part in (6, 4):
            loss = layouts.side(name, model).loss
            (parts,) = layouts.batches_of(users, name, 6, device, part=part)
            model.zero_grad()
            for each in parts:
                (loss(each) * (each.count / 6)).backward()
            found.append(model.input_adapter.weight.grad.clone())
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-3, atol=1e-6)
