"""Similarities equal naive loops over users, and find what was planted."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.evaluate import BATCH, Questions, evaluate
from depthprobe.models import skipping
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model
from depthprobe.probing import similarity
from depthprobe.probing.passes import passes
from depthprobe.probing.similarity import Similarities, similarities, to_frame

CPU = torch.device("cpu")
VALUES = [field.name for field in fields(Similarities)]

# where a family's attention and MLP end: what its block adds to the stream
ENDS = {
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),  # both read the block's input
    "mixtral": ("self_attn", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "granite": ("self_attn", "mlp"),  # times a factor
}
FACTOR = 0.3


def some(asked: Questions, users: int) -> Questions:
    return ask(asked, np.arange(users))


def ask(asked: Questions, chosen: np.ndarray) -> Questions:
    histories = [asked.histories[i] for i in chosen]
    return Questions(asked.users[chosen], histories, asked.targets[chosen], None, None)


def tiny(family: str, *, suffix: Iterable[int] = (), **changes: Any) -> Recommender:
    torch.manual_seed(0)
    model = tiny_model(CONFIG_MAPPING[family](**changes), depth=4)
    return Recommender(model, torch.randn(41, 6), (3, 1, 2), suffix=list(suffix)).double().eval()


def first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@torch.no_grad()
def run_alone(model: Recommender, history: np.ndarray, watched: dict[str, nn.Module]) -> Any:
    """One user's whole sequence, prompt included, without a cache: last outputs by name, (D,)."""
    tokens = model.token_embeddings
    parts = [tokens(model.prompt), model.input_adapter(model.items(torch.as_tensor(history)))]
    sequence = torch.cat([*parts, tokens(model.suffix)])[None].to(model.backbone.dtype)
    found: dict[str, np.ndarray] = {}

    def keep(name: str, state: Tensor) -> None:
        found[name] = state.reshape(-1, state.shape[-1])[-1].double().numpy().copy()

    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: keep(name, first(out)))
        for name, module in watched.items()
    ]
    block = find_blocks(model.backbone)[0]
    handles.append(block.register_forward_pre_hook(lambda _, args: keep("input", args[0])))
    model.backbone(
        inputs_embeds=sequence,
        position_ids=torch.arange(sequence.shape[1])[None],
        use_cache=False,
    )
    for handle in handles:
        handle.remove()
    return found


def cut_states(teacher: Recommender, asked: Questions) -> np.ndarray:
    """Each user's states (E, L + 1, D): the last outputs of models that were really truncated."""
    depth = teacher.depth
    cuts = [copy.deepcopy(teacher) for _ in range(depth)]
    for kept, cut in enumerate(cuts, 1):
        keep_blocks(cut.backbone, range(kept))
    ends = [{"last": find_blocks(cut.backbone)[-1]} for cut in cuts]
    states = []
    for history in asked.histories:
        runs = [run_alone(cut, history, end) for cut, end in zip(cuts, ends, strict=True)]
        states.append([runs[0]["input"], *(run["last"] for run in runs)])
    return np.array(states)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return math.fsum(x * y) / math.sqrt(math.fsum(x * x) * math.fsum(y * y))


def direct_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    own = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / own)


def all_cka(states: np.ndarray) -> np.ndarray:
    each = range(states.shape[1])
    return np.array([[direct_cka(states[:, i], states[:, j]) for j in each] for i in each])


def check_states(found: Similarities, states: np.ndarray) -> None:
    """Hold all that is about states (E, L + 1, D) against loops over users."""
    users, depths, _ = states.shape
    norms, influence, angular = np.zeros(depths), np.zeros(depths - 1), np.zeros((depths, depths))
    for user in states:
        for i in range(depths):
            norms[i] += math.sqrt(math.fsum(user[i] ** 2)) / users
            if i < depths - 1:
                influence[i] += (1 - cosine(user[i], user[i + 1])) / users
            for j in range(depths):
                if i != j:
                    angular[i, j] += math.acos(min(1, cosine(user[i], user[j]))) / math.pi / users
    np.testing.assert_allclose(found.norms, norms, rtol=1e-9)
    np.testing.assert_allclose(found.influence, influence, rtol=1e-8)
    np.testing.assert_allclose(found.angular, angular, rtol=1e-8)


def check_parts(found: Similarities, teacher: Recommender, asked: Questions, family: str) -> None:
    blocks = find_blocks(teacher.backbone)
    attention, mlp = np.zeros(len(blocks)), np.zeros(len(blocks))
    watched: dict[str, nn.Module] = {f"out{i}": block for i, block in enumerate(blocks)}
    for i, block in enumerate(blocks):
        watched |= {f"{end}{i}": block.get_submodule(end) for end in ENDS[family]}
    factor = FACTOR if family == "granite" else 1
    for history in asked.histories:
        run = run_alone(teacher, history, watched)
        x = run["input"]
        for i in range(len(blocks)):
            middle = x + factor * run[f"{ENDS[family][0]}{i}"]
            after = middle + factor * run[f"{ENDS[family][1]}{i}"]
            attention[i] += (1 - cosine(x, middle)) / len(asked.users)
            mlp[i] += (1 - cosine(middle, after)) / len(asked.users)
            x = run[f"out{i}"]
            np.testing.assert_allclose(after, x, rtol=1e-9, atol=1e-9 * np.abs(x).max())
    np.testing.assert_allclose(found.attention, attention, rtol=1e-8)
    np.testing.assert_allclose(found.mlp, mlp, rtol=1e-8)


def check_equal(found: Similarities, expected: Similarities) -> None:
    for name in VALUES:
        one, other = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14, err_msg=name)


def test_naive_loops(
    teacher: Recommender, asked: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = some(asked, 40)
    monkeypatch.setattr(similarity, "BATCH", 16)
    monkeypatch.setattr(similarity, "ROWS", 7)
    found = similarities(teacher, asked, device=CPU)
    states = cut_states(teacher, asked)
    check_states(found, states)
    check_parts(found, teacher, asked, "llama")
    assert found.cka_users == 40
    np.testing.assert_allclose(found.cka, all_cka(states), rtol=1e-9)
    assert (found.influence > 0.001).all()
    assert found.cka[np.triu_indices(6, 1)].max() < 0.999


@pytest.mark.parametrize("family", ENDS)
def test_families(family: str, asked: Questions) -> None:
    asked = some(asked, 12)
    teacher = tiny(family, **({"residual_multiplier": FACTOR} if family == "granite" else {}))
    found = similarities(teacher, asked, device=CPU)
    states = cut_states(teacher, asked)
    check_states(found, states)
    check_parts(found, teacher, asked, family)
    np.testing.assert_allclose(found.cka, all_cka(states), rtol=1e-9)


@pytest.mark.parametrize("cka_users", [2048, 90])
def test_cka_of_a_sample(teacher: Recommender, asked: Questions, cka_users: int) -> None:
    found = similarities(teacher, asked, device=CPU, cka_users=cka_users)
    states = np.zeros((300, 6, 16))
    with torch.inference_mode():
        for batch in passes(teacher, asked, device=CPU, batch_size=100):
            states[batch.chosen] = batch.states.transpose(0, 1).numpy()
    check_states(found, states)  # of all users, whatever the sample is
    assert found.cka_users == min(300, cka_users)
    sample = states[np.random.default_rng(0).permutation(300)[:cka_users]]
    np.testing.assert_allclose(found.cka, all_cka(sample), rtol=1e-9)
    np.testing.assert_array_equal(found.cka, found.cka.T)


def test_an_identity_block(teacher: Recommender, asked: Questions) -> None:
    block = teacher.backbone.layers[2]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    found = similarities(teacher, asked, device=CPU)
    others = [0, 1, 3, 4]
    for values in (found.influence, found.attention, found.mlp):
        assert abs(values[2]) < 1e-14
        assert (values[others] > 1e-3).all()
    # no closer: the arc cosine of 1 minus a rounding error
    assert found.angular[2, 3] < 3e-8
    assert (found.angular[others, [1, 2, 4, 5]] > 0.01).all()
    assert found.cka[2, 3] == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found.cka[2], found.cka[3], rtol=1e-12)


def test_a_block_that_turns_back(teacher: Recommender, asked: Questions) -> None:
    teacher.backbone.layers[1].register_forward_hook(lambda _, args, out: -args[0])
    found = similarities(teacher, asked, device=CPU)
    assert found.influence[1] == pytest.approx(2, abs=1e-12)
    assert found.angular[1, 2] == pytest.approx(1, abs=1e-7)
    assert found.cka[1, 2] == pytest.approx(1, abs=1e-12)
    assert found.norms[1] == pytest.approx(found.norms[2], rel=1e-12)
    # no longer what its parts add up to
    assert np.isnan(found.attention[1])
    assert np.isnan(found.mlp[1])
    assert np.isfinite(found.mlp[[0, 2, 3, 4]]).all()


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_any_batch_size(
    teacher: Recommender, asked: Questions, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    asked = some(asked, 60)
    expected = similarities(teacher, asked, device=CPU, cka_users=50)
    monkeypatch.setattr(similarity, "BATCH", batch)
    check_equal(similarities(teacher, asked, device=CPU, cka_users=50), expected)


def test_any_order_of_users(teacher: Recommender, asked: Questions) -> None:
    order = np.random.default_rng(1).permutation(300)
    expected = similarities(teacher, asked, device=CPU)
    check_equal(similarities(teacher, ask(asked, order), device=CPU), expected)


def test_bfloat16_is_compared_in_float64(teacher: Recommender, asked: Questions) -> None:
    with torch.no_grad():
        for weight in (teacher.backbone.layers[2].mlp, teacher.backbone.layers[2].self_attn):
            for matrix in weight.parameters():
                matrix.mul_(0.3)
    teacher = teacher.to(torch.bfloat16)
    asked = some(asked, BATCH)  # one batch: in bfloat16 its shape may matter
    found = similarities(teacher, asked, device=CPU)
    ends: dict[str, Tensor] = {}
    handles = [
        block.get_submodule(end).register_forward_hook(
            lambda _, __, out, name=f"{end}{i}": ends.update({name: first(out)})
        )
        for i, block in enumerate(teacher.backbone.layers)
        for end in ENDS["llama"]
    ]
    (batch,) = asked.batches(BATCH, CPU)
    with torch.no_grad():
        (one,) = passes(teacher, asked, device=CPU)
        teacher.encode(*batch[1:], teacher.prepare_prompt())
    for handle in handles:
        handle.remove()
    states = one.states.detach()
    exact = states.double().transpose(0, 1).numpy()
    check_states(found, exact)
    # kept in float32
    np.testing.assert_allclose(found.cka, all_cka(exact), rtol=1e-5)
    rows = torch.arange(len(batch[2])), batch[2] - 1
    for i in range(5):
        x, a, m = states[i], ends[f"self_attn{i}"][rows], ends[f"mlp{i}"][rows]
        x, a, m = (each.detach().double().numpy() for each in (x, a, m))
        turned = [
            (1 - cosine(u, u + v), 1 - cosine(u + v, u + v + w))
            for u, v, w in zip(x, a, m, strict=True)
        ]
        expected = np.mean(turned, axis=0)
        np.testing.assert_allclose([found.attention[i], found.mlp[i]], expected, rtol=1e-8)
    rounded = torch.cosine_similarity(states[2], states[3], dim=-1)
    naive = float((1 - rounded).double().mean())
    assert abs(naive / found.influence[2] - 1) > 0.1


def test_a_suffix_that_all_users_share(asked: Questions) -> None:
    asked = some(asked, 30)
    teacher = tiny("llama", suffix=(4, 5))
    found = similarities(teacher, asked, device=CPU)
    states = cut_states(teacher, asked)
    check_states(found, states)
    check_parts(found, teacher, asked, "llama")
    assert np.isnan(found.cka[0]).all()
    assert np.isnan(found.cka[:, 0]).all()
    np.testing.assert_allclose(found.cka[1:, 1:], all_cka(states[:, 1:]), rtol=1e-9)


def test_one_user(teacher: Recommender, asked: Questions) -> None:
    asked = some(asked, 1)
    found = similarities(teacher, asked, device=CPU)
    check_states(found, cut_states(teacher, asked))
    check_parts(found, teacher, asked, "llama")
    assert found.cka_users == 1
    assert np.isnan(found.cka).all()


def test_the_first_model_of_its_kind(
    teacher: Recommender, asked: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = similarities(teacher, asked, device=CPU)
    # then the read-out runs a block more, to learn what it returns
    monkeypatch.setattr(skipping, "_extra_outputs", {})
    check_equal(similarities(teacher, asked, device=CPU), expected)


def test_blocks_without_an_mlp(asked: Questions) -> None:
    found = similarities(tiny("mamba", num_hidden_layers=4), some(asked, 12), device=CPU)
    assert np.isnan(found.mlp).all()
    # all that such a block does is its only part; that runs in float32
    np.testing.assert_allclose(found.attention, found.influence, rtol=1e-4)


def test_blocks_that_are_no_sum(asked: Questions) -> None:
    asked = some(asked, 12)
    teacher = tiny("opt", do_layer_norm_before=False)
    found = similarities(teacher, asked, device=CPU)
    assert np.isnan(found.attention).all()
    assert np.isnan(found.mlp).all()
    assert np.isfinite(found.influence).all()
    assert (found.influence > 0).all()


def test_to_frame(teacher: Recommender, asked: Questions) -> None:
    found = similarities(teacher, asked, device=CPU)
    expected: list[tuple[str, int, int, float]] = []
    for k in range(5):
        expected.append(("block-influence", k, k + 1, found.influence[k]))
        expected.append(("attention-influence", k, k + 1, found.attention[k]))
        expected.append(("mlp-influence", k, k + 1, found.mlp[k]))
    for start in range(6):
        expected.append(("norm", start, start, found.norms[start]))
        for end in range(start + 1, 6):
            expected.append(("angular-distance", start, end, found.angular[start, end]))
            expected.append(("cka", start, end, found.cka[start, end]))
    frame = to_frame(found)
    assert list(frame.columns) == ["score", "start", "end", "value"]
    assert list(frame.index) == list(range(len(frame)))
    assert sorted(frame.itertuples(index=False, name=None)) == sorted(expected)


def check_untouched(teacher: Recommender) -> None:
    assert not any("forward" in vars(module) for module in teacher.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_leaves_the_model_as_it_was(teacher: Recommender, asked: Questions) -> None:
    before = evaluate(teacher, asked, device=CPU)["full"]
    similarities(teacher, asked, device=CPU)
    np.testing.assert_array_equal(evaluate(teacher, asked, device=CPU)["full"], before)
    check_untouched(teacher)


@pytest.mark.parametrize("calls", range(1, 5))
def test_leaves_the_model_as_it_was_after_a_failure(
    teacher: Recommender, asked: Questions, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    encode, left = teacher.encode, [calls]

    def fail(*args: Any) -> Tensor:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("out of memory")
        return encode(*args)

    monkeypatch.setattr(teacher, "encode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        similarities(teacher, asked, device=CPU)
    check_untouched(teacher)


def test_no_questions(teacher: Recommender, asked: Questions) -> None:
    nobody = replace(asked, users=asked.users[:0], histories=[])
    with pytest.raises(ValueError, match="no questions to compare"):
        similarities(teacher, nobody, device=CPU)
    check_untouched(teacher)
