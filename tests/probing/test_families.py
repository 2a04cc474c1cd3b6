"""Every decoder family is probed, or refused in one line before a user is encoded."""

from __future__ import annotations

import copy
import re
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
from depthprobe.probing.passes import early_exit, settling
from depthprobe.probing.readout import cache_states
from depthprobe.probing.replace import fit_replacements
from depthprobe.probing.similarity import similarities
from depthprobe.probing.taylor import taylor_importance
from depthprobe.probing.walk import rank_routes, route

CPU = torch.device("cpu")
Draw = Callable[[int, int], EvalSet]
# what their blocks hand on is no state (B, T, D); or some do not run on text
UNREADABLE = {
    "hy_v4": r"its blocks hand on \(1, 4, 4, 32\) for 4 tokens",
    "mllama": r"blocks \[1\] do not run on text",
}


def make(family: str) -> Recommender:
    torch.manual_seed(0)
    backbone = tiny_model(family_config(family), depth=3)
    return Recommender(backbone, torch.randn(41, 6), (3, 1)).to(backbone.dtype).eval()


# no small model of these can be built and run on text
NO_MODEL_NAMES = """
bart bigbird_pegasus blenderbot blenderbot-small blt cpmant deepseek_v4 dots3_note gemma3n gemma4
gemma4_assistant gemma4_unified gemma4_unified_assistant inkling2_loop_text inkling2_text marian
mbart musicgen musicgen_melody mvp pegasus plbart prophetnet qwen4_exp qwen4_exp_text reformer trocr
whisper xlm xlnet xmod zamba
"""
NO_MODEL = NO_MODEL_NAMES.split()
NO_BLOCKS = {"hrm_text", "longcat_flash"}
NO_MAP = (
    "does not end in one linear map|a norm, or more than a sum|MLPs, not one|a factor of"
    "|are not sums of their input"
)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family_is_probed_or_refused_for_a_known_reason(family: str, draw: Draw) -> None:
    if family in NO_MODEL:
        pytest.skip("no small model of it")
    if family == "dory":
        pytest.xfail("what its blocks return is not counted right")
    model, users = make(family), draw(6, 0)
    evaluate(model, users, device=CPU)
    probes: dict[str, Callable[[], np.ndarray]] = {
        "taylor": lambda: taylor_importance(model, users, device=CPU, batch_size=4),
        "settling": lambda: settling(model, users, device=CPU, k=5).ranks,
        "similarity": lambda: similarities(model, users, device=CPU).influence,
        "replace": lambda: fit_replacements(model, users, [(1, 2)], device=CPU)[0].map,
    }
    for name, probe in probes.items():
        refusal = "list of blocks.* as long" if family in NO_BLOCKS else ""
        if not refusal and name != "taylor":
            refusal = UNREADABLE.get(family, "")
        if name == "replace" and not refusal:
            reason = ""
            try:
                probe()
            except ValueError as error:
                reason = str(error)
            assert not reason or (re.search(NO_MAP, reason) and "\n" not in reason)
        elif refusal:
            with pytest.raises(ValueError, match=refusal):
                probe()
        else:
            assert np.isfinite(probe()).all()


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
        assert "\n" not in str(raised.value)


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
