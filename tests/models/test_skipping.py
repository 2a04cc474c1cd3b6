"""Skipping blocks equals removing them, with and without caches, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, StaticCache

from depthprobe.errors import BadInput
from depthprobe.models import skipping
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.families import family_config
from depthprobe.models.parts import find_sublayers
from depthprobe.models.prompt import cache_argument
from depthprobe.models.skipping import after_blocks, skip_blocks
from depthprobe.models.taps import tap_blocks
from depthprobe.models.tiny import tiny_model

SKIPS = [{0, 3}, {2, 5}]


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def footprint(model):
    """Everything that skipping might touch: attributes and hooks of every module, and weights."""
    return [
        (name, sorted(vars(module)), len(module._forward_hooks), vars(module).get("forward"))
        for name, module in model.named_modules()
    ], {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("part", ["block", "attention", "mlp"])
def test_cache_made_under_the_same_skip(family, part, make_model, ids):
    model = make_model(family)
    for skipped in SKIPS:
        with skip_blocks(model, skipped, part=part):
            expected = model(ids, use_cache=False).logits
            prefix = model(ids[:, :5], use_cache=True)
            steps = [prefix.logits]
            for piece in (ids[:, 5:8], ids[:, 8:]):
                cache = {cache_argument(model): prefix.past_key_values}
                steps.append(model(piece, **cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("skipped", [{0}, {0, 1}, {1, 4}], ids=str)
def test_shared_prefix_with_padding_and_mask(skipped, make_model, ids):
    model = make_model("llama")
    cut = keep_blocks(make_model("llama"), sorted(set(range(6)) - skipped))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0  # the second user is shorter, right-padded
    with skip_blocks(model, skipped):
        cache = model(ids[:1, :4], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        rest = model(ids[:, 4:], **{cache_argument(model): cache}, attention_mask=mask).logits
    same = torch.cat([ids[:1, :4].expand(2, -1), ids[:, 4:]], dim=1)
    expected = logits(cut, same, attention_mask=mask)[:, 4:]
    torch.testing.assert_close(rest[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(rest[1, :3], expected[1, :3], rtol=0, atol=1e-12)


@torch.no_grad()
def test_bare_and_static_caches(make_model, ids):
    model = make_model("llama")
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
        with skip_blocks(model, {0, 3}):
            expected = model(ids, use_cache=False).logits[:, 5:]
            model(ids[:, :5], **{cache_argument(model): cache}, use_cache=True)
            result = model(ids[:, 5:], **{cache_argument(model): cache}, use_cache=True).logits
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_cache_of_another_skip_is_refused(make_model, ids):
    model = make_model("llama")
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with skip_blocks(model, {2}), pytest.raises(ValueError, match="block 2 active"):
        model(ids[:, 5:], **{cache_argument(model): cache})
    with skip_blocks(model, {2}):
        cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(RuntimeError):
        model(ids[:, 5:], **{cache_argument(model): cache})


@torch.no_grad()
def test_recurrent_block_is_skipped_without_a_filled_cache_only(make_model, ids):
    model = make_model("qwen3_next")
    cut = keep_blocks(make_model("qwen3_next"), [1, 2, 3, 4, 5])
    with skip_blocks(model, {0}):
        first = model(ids, use_cache=True)
        with pytest.raises(ValueError, match="block 0 is recurrent"):
            model(ids, **{cache_argument(model): first.past_key_values})
    assert torch.equal(first.logits, logits(cut, ids))


@torch.no_grad()
def test_two_mixers_of_a_block_share_one_layer_of_the_cache(ids):
    model = tiny_model(family_config("falcon_h1"), depth=2)  # attention beside a recurrence
    with skip_blocks(model, {0}, part="attention"):
        expected = logits(model, ids)
        torch.testing.assert_close(model(ids, use_cache=True).logits, expected)


def test_generate_under_skip(make_model, ids):
    model = make_model("gemma3_text")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = keep_blocks(make_model("gemma3_text"), [1, 3, 4, 5]).generate(ids, **options)
    with skip_blocks(model, {0, 2}):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_restores_after_exceptions(name, make_model, ids):
    model = make_model(name)
    before, weights = footprint(model)
    with pytest.raises(KeyError), skip_blocks(model, {1, 2}):
        raise KeyError
    with pytest.raises(IndexError), skip_blocks(model, {1, 2}):
        model(torch.tensor([[10_000]]))
    after, unchanged = footprint(model)
    assert after == before
    assert all(torch.equal(weights[key], unchanged[key]) for key in weights)


def test_restores_a_forward_that_was_already_replaced(make_model, ids):
    model = make_model("llama")
    block = find_blocks(model)[1]
    original = block.forward
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = counted
    with skip_blocks(model, {1}):
        logits(model, ids)
        assert not calls
    logits(model, ids)
    assert block.forward is counted
    assert calls == [1]


def test_nested_is_the_union(make_model, ids):
    model = make_model("llama")
    whole = logits(model, ids)
    with skip_blocks(model, {1, 2}):
        outer = logits(model, ids)
        with skip_blocks(model, {2, 4}):
            inner = logits(model, ids)
        assert torch.equal(logits(model, ids), outer)
    assert torch.equal(logits(model, ids), whole)
    assert torch.equal(inner, logits(keep_blocks(make_model("llama"), [0, 3, 5]), ids))
    assert torch.equal(outer, logits(keep_blocks(make_model("llama"), [0, 3, 4, 5]), ids))


def test_all_and_none(make_model, ids):
    model = make_model("llama")
    whole = logits(model, ids)
    with skip_blocks(model, []):
        assert torch.equal(logits(model, ids), whole)
    with skip_blocks(model, range(6)), torch.no_grad():
        expected = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
        assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("part", ["block", "attention", "mlp"])
def test_under_peft(part, make_model, ids):
    for name, targets in (("llama", ["q_proj", "down_proj"]), ("bloom", ["dense"])):
        lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(make_model(name), lora).double().eval()
        merged = copy.deepcopy(model).merge_and_unload()
        with skip_blocks(model, {2, 3}, part=part), skip_blocks(merged, {2, 3}, part=part):
            torch.testing.assert_close(logits(model, ids), logits(merged, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", ["block", "attention"])
def test_training_under_a_skip_with_checkpointing(part, make_model, ids):
    gradients = []
    for checkpointing in (False, True):
        model = make_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with skip_blocks(model, {2}, part=part):
            model(ids, labels=ids, use_cache=False).loss.backward()
        skipped = find_blocks(model)[2]
        assert all(p.grad is None for p in skipped.self_attn.parameters())
        assert all((p.grad is None) == (part == "block") for p in skipped.mlp.parameters())
        gradients.append(find_blocks(model)[0].mlp.up_proj.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_learning_the_output_type_leaves_no_trace(make_model, ids, monkeypatch):
    monkeypatch.setattr(skipping, "_extra_outputs", {})
    model = make_model("falcon").train()
    torch.manual_seed(5)
    with tap_blocks(model) as tap:
        model(ids)
        states = tap.states
        state = torch.get_rng_state()
        with skip_blocks(model, {0}):
            assert torch.equal(torch.get_rng_state(), state)
        assert all(a is b for a, b in zip(tap.states, states, strict=True))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("skipped", [{6}, {-1}, {"1"}, {0.5}, 3], ids=repr)
def test_bad_indices(skipped, make_model):
    with (
        pytest.raises(BadInput, match="skip.*from 0 to 5"),
        skip_blocks(make_model("llama"), skipped),
    ):
        pass


def test_source_of_shared_keys_is_refused(make_model, ids):
    model = make_model("gemma3n_text")
    with pytest.raises(ValueError, match="later blocks read"), skip_blocks(model, {1, 3}):
        pass
    with skip_blocks(model, {0}):
        assert logits(model, ids).isfinite().all()


def test_after_blocks_is_differentiable_and_keeps_taps(make_model, ids):
    model = make_model("opt")
    with tap_blocks(model) as tap:
        model(ids, use_cache=False)
        states = tap.states
        last = [state[:, -1:] for state in states]
        hidden = after_blocks(model, last[2])
        assert tap.states[0] is states[0]
    assert hidden.shape == (2, 1, 16)
    hidden.sum().backward()
    used = [find_blocks(model)[i].fc1.weight.grad is not None for i in range(6)]
    assert used == [True, True, False, False, False, False]


# Under what else wraps a model: autocast, accelerate, torch.compile.

WRAPPED = [({1, 4}, "block"), ({0, 3}, "attention"), ({0, 3}, "mlp")]


@pytest.mark.parametrize(("skipped", "part"), WRAPPED)
def test_under_autocast(skipped, part, make_model, ids):
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


@pytest.mark.parametrize(("skipped", "part"), WRAPPED)
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
@pytest.mark.parametrize(("skipped", "part"), WRAPPED)
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
    [
        ({1}, "block"),
        *(pytest.param({0, 2}, part, marks=pytest.mark.slow) for part in ("attention", "mlp")),
    ],
)
def test_compiled(skipped, part, make_model, ids):
    model = keep_blocks(make_model("llama"), range(3))  # each is compiled seven times
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
