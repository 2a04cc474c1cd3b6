"""Similarities against a decoder written out by hand, and against what is planted in a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models import skipping
from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.taps import tap_blocks
from depthprobe.models.tiny import tiny_model
from depthprobe.probing import similarity
from depthprobe.probing.similarity import Similarities, similarities, to_frame

CPU = torch.device("cpu")
ARRAYS = ("influence", "angular", "cka", "norms", "attention", "mlp")
Draw = Callable[[int, int], EvalSet]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def turn(one: Tensor, other: Tensor) -> float:
    """Mean of 1 - cos over users, (B, D)."""
    return float(1 - torch.cosine_similarity(one, other, dim=-1).mean())


def linear_cka(one: np.ndarray, other: np.ndarray) -> float:
    """From the definition, with users in rows."""
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    size = np.linalg.norm(one.T @ one) * np.linalg.norm(other.T @ other)
    return float(np.linalg.norm(other.T @ one) ** 2 / size)


def assert_alike(one: Similarities, other: Similarities, *, atol: float) -> None:
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=atol)


@torch.no_grad()
def by_hand(teacher: Recommender, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One user's states (L + 1, D), and between attention and MLP (L, D), at the last position."""
    inner: Any = teacher.backbone
    items = teacher.input_adapter(teacher.items(torch.from_numpy(history)))
    state = torch.cat([inner.embed_tokens(teacher.prompt), items])[None]  # (1, P + T, D)
    tokens = state.shape[1]
    rotary = inner.rotary_emb(state, torch.arange(tokens)[None])
    mask = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    states, between = [state], []
    for block in inner.layers:
        attended, _ = block.self_attn(
            hidden_states=block.input_layernorm(state),
            position_embeddings=rotary,
            attention_mask=mask,
        )
        between.append(state + attended)
        state = between[-1] + block.mlp(block.post_attention_layernorm(between[-1]))
        states.append(state)
    return (
        np.stack([each[0, -1].numpy() for each in states]),
        np.stack([each[0, -1].numpy() for each in between]),
    )


def test_against_a_decoder_written_by_hand(teacher: Recommender, few: EvalSet) -> None:
    found = similarities(teacher, few, device=CPU)
    pairs = [by_hand(teacher, history) for history in few.histories]
    states = np.stack([pair[0] for pair in pairs], axis=1)  # (L + 1, B, D)
    between = np.stack([pair[1] for pair in pairs], axis=1)  # (L, B, D)
    for block in range(5):
        for value, one, other in (
            (found.influence[block], states[block], states[block + 1]),
            (found.attention[block], states[block], between[block]),
            (found.mlp[block], between[block], states[block + 1]),
        ):
            expected = 1 - np.mean([cosine(*rows) for rows in zip(one, other, strict=True)])
            assert value == pytest.approx(expected, abs=1e-12)
            assert 1e-4 < value < 2
    for low in range(6):
        sizes = np.linalg.norm(states[low], axis=1)
        assert found.norms[low] == pytest.approx(np.mean(sizes), rel=1e-12)
        assert found.angular[low, low] == 0
        for high in range(low + 1, 6):
            rows = zip(states[low], states[high], strict=True)
            angles = [np.arccos(cosine(*pair)) / np.pi for pair in rows]
            assert found.angular[low, high] == pytest.approx(np.mean(angles), abs=1e-12)
            expected = linear_cka(states[low], states[high])
            assert found.cka[low, high] == pytest.approx(expected, abs=1e-12)
    for matrix in (found.angular, found.cka):
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-15)
    np.testing.assert_allclose(found.cka.diagonal(), 1, atol=1e-12)
    assert found.cka_users == 30


def test_batches_order_and_the_first_of_a_kind_make_no_difference(
    teacher: Recommender, eval_set: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = similarities(teacher, eval_set, device=CPU)
    assert_alike(similarities(teacher, eval_set, device=CPU, batch_size=60), usual, atol=1e-12)
    order = np.random.default_rng(1).permutation(300)
    mixed = replace(
        eval_set, users=eval_set.users[order], histories=[eval_set.histories[u] for u in order]
    )
    assert_alike(similarities(teacher, mixed, device=CPU), usual, atol=1e-12)
    # then the read-out runs a block more, to learn what it returns
    monkeypatch.setattr(skipping, "_extra_outputs", {})
    assert_alike(similarities(teacher, eval_set, device=CPU), usual, atol=0)


def test_cka_of_a_sample_in_constant_memory(
    plain: Recommender, eval_set: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, sizes = similarity._Sample.put, []

    def watched(self: Any, *args: Any) -> None:
        put(self, *args)
        sizes.append(self._states.numel())

    monkeypatch.setattr(similarity._Sample, "put", watched)
    found = similarities(plain, eval_set, device=CPU, cka_users=60, batch_size=50)
    assert sizes == [6 * 60 * 16] * 6
    assert found.cka_users == 60
    chosen = np.random.default_rng(0).permutation(300)[:60]
    states = np.stack([by_hand(plain, eval_set.histories[user])[0] for user in chosen])
    for low, high in ((0, 5), (1, 3), (4, 5)):
        expected = linear_cka(states[:, low], states[:, high])
        assert found.cka[low, high] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("users", "width"), [(300, 5), (40, 30)])
def test_cka_against_its_definition(users: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(users, width, generator=generator, dtype=torch.float64) + 3
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator).double())[0]
    noise = torch.randn(users, width, generator=generator, dtype=torch.float64)
    states = torch.stack([state, 1e12 * state @ rotation - 7, state + noise, 1e-9 * noise])
    sample = similarity._Sample(users, users)
    for part in (slice(0, 10), slice(10, None)):
        sample.put(np.arange(users)[part], states[:, part])
    cka = sample.cka()
    expected = [[linear_cka(a.numpy(), b.numpy()) for a in states] for b in states]
    np.testing.assert_allclose(cka, expected, atol=1e-12)
    assert cka[0, 1] == pytest.approx(1, abs=1e-12)  # blind to rotation, scale and place
    assert cka[0, 3] < cka[0, 2] < 1


def test_a_state_that_all_users_share_has_no_cka(
    llama_config: Callable[..., LlamaConfig], eval_set: EvalSet
) -> None:
    backbone = LlamaForCausalLM(llama_config(num_hidden_layers=3))
    model = Recommender(backbone, torch.randn(41, 6), (3,), suffix=(4, 5)).eval()
    found = similarities(model, eval_set, device=CPU)
    assert np.isnan(found.cka[0]).all()
    assert np.isnan(found.cka[:, 0]).all()
    np.testing.assert_allclose(found.cka[1:, 1:].diagonal(), 1, atol=1e-5)
    assert np.isfinite(found.cka[1:, 1:]).all()
    assert np.isfinite(found.angular).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_state_that_differs_by_rounding_alone_has_no_cka(dtype: torch.dtype) -> None:
    shared = (torch.rand(5, dtype=torch.float64) + 0.1).to(dtype).expand(50, 5)
    sample = similarity._Sample(50, 50)
    sample.put(np.arange(50), torch.stack([shared, torch.randn(50, 5, dtype=dtype)]))
    cka = sample.cka()
    assert np.isnan(cka[0]).all()
    assert cka[1, 1] == pytest.approx(1)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "falcon": {},  # attention and MLP read the same state, and one is added to the other in place
    "opt": {},
    "gemma2": {},  # a norm behind each
    "granite": {"residual_multiplier": 0.3},
}
SLOW: dict[str, dict[str, Any]] = {
    "gpt_neox": {},  # attention and MLP read the same state
    "bloom": {},  # their last modules add the stream inside
    "mpt": {},  # a dropout behind
    "olmo2": {},  # a norm behind each, none before
    "mixtral": {},
    "llama4_text": {},  # experts that return a flattened batch
    "qwen3_next": {},  # two kinds of blocks
    "cohere": {},
}
SMALL = {"bloom": {"n_layer": 4}, "mamba": {"num_hidden_layers": 4}}


def recommender(family: str, prompt: tuple[int, ...] = (), **changes: Any) -> Recommender:
    torch.manual_seed(0)
    backbone = tiny_model(CONFIG_MAPPING[family](**SMALL.get(family, {}) | changes), depth=4)
    return Recommender(backbone, torch.randn(41, 6), prompt).to(backbone.dtype).eval()


@torch.no_grad()
def states_of(model: Recommender, eval_set: EvalSet, without_mlp: int | None = None) -> Tensor:
    """States (L + 1, B, D) of one batch, maybe with the MLP of a block left out."""
    skipped = set() if without_mlp is None else {without_mlp}
    ((_, histories, lengths),) = eval_set.batches(device=CPU)
    with skip_blocks(model.backbone, skipped, part="mlp"), tap_blocks(model.backbone) as tap:
        prompt = model.prepare_prompt()
        tap.positions = model.last_place(histories, lengths)
        model.encode(histories, lengths, prompt)
        return torch.stack(tap.states).double()


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
)
def test_parts_against_blocks_without_their_mlp(family: str, draw: Draw) -> None:
    model, users = recommender(family, (3, 1), **(FAMILIES | SLOW)[family]), draw(12, 0)
    found = similarities(model, users, device=CPU)
    states = states_of(model, users)
    tolerance = 1e-9 if model.backbone.dtype == torch.float64 else 1e-5
    for block in range(model.depth):
        between = states_of(model, users, without_mlp=block)[block + 1]
        attention, mlp = turn(states[block], between), turn(between, states[block + 1])
        assert found.attention[block] == pytest.approx(attention, abs=tolerance)
        assert found.mlp[block] == pytest.approx(mlp, abs=tolerance)
        assert min(found.attention[block], found.mlp[block]) > 1e-7


def test_a_block_of_one_part(few: EvalSet) -> None:
    found = similarities(recommender("mamba"), few, device=CPU)
    np.testing.assert_allclose(found.attention, found.influence, atol=1e-12)
    assert np.isnan(found.mlp).all()


def test_blocks_that_are_no_sums_have_no_parts(few: EvalSet) -> None:
    found = similarities(recommender("bert", is_decoder=True), few, device=CPU)
    assert np.isnan(found.attention).all()
    assert np.isnan(found.mlp).all()
    for name in ("influence", "angular", "cka", "norms"):
        assert np.isfinite(getattr(found, name)).all()


def test_what_is_done_to_a_branch_outside_modules_counts(plain: Recommender, few: EvalSet) -> None:
    block: Any = find_blocks(plain.backbone)[2]
    scale = torch.linspace(0.5, 2, 16, dtype=torch.float64)  # one factor a feature: no module

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
        between = hidden_states + attended
        return between + scale * block.mlp(block.post_attention_layernorm(between))

    block.forward = forward
    found = similarities(plain, few, device=CPU)
    states, between = states_of(plain, few), states_of(plain, few, without_mlp=2)[3]
    assert found.mlp[2] == pytest.approx(turn(between, states[3]), abs=1e-12)


def zero_outputs(block: nn.Module) -> None:
    """Zero what a block's branches end in."""
    ends = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")
    weights = [
        parameter
        for name, parameter in block.named_parameters()
        if name.removesuffix(".weight").removesuffix(".bias").endswith(ends)
    ]
    assert weights
    with torch.no_grad():
        for parameter in weights:
            parameter.zero_()


def test_a_planted_reversal(teacher: Recommender, few: EvalSet) -> None:
    usual = similarities(teacher, few, device=CPU)
    blocks = find_blocks(teacher.backbone)
    zero_outputs(blocks[3])
    # a factor on the whole sum: it changes no part's share
    for block, factor in ((blocks[3], -2), (blocks[0], 0.5)):
        block.register_forward_hook(lambda _, __, output, factor=factor: factor * output)
    found = similarities(teacher, few, device=CPU)
    assert found.influence[3] == pytest.approx(2, abs=1e-12)
    assert found.angular[3, 4] == pytest.approx(1, abs=1e-7)
    assert found.cka[3, 4] == pytest.approx(1, abs=1e-12)
    assert found.norms[4] == pytest.approx(2 * found.norms[3], rel=1e-12)
    assert found.norms[1] == pytest.approx(usual.norms[1] / 2, rel=1e-12)
    assert found.mlp[3] == pytest.approx(0, abs=1e-12)
    for name in ("influence", "attention", "mlp"):
        assert getattr(found, name)[0] == pytest.approx(getattr(usual, name)[0], rel=1e-9)


def test_bfloat16_does_not_round_a_small_influence_away(plain: Recommender, few: EvalSet) -> None:
    block: Any = find_blocks(plain.backbone)[2]
    with torch.no_grad():
        block.self_attn.o_proj.weight.mul_(1e-2)
        block.mlp.down_proj.weight.mul_(1e-2)
    exact = similarities(plain, few, device=CPU)
    plain.backbone.bfloat16()
    found = similarities(plain, few, device=CPU)
    states = states_of(plain, few)
    rounded = turn(states[2].bfloat16(), states[3].bfloat16())
    assert rounded == 0 or abs(rounded / exact.influence[2] - 1) > 0.5
    assert found.influence[2] == pytest.approx(turn(states[2], states[3]), rel=1e-6)
    np.testing.assert_allclose(found.attention, exact.attention, rtol=0.1, atol=1e-5)
    np.testing.assert_allclose(found.mlp, exact.mlp, rtol=0.1, atol=1e-5)
    np.testing.assert_allclose(found.norms, exact.norms, rtol=0.01)


@pytest.mark.parametrize("call", range(4))
def test_the_model_is_left_as_it_was_after_an_error_too(
    plain: Recommender, eval_set: EvalSet, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    encode, calls = plain.encode, []
    before = copy.deepcopy(plain.state_dict())

    def failing(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == call:
            raise RuntimeError("a kernel failed")
        return encode(*args)

    monkeypatch.setattr(plain, "encode", failing)
    if call:
        with pytest.raises(RuntimeError, match="a kernel failed"):
            similarities(plain, eval_set, device=CPU)
    else:
        similarities(plain, eval_set, device=CPU)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert not any("forward" in vars(module) for module in plain.modules())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_one_user_in_a_frame(plain: Recommender, draw: Draw) -> None:
    user = draw(1, 0)
    found = similarities(plain, user, device=CPU)
    states, between = by_hand(plain, user.histories[0])
    for block in range(5):
        expected = 1 - cosine(states[block], between[block])
        assert found.attention[block] == pytest.approx(expected, abs=1e-12)
    assert found.cka_users == 1
    assert np.isnan(found.cka).all()
    frame = to_frame(replace(found, cka=np.arange(36.0).reshape(6, 6)))
    assert list(frame.columns) == ["score", "start", "end", "value"]
    assert frame.groupby("score").size().to_dict() == {
        "block-influence": 5,
        "angular-distance": 15,
        "cka": 15,
        "norm": 6,
        "attention-influence": 5,
        "mlp-influence": 5,
    }
    value = frame.set_index(["score", "start", "end"])["value"]
    assert value.index.is_unique
    assert value["block-influence", 4, 5] == found.influence[4]
    assert value["attention-influence", 1, 2] == found.attention[1]
    assert value["mlp-influence", 0, 1] == found.mlp[0]
    assert value["angular-distance", 1, 4] == found.angular[1, 4]
    assert value["cka", 0, 5] == 5
    assert value["norm", 5, 5] == found.norms[5]


def test_no_users_and_other_read_outs_are_refused(plain: Recommender, draw: Draw) -> None:
    class Elsewhere(Recommender):
        def encode(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().encode(*args, **kwargs)

    with pytest.raises(ValueError, match="no users"):
        similarities(plain, draw(0, 0), device=CPU)
    plain.__class__ = Elsewhere
    with pytest.raises(ValueError, match=r"Elsewhere.encode does not return read_out"):
        similarities(plain, draw(4, 0), device=CPU)
