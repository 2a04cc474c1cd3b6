"""Replacement by budget in a run: a table beside trials, whose sizes and FLOPs are their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depthprobe.cost.flops import flops_per_user
from depthprobe.errors import BadInput
from depthprobe.models.build import cut_copy
from depthprobe.models.skipping import skip_blocks
from depthprobe.probing.mix import KEPT, NO_ATTENTION, NO_MLP, SKIP, possible_options, total
from depthprobe.runs.context import Context
from depthprobe.runs.export import export_trial
from depthprobe.runs.mix import count_flops, share_time
from depthprobe.runs.records import TIMING
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.runs.timing import read_timing
from depthprobe.study import Probing, Study


def test_the_table_is_of_the_trials(small_run: Run) -> None:
    table = small_run.scores("mix")
    assert len(table) == 2 * 2 * 3  # seeds, budgets, blocks
    for (seed, depth), own in table.groupby(["seed", "depth"]):
        record = small_run.record(f"mix-d{depth:02d}-s{seed}")
        full = small_run.record(f"full-d03-s{seed}")
        assert record.depth == depth
        left = own[~own["option"].isin(("replace", "skip"))]
        assert record.kept == tuple(left["block"])
        alone = [row.get(row["option"], 0.0) for row in own.to_dict("records")]  # kept: nothing
        np.testing.assert_array_equal(own["damage"], alone)
        assert own["predicted"].tolist() == pytest.approx([sum(alone)] * 3, abs=1e-12)
        lost = {
            "test": [r.metrics["test"]["full"]["NDCG@10"] for r in (full, record)],
            "validation": [r.validation.ndcg for r in (full, record)],
        }
        for name, (whole, rest) in lost.items():
            assert own[name].tolist() == pytest.approx([1 - rest / whole] * 3, abs=1e-6)
        total_, blocks = (full.costs.parameters[name] for name in ("total", "blocks"))
        own_blocks = record.costs.parameters["blocks"]
        assert own["share"].iloc[0] == pytest.approx(own_blocks / blocks)
        assert own_blocks <= blocks * depth / 3
        assert record.costs.parameters["total"] == total_ - blocks + own_blocks
        assert 0 < record.costs.flops_user < full.costs.flops_user
        assert record.costs.timing is None  # nobody has timed such a model


def test_no_checkpoint_can_hold_it(small_run: Run, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected a model of whole blocks") as raised:
        export_trial(small_run.path, "mix-d01-s0", tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_a_cosine_map_is_recorded_and_exported(small_run: Run, tmp_path: Path) -> None:
    for depth in (1, 2):
        one, other = (small_run.record(f"{n}-d0{depth}-s1") for n in ("replace", "replace-cosine"))
        assert one.kept == other.kept
        assert one.costs.parameters == other.costs.parameters
        assert (
            one.files["model/replacement.safetensors"]
            != (other.files["model/replacement.safetensors"])
        )
    export_trial(small_run.path, "replace-cosine-d02-s1", tmp_path / "out")


def test_flops_are_those_of_what_is_left(small_run: Run) -> None:
    context = Context(small_run.path, small_run.study)
    teacher = context.teacher(0, 3)
    blocks, rest = count_flops(context, teacher, possible_options(teacher))
    length = int(np.median([len(history) for history in context.test.histories]))

    def expected(mix: tuple[int, ...]) -> int:
        with skip_blocks(teacher.backbone, [b for b in range(3) if mix[b] == NO_MLP], part="mlp"):
            cut = cut_copy(teacher, [b for b in range(3) if mix[b] != SKIP])
            return flops_per_user(cut, length)

    for mix in [(KEPT, KEPT, KEPT), (KEPT, SKIP, KEPT), (NO_MLP, KEPT, SKIP)]:
        assert total(blocks, mix) + rest == expected(mix)
    assert total(blocks, (NO_ATTENTION,) * 3) + total(blocks, (NO_MLP,) * 3) == blocks[:, 0].sum()


def test_a_budget_in_milliseconds(study: Study, tmp_path: Path) -> None:
    probing = Probing(budget="milliseconds")
    wanted = replace(study, methods=("mix",), layers="1", seeds=1, probing=probing, variants={})
    run = run_sweep(wanted, tmp_path / "run", jobs=0)
    assert not run.failed
    seconds = read_timing(run.path / "shared" / TIMING)["seconds"]
    parts = ("block", "attention", "mlp")
    assert all(len(seconds[f"without:{part}"]) == study.cost.rounds for part in parts)
    table = run.scores("mix")
    assert set(table["budget"]) == {"milliseconds"}
    assert (table["share"] <= 1 / 3 + 1e-6).all()
    # made up: 3 blocks take 30 ms, of which attention 12 and MLPs 15
    median = {"encode:3": [0.04], "without:block": [0.01], "without:attention": [0.028]}
    costs = share_time(median | {"without:mlp": [0.025]}, np.ones((3, 5), dtype=bool))
    np.testing.assert_allclose(costs[1], [10, 6, 5, 0, 0])
