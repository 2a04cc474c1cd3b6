"""The fitted maps against least squares on stacked states, and what is left against hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.parts import find_projection
from depthprobe.models.recommender import Recommender
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.tiny import tiny_model
from depthprobe.probing.replace import (
    Activations,
    Replacement,
    cosine_distance,
    descend,
    fit_cosine,
    fit_replacements,
    fold_map,
)

CPU = torch.device("cpu")
SPANS = [(1, 2), (1, 4), (2, 3), (2, 5), (4, 5)]
Draw = Callable[[int, int], EvalSet]


def make(
    family: str, prompt: tuple[int, ...] = (), *, depth: int = 4, **changes: Any
) -> Recommender:
    changes |= {"bloom": {"n_layer": 4}}.get(family, {})
    torch.manual_seed(0)
    model = tiny_model(CONFIG_MAPPING[family](**changes), depth=depth)
    return Recommender(model, torch.randn(41, 6), prompt).double().eval()


def encode_each(model: Recommender, eval_set: EvalSet) -> Tensor:
    """User vectors (E, d), one user a pass: no padding."""
    alone = [(torch.from_numpy(h)[None], torch.tensor([len(h)])) for h in eval_set.histories]
    with torch.no_grad():
        return torch.cat([model.encode(*each) for each in alone])


def outputs(
    model: Recommender, eval_set: EvalSet, modules: Sequence[nn.Module]
) -> list[np.ndarray]:
    """What each module returns at every item of every user, (N, D)."""
    outputs: list[list[np.ndarray]] = [[] for _ in modules]

    def keep(own: list[np.ndarray]) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            own.append(state.reshape(-1, state.shape[-1])[model.lead :].numpy().copy())

        return hook

    handles = [m.register_forward_hook(keep(own)) for m, own in zip(modules, outputs, strict=True)]
    encode_each(model, eval_set)
    for handle in handles:
        handle.remove()
    # a shared prompt is a pass of its own, before each user's
    step = slice(1, None, 2) if len(model.prompt) and not model.lead else slice(None)
    return [np.concatenate(own[step]) for own in outputs]


def stacked(model: Recommender, eval_set: EvalSet) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What each block's MLP wrote, and the state after each block."""
    blocks = list(find_blocks(model.backbone))
    both = outputs(model, eval_set, [*(block.mlp for block in blocks), *blocks])
    return both[: len(blocks)], both[len(blocks) :]


def by_lstsq(m: np.ndarray, h: np.ndarray, g: np.ndarray, ridge: float) -> np.ndarray:
    """T of ``||M T - (h_end + M - h_start)||^2 + a ||T - I||^2``, with ridge rows."""
    width = m.shape[1]
    rows = np.sqrt(ridge * np.square(m).sum() / width) * np.eye(width)
    target = np.concatenate([g + m - h, rows])
    return np.linalg.lstsq(np.concatenate([m, rows]), target, rcond=None)[0]


@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_equals_least_squares_on_stacked_states(
    teacher: Recommender, few: EvalSet, ridge: float
) -> None:
    fitted = fit_replacements(teacher, few, SPANS, device=CPU, ridge=ridge, batch_size=16)
    assert [(one.start, one.end) for one in fitted] == SPANS
    written, after = stacked(teacher, few)
    for one in fitted:
        m, h, g = written[one.start - 1], after[one.start - 1], after[one.end - 1]
        assert len(m) == sum(len(history) for history in few.histories)
        np.testing.assert_allclose(one.map, by_lstsq(m, h, g, ridge), rtol=0, atol=1e-8)
        error = np.linalg.norm(h - m + m @ one.map - g) / np.linalg.norm(g)
        assert one.error == pytest.approx(error, rel=1e-6)
        assert one.error_without == pytest.approx(np.linalg.norm(h - g) / np.linalg.norm(g))
        assert one.error < one.error_without


@pytest.mark.parametrize("ridge", [1e-9, 1.0, 1e3])
def test_never_worse_than_plain_removal(plain: Recommender, draw: Draw, ridge: float) -> None:
    # also of fewer positions than the stream is wide
    for users in (1, 3, 100):
        for one in fit_replacements(plain, draw(users, 0), SPANS, device=CPU, ridge=ridge):
            assert one.error <= one.error_without


def check_applied(
    model: Recommender, few: EvalSet, span: tuple[int, int], fitted: Replacement | None = None
) -> Recommender:
    """The map folded in equals the map in a hook behind the projection of a plain cut."""
    if fitted is None:
        (fitted,) = fit_replacements(model, few, [span], device=CPU)
        assert fitted.error < fitted.error_without
    kept = [b for b in range(model.depth) if not span[0] <= b < span[1]]
    plain, hooked, folded = (copy.deepcopy(model) for _ in range(3))
    keep_blocks(plain.backbone, kept)
    keep_blocks(hooked.backbone, kept)
    projection = find_projection(hooked.backbone, span[0] - 1)
    projection.register_forward_hook(lambda _, __, out: out @ torch.from_numpy(fitted.map))
    fold_map(folded, fitted, cut=True)
    assert folded.depth == len(kept)
    expected = encode_each(hooked, few)
    torch.testing.assert_close(encode_each(folded, few), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(encode_each(plain, few), expected, rtol=1e-3)
    (goal,) = outputs(model, few, [find_blocks(model.backbone)[span[1] - 1]])
    for cut, error in ((folded, fitted.error), (plain, fitted.error_without)):
        (state,) = outputs(cut, few, [find_blocks(cut.backbone)[span[0] - 1]])
        assert error == pytest.approx(np.linalg.norm(state - goal) / np.linalg.norm(goal), rel=1e-6)
    return folded


def test_applied_equals_a_map_in_a_hook(teacher: Recommender, draw: Draw) -> None:
    few = draw(12, 0)
    before = encode_each(teacher, few)
    for span in [(1, 3), (2, 5)]:
        check_applied(teacher, few, span)
    assert torch.equal(encode_each(teacher, few), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


# the cosine objective


def directions(model: Recommender, few: EvalSet, span: tuple[int, int]) -> Activations:
    """What the model does at every item, (N, D), user by user."""
    written, after = stacked(model, few)
    m, h, g = written[span[0] - 1], after[span[0] - 1], after[span[1] - 1]
    return Activations(*map(torch.from_numpy, (m, h - m, g)))


def naive_distance(linear: np.ndarray, states: Activations) -> float:
    pairs = zip(*(values.numpy() for values in states), strict=True)
    mapped = [(rest + m @ linear, goal) for m, rest, goal in pairs]
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in mapped]
    return 1 - float(np.mean(cosines))


def test_the_cosine_never_falls_below_the_least_squares(teacher: Recommender, draw: Draw) -> None:
    users = draw(40, 0)
    order = np.random.default_rng(3).permutation(40)
    held = np.isin(np.arange(40), order[4::5])
    for one in fit_cosine(teacher, users, [(1, 3), (2, 5)], device=CPU, seed=3):
        span = (one.start, one.end)
        distances = {}
        for name, chosen in {"fitted": ~held, "held out": held}.items():
            places = np.flatnonzero(chosen)
            few = EvalSet(places, [users.histories[p] for p in places], places, None, None)
            states = directions(teacher, few, span)
            if name == "fitted":
                (start,) = fit_replacements(teacher, few, [span], device=CPU)
                assert (one.map != start.map).any()
            distances[name] = [naive_distance(each.map, states) for each in (one, start)]
        assert distances["fitted"][0] < distances["fitted"][1]
        assert distances["held out"][0] < distances["held out"][1]


def test_the_gradient_of_the_cosine(plain: Recommender, draw: Draw) -> None:
    states = directions(plain, draw(5, 0), (1, 3))
    linear = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
    cosine_distance(linear, states).backward()
    expected = naive_distance(linear.detach().numpy(), states)
    assert cosine_distance(linear, states).item() == pytest.approx(expected)
    step = 1e-6
    for row, column in [(0, 0), (3, 11), (15, 2)]:
        shifted = [linear.detach().numpy().copy() for _ in range(2)]
        shifted[0][row, column] += step
        shifted[1][row, column] -= step
        up, down = (naive_distance(each, states) for each in shifted)
        assert float(linear.grad[row, column]) == pytest.approx((up - down) / 2 / step, rel=1e-5)


def test_a_cosine_map_is_folded_like_any_other(teacher: Recommender, draw: Draw) -> None:
    few = draw(4, 0)  # too few to hold one out
    (fitted,) = fit_cosine(teacher, few, [(1, 3)], device=CPU, seed=0)
    check_applied(teacher, few, (1, 3), fitted)
    (again,) = fit_cosine(teacher, few, [(1, 3)], device=CPU, seed=0)
    assert np.array_equal(fitted.map, again.map)


def test_the_users_of_the_cosine_are_drawn(plain: Recommender, draw: Draw) -> None:
    users = draw(60, 0)
    first, other = (
        fit_cosine(plain, users, [(1, 2)], device=CPU, seed=seed, positions=100)[0]
        for seed in (0, 1)
    )
    assert (first.map != other.map).any()
    (alone,) = fit_cosine(plain, users, [(1, 2)], device=CPU, seed=0, positions=0)  # one user
    assert np.isfinite(alone.map).all()


def test_what_is_held_out_stops_the_descent(plain: Recommender, draw: Draw) -> None:
    own, other = (directions(plain, draw(3, seed), (1, 3)) for seed in (0, 1))
    start = torch.eye(16, dtype=torch.float64)
    stopped, longer = descend(start, own, other), descend(start, own, own)
    assert cosine_distance(longer, own) < cosine_distance(stopped, own)
    assert cosine_distance(stopped, other) <= cosine_distance(start, other)
    # nothing is gained where the goal is the stream itself
    assert descend(start, own, own._replace(after=own.rest + own.written)) is start


def test_a_folded_map_waits_for_the_cut(plain: Recommender, few: EvalSet) -> None:
    (fitted,) = fit_replacements(plain, few, [(2, 4)], device=CPU)
    applied, folded = copy.deepcopy(plain), copy.deepcopy(plain)
    fold_map(applied, fitted, cut=True)
    fold_map(folded, fitted)
    assert folded.depth == plain.depth == 5
    before = plain.state_dict()
    changed = [k for k, v in folded.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["backbone.layers.1.mlp.down_proj.weight"]
    expected = encode_each(applied, few)
    with skip_blocks(folded.backbone, {2, 3}):
        assert torch.equal(encode_each(folded, few), expected)
    keep_blocks(folded.backbone, [0, 1, 4])
    assert torch.equal(encode_each(folded, few), expected)


def test_a_refused_cut_leaves_the_model_as_it_was(plain: Recommender, few: EvalSet) -> None:
    (fitted,) = fit_replacements(plain, few, [(2, 4)], device=CPU)
    blocks = find_blocks(plain.backbone)
    blocks[4].self_attn.q_proj.weight = blocks[0].self_attn.q_proj.weight
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match="share weights with each other"):
        fold_map(plain, fitted, cut=True)
    assert plain.depth == 5
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


# sequential and parallel parts, both kinds of linear map, a flattened batch, a sum inside the MLP
SLOW = ["qwen2", "mistral", "gpt_neox", "phi", "bloom"]
FAMILIES = [
    *("llama", "gpt2", "opt", "falcon"),
    *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_reload(family: str, draw: Draw, tmp_path: Path) -> None:
    model = make(family, (3, 1, 2))
    with torch.no_grad():
        for name, weight in model.backbone.named_parameters():
            if name.endswith("bias"):  # fresh ones are 0, and would hide that they are mapped
                weight.normal_()
    folded = check_applied(model, draw(12, 0), (2, 3))
    folded.backbone.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = folded.backbone(ids, use_cache=False)[0]
        torch.testing.assert_close(
            loaded.eval()(ids, use_cache=False)[0], expected, rtol=0, atol=1e-6
        )


def test_a_prompt_repeated_in_each_row_is_left_out(few: EvalSet) -> None:
    model = make("mistral", (3, 1, 2))
    model.lead = 3
    (fitted,) = fit_replacements(model, few, [(1, 3)], device=CPU, ridge=1e-2)
    written, after = stacked(model, few)
    m, h, g = written[0], after[0], after[2]
    assert len(m) == sum(len(history) for history in few.histories)
    np.testing.assert_allclose(fitted.map, by_lstsq(m, h, g, 1e-2), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {}, "a norm, or more than a sum is between"),
        ("olmo2", {}, "a norm, or more than a sum is between"),
        ("mixtral", {}, "does not end in one linear map"),
        ("deepseek_v3", {}, "does not end in one linear map"),  # a shared expert beside the others
        ("granite", {"residual_multiplier": 0.25}, "block 3: a factor, a norm"),
    ],
)
def test_refused_families(family: str, changes: dict[str, Any], reason: str, draw: Draw) -> None:
    model = make(family, depth=5, **changes)
    last = model.depth - 1  # DeepSeek's first three blocks have no experts
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason) as raised:
        fit_replacements(model, draw(4, 0), [(last, last + 1)], device=CPU)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=reason):
        fold_map(model, Replacement(last, last + 1, np.eye(32), 0, 0), cut=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def adapted(model: Recommender) -> None:
    # fresh adapters add 0: the projection alone is what the MLP returns
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"]), model.backbone)


def shared(model: Recommender) -> None:
    one, other = (find_blocks(model.backbone)[index].mlp for index in (0, 3))
    other.down_proj.weight = one.down_proj.weight


def packed(model: Recommender) -> None:
    model.backbone.is_quantized = True


def computed(model: Recommender) -> None:
    nn.utils.parametrizations.weight_norm(find_blocks(model.backbone)[0].mlp.down_proj)


class Biased(nn.Linear):
    def forward(self, source: Tensor) -> Tensor:
        return super().forward(source) + 1


def more(model: Recommender) -> None:
    find_blocks(model.backbone)[0].mlp.down_proj.__class__ = Biased


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (adapted, "weights are quantised, adapted, computed, or others"),
        (shared, "weights are quantised, adapted, computed, or others"),
        (packed, "weights are quantised, adapted, computed, or others"),
        (computed, "weights are quantised, adapted, computed, or others"),
        (more, "more than its weights"),
    ],
)
def test_weights_that_take_no_map(
    plain: Recommender, draw: Draw, spoil: Callable[[Recommender], None], reason: str
) -> None:
    spoil(plain)
    plain.double()
    with pytest.raises(ValueError, match=reason):
        fit_replacements(plain, draw(4, 0), [(1, 2)], device=CPU)


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        ((0, 2), "is no span of 5 blocks behind the first"),
        ((2, 2), r"\[2, 2\) is no span of 5 blocks"),
        ((3, 2), "no span"),
        ((4, 6), "no span"),
        ((-1, 2), "no span"),
    ],
)
def test_no_span(plain: Recommender, draw: Draw, span: tuple[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fit_replacements(plain, draw(4, 0), [span], device=CPU)
    with pytest.raises(ValueError, match=reason):
        fold_map(plain, Replacement(*span, np.eye(32), 0, 0), cut=True)


def test_bad_users_and_width(plain: Recommender, draw: Draw) -> None:
    with pytest.raises(ValueError, match="no users"):
        fit_replacements(plain, draw(0, 0), [(1, 2)], device=CPU)
    (fitted,) = fit_replacements(plain, draw(4, 0), [(1, 2)], device=CPU)
    with pytest.raises(ValueError, match="the stream 16 wide"):
        fold_map(plain, replace(fitted, map=np.eye(15)), cut=True)
    assert plain.depth == 5
    assert fit_replacements(plain, draw(4, 0), [], device=CPU) == []


def test_half_precision_weights_are_rounded_once(few: EvalSet) -> None:
    model = make("llama").to(torch.bfloat16)
    (fitted,) = fit_replacements(model, few, [(1, 3)], device=CPU)
    projection = find_blocks(model.backbone)[0].mlp.down_proj
    exact = torch.from_numpy(fitted.map).T @ projection.weight.detach().double()
    fold_map(model, fitted, cut=True)
    assert projection.weight.dtype == torch.bfloat16
    assert torch.equal(projection.weight.detach(), exact.to(torch.bfloat16))
