"""Tapped states against truncated models and independent hooks."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.taps import tap_blocks


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


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gemma3n_text"])
def test_only_the_chosen_positions_are_kept(name, make_model, ids):
    model = make_model(name)
    positions = torch.tensor([8, 3])
    with tap_blocks(model) as everything, tap_blocks(model) as tap:
        tap.positions = positions
        model(ids)
        for kept, state in zip(tap.states, everything.states, strict=True):
            assert torch.equal(kept, state[..., [0, 1], positions, :])
        assert tap.states[0].shape[-2:] == (2, 32)
        tap.positions = None
        model(ids)
        assert torch.equal(tap.states[3], everything.states[3])


@torch.no_grad()
def test_states_in_float32(make_model, ids):
    model = make_model("llama").bfloat16()
    with tap_blocks(model, dtype=torch.float32) as tap, tap_blocks(model) as raw:
        model(ids)
        assert all(state.dtype == torch.float32 for state in tap.states)
        assert all(state.dtype == torch.bfloat16 for state in raw.states)
        assert torch.equal(tap.states[6], raw.states[6].float())


@torch.no_grad()
def test_a_consumer_gets_each_state_in_order_and_nothing_is_stored(make_model, ids):
    model, taken = make_model("llama"), []
    with (
        tap_blocks(model) as stored,
        tap_blocks(model, consume=lambda k, state: taken.append((k, state))) as tap,
    ):
        model(ids)
        model(ids[:, :4])
        assert [k for k, _ in taken] == [*range(7), *range(7)]
        assert all(
            torch.equal(state, kept)
            for (_, state), kept in zip(taken[7:], stored.states, strict=True)
        )
        with pytest.raises(RuntimeError, match="handed to the tap's consumer"):
            _ = tap.states


@torch.no_grad()
def test_a_consumer_that_missed_a_block_is_told(make_model, ids):
    def run(model, depths):
        with tap_blocks(model, consume=lambda *_: None):
            for depth in depths:
                model.config.num_hidden_layers = depth  # Llama obeys this one without being cut
                model(ids)
                passes.append(depth)

    passes = []
    with pytest.raises(RuntimeError, match=r"blocks \[4, 5\] did not"):
        run(make_model("llama"), [6, 4])
    assert passes == [6, 4]  # told on leaving
    with pytest.raises(RuntimeError, match=r"blocks \[4, 5\] did not"):
        run(make_model("llama"), [4, 6])
    assert passes == [6, 4, 4]  # or when the next pass begins


@torch.no_grad()
def test_a_compiled_model_is_tapped(make_model, ids):
    model = make_model("llama")
    with tap_blocks(model) as tap:
        model(ids)
        expected = tap.states
    compiled = torch.compile(model, backend="eager")
    compiled(ids)
    with tap_blocks(compiled) as tap:
        compiled(ids)
        assert all(torch.equal(a, b) for a, b in zip(tap.states, expected, strict=True))


def test_gradients_flow_to_the_blocks_before(make_model, ids):
    model = make_model("llama")
    with tap_blocks(model) as tap:
        tap.positions = torch.tensor([8, 8])
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
    with tap_blocks(model, consume=lambda *call: calls.append(call)):
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == 7


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
    with tap_blocks(model) as tap, tap_blocks(model) as inner:
        inner.positions = torch.tensor([0, 0])
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
