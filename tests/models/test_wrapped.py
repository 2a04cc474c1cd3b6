"""Skips and taps under what else wraps a model: autocast, accelerate, torch.compile."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, cpu_offload

from depthprobe.models import skipping
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.parts import find_sublayers
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.taps import tap_blocks

SKIPS = [({1, 4}, "block"), ({0, 3}, "attention"), ({0, 3}, "mlp")]


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize(("skipped", "part"), SKIPS)
def test_autocast(skipped, part, make_model, ids):
    model = make_model("llama").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with skip_blocks(model, skipped, part=part):
            inside = logits(model, ids)
        if part == "block":
            cut = keep_blocks(make_model("llama").float(), sorted(set(range(6)) - skipped))
            assert torch.equal(inside, logits(cut, ids))
    with skip_blocks(model, skipped, part=part):
        exact = logits(model, ids)
    assert not torch.equal(inside, exact)  # it did run in bfloat16
    error = (inside.float() - exact).abs().max() / exact.std()
    assert error < 0.2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("skipped", "part"), SKIPS)
def test_offloaded_by_accelerate(skipped, part, make_model, ids, monkeypatch):
    monkeypatch.setattr(skipping, "_extra_outputs", {})
    model = make_model("llama")
    with skip_blocks(model, skipped, part=part):
        expected = logits(model, ids)
    whole = logits(model, ids)
    cpu_offload(model, torch.device("cpu"))
    assert find_blocks(model)[0].mlp.up_proj.weight.device.type == "meta"
    with tap_blocks(model) as tap, skip_blocks(model, skipped, part=part):
        assert torch.equal(logits(model, ids), expected)
        assert len(tap.states) == 7
    assert torch.equal(logits(model, ids), whole)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("skipped", "part"), SKIPS)
def test_prepared_by_accelerate(skipped, part, make_model, ids):
    plain = make_model("llama").float()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(make_model("llama").float())
    with torch.autocast("cpu", dtype=torch.bfloat16), skip_blocks(plain, skipped, part=part):
        expected = logits(plain, ids)
    with skip_blocks(model, skipped, part=part):
        result = model(ids, use_cache=False, labels=ids)
        accelerator.backward(result.loss)
    torch.testing.assert_close(result.logits.detach(), expected.float(), rtol=0, atol=0.1)
    assert find_blocks(model)[5].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("skipped", "part"),
    [SKIPS[0], *(pytest.param(*skip, marks=pytest.mark.slow) for skip in SKIPS[1:])],
)
def test_compiled(skipped, part, make_model, ids):
    model = keep_blocks(make_model("llama"), range(5))
    whole = logits(model, ids)
    with skip_blocks(model, skipped, part=part):
        expected = logits(model, ids)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, ids), whole, rtol=0, atol=1e-12)
    for wrapped in (compiled, model):  # whichever of the two it is given
        with skip_blocks(wrapped, skipped, part=part):
            torch.testing.assert_close(logits(compiled, ids), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(logits(compiled, ids), whole, rtol=0, atol=1e-12)
    # compiled for the first time inside a skip
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with skip_blocks(compiled, skipped, part=part):
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(compiled, ids), whole, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiled_by_inductor(make_model, ids):
    model = keep_blocks(make_model("llama").float(), (0, 1))
    compiled = torch.compile(model)
    with skip_blocks(model, {1}, part="attention"):
        expected = logits(model, ids)
        torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_the_librarys_capture_hooks_are_never_installed(make_model, ids):
    model = make_model("llama")
    with tap_blocks(model, dtype=torch.float32), skip_blocks(model, {1}):
        logits(model, ids)
    find_sublayers(model)
    keep_blocks(model, (0, 2, 5))
    logits(model, ids)
    assert not any(
        getattr(module, "_output_capturing_hooks_installed", False) for module in model.modules()
    )
    assert not any(module._forward_hooks for module in find_blocks(model))
