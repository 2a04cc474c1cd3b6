"""Every decoder family is probed, or refused in one line before a user is encoded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depthprobe.evaluation.ranks import EvalSet, evaluate
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.families import families, family_config
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model
from depthprobe.probing.passes import early_exit
from depthprobe.probing.readout import cache_states
from depthprobe.probing.replace import fit_replacements
from depthprobe.probing.settling import settling
from depthprobe.probing.similarity import similarities
from depthprobe.probing.taylor import taylor_importance
from depthprobe.probing.walk import rank_routes, route

CPU = torch.device("cpu")
# what their blocks hand on is no state (B, T, D); or some do not run on text
UNREADABLE = {
    "hy_v4": r"its blocks hand on \(1, 4, 4, 32\) for 4 tokens",
    "mllama": r"blocks \[1\] do not run on text",
}


def make(family: str) -> Recommender:
    torch.manual_seed(0)
    backbone = tiny_model(family_config(family), depth=3)
    return Recommender(backbone, torch.randn(41, 6), (3, 1)).to(backbone.dtype).eval()


def is_one_line(message: str) -> bool:
    return bool(message) and "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family_is_probed_or_refused(family: str, few: EvalSet) -> None:
    try:
        model = make(family)
        evaluate(model, few, device=CPU)
    except Exception as error:  # whatever an architecture does
        pytest.skip(f"no recommender to probe: {error}")
    check(lambda: settling(model, few, device=CPU, k=5).ranks)
    check(lambda: taylor_importance(model, few, device=CPU, batch_size=4))
    check(lambda: similarities(model, few, device=CPU).influence)
    check(lambda: fit_replacements(model, few, [(1, 2)], device=CPU)[0].map)


def check(probe: Callable[[], np.ndarray]) -> None:
    refusal = None
    try:
        found = probe()
    except ValueError as error:
        refusal = str(error)
    assert np.isfinite(found).all() if refusal is None else is_one_line(refusal)


@pytest.mark.parametrize("family", UNREADABLE)
def test_states_that_cannot_be_read_out_are_refused_at_once(
    family: str, few: EvalSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family)
    assert (taylor_importance(model, few, device=CPU) >= 0).all()  # needs no states

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a user was encoded")

    monkeypatch.setattr(model, "encode", never)
    probes: list[Callable[[], Any]] = [
        lambda: similarities(model, few, device=CPU),
        lambda: early_exit(model, few, device=CPU),
        lambda: rank_routes(model, few, [route(range(2))], device=CPU),
        lambda: settling(model, few, device=CPU, k=5),
        lambda: cache_states(model, few, path=tmp_path / "states.npy", device=CPU),
        lambda: fit_replacements(model, few, [(1, 2)], device=CPU),
    ]
    for probe in probes:
        with pytest.raises(
            ValueError, match=f"{family}.* by depth: .*{UNREADABLE[family]}"
        ) as raised:
            probe()
        assert is_one_line(str(raised.value))


def test_several_streams_are_read_out_as_by_a_cut_model(few: EvalSet) -> None:
    torch.manual_seed(0)
    backbone = tiny_model(family_config("gemma3n_text"), depth=6)
    model = Recommender(backbone, torch.randn(41, 6), (3, 1)).to(backbone.dtype).eval()
    exits = [ranks["full"] for ranks in early_exit(model, few, device=CPU)]
    routes = [route(range(depth)) for depth in range(1, 4)]
    walked = rank_routes(model, few, routes, device=CPU)
    for depth, ranks in enumerate(walked, start=1):
        cut = copy.deepcopy(model)
        keep_blocks(cut.backbone, range(depth))
        expected = evaluate(cut, few, device=CPU)["full"]
        np.testing.assert_array_equal(exits[depth], expected)
        np.testing.assert_array_equal(ranks["full"], expected)
    np.testing.assert_array_equal(settling(model, few, device=CPU, k=5).ranks, np.stack(exits, 1))
    found = similarities(model, few, device=CPU)
    assert (found.influence > 1e-3).all()
    assert np.isnan(found.attention).all()  # its blocks are no sums


def test_a_router_is_no_end_of_a_branch(few: EvalSet) -> None:
    # the norm behind Zaya's attention is called with its very output, and a router with the norm's
    found = similarities(make("zaya"), few, device=CPU)
    assert np.isfinite(found.influence).all()
