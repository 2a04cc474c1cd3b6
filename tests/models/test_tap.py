"""Tapped states against truncated models and independent hooks."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from depthprobe.models.blocks import find_blocks, keep_blocks
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.tap import tap_blocks


@torch.no_grad()
def test_states_of_every_family(family, make_model, ids):
    model = make_model(family)
    outputs = []
    handles = [
        block.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if type(output) is tuple else output)
        )
        for block in find_blocks(model)
    ]
    with tap_blocks(model) as tap:
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(tap.states) == 7
    assert all(state.shape == (2, 9, 32) for state in tap.states)
    assert all(torch.equal(a, b) for a, b in zip(tap.states[1:], outputs, strict=True))


@torch.no_grad()
def test_first_state_is_the_embedding_and_last_is_before_the_norm(make_model, ids):
    model = make_model("llama")
    with tap_blocks(model) as tap:
        hidden = model.model(ids, use_cache=False).last_hidden_state
    assert torch.equal(tap.states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.model.norm(tap.states[6]), hidden)
    assert not torch.equal(tap.states[6], hidden)


@torch.no_grad()
def test_right_count_after_a_cut(make_model, ids):
    model = make_model("llama")
    model(ids, output_hidden_states=True)  # leaves the library's own hooks behind
    keep_blocks(model, (0, 3))
    with tap_blocks(model) as tap:
        model(ids)
    assert len(tap.states) == 3


def test_select_is_applied_as_produced(make_model, ids):
    shapes = []

    def last(state):
        shapes.append(tuple(state.shape))
        return state[:, -1]

    model = make_model("gpt2")
    with tap_blocks(model, last) as tap:
        model(ids)
    assert shapes == [(2, 9, 32)] * 7
    with tap_blocks(model) as everything:
        model(ids)
    for selected, state in zip(tap.states, everything.states, strict=True):
        assert torch.equal(selected, state[:, -1])


def test_gradients_flow_to_the_blocks_before(make_model, ids):
    model = make_model("llama")
    with tap_blocks(model, lambda state: state[:, -1]) as tap:
        model(ids)
    tap.states[2].square().sum().backward()
    reached = [block.mlp.up_proj.weight.grad is not None for block in find_blocks(model)]
    assert reached == [True, True, False, False, False, False]
    keep_blocks(reference := make_model("llama"), (0, 1))
    with tap_blocks(reference) as other:
        reference(ids)
    other.states[2][:, -1].square().sum().backward()
    torch.testing.assert_close(
        find_blocks(model)[0].mlp.up_proj.weight.grad,
        find_blocks(reference)[0].mlp.up_proj.weight.grad,
        rtol=0,
        atol=1e-12,
    )


def test_with_gradient_checkpointing_each_block_counts_once(make_model, ids):
    model = make_model("llama").train()
    model.gradient_checkpointing_enable()
    calls = []
    with tap_blocks(model, lambda state: calls.append(1) or state) as tap:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 7
    assert len(tap.states) == 7


def test_reset_at_the_next_forward_keeps_what_was_taken(make_model, ids):
    model = make_model("llama")
    with tap_blocks(model) as tap:
        model(ids)
        first = tap.states
        model(ids[:, :3])
        assert tap.states[0].shape == (2, 3, 32)
    assert first[0].shape == (2, 9, 32)
    tap.clear()
    with pytest.raises(RuntimeError, match="has not run"):
        _ = tap.states


def test_block_that_did_not_run_is_named(make_model, ids):
    model = make_model("llama")
    with tap_blocks(model) as tap:
        with pytest.raises(RuntimeError, match="has not run"):
            _ = tap.states
        model(ids)
        assert len(tap.states) == 7
        model.config.num_hidden_layers = 4  # Llama obeys this one without being cut
        model(ids)
        with pytest.raises(RuntimeError, match=r"5 states instead of 7: blocks \[4, 5\] did not"):
            _ = tap.states


def test_hooks_are_removed_also_after_an_exception(make_model, ids):
    model = make_model("llama")
    with pytest.raises(IndexError), tap_blocks(model):
        model(torch.tensor([[10_000]]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in find_blocks(model))


def test_skipped_blocks_repeat_their_input_and_taps_nest(make_model, ids):
    model = make_model("bloom")
    with tap_blocks(model) as tap, tap_blocks(model, lambda s: s[:, 0]) as inner:
        with skip_blocks(model, {2}):
            model(ids)
        assert torch.equal(tap.states[2], tap.states[3])
        assert not torch.equal(tap.states[1], tap.states[2])
        assert torch.equal(inner.states[6], tap.states[6][:, 0])


def test_under_peft(make_model, ids):
    model = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with tap_blocks(model) as tap:
        model(ids)
    assert len(tap.states) == 7
