"""Histories in words: equal to a user's text read alone, in every layout; how titles are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import EvalSet, evaluate
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.embedded import embedded_tokenizer
from depthprobe.models.export import load_recommender, write_recommender
from depthprobe.models.recommender import Recommender
from depthprobe.models.words import Words, item_tokens, look_alikes
from depthprobe.probing.passes import early_exit
from depthprobe.study import Backbone, Recipe
from depthprobe.training.objectives import NextItem, make_batch

TOKENS = [[5, 6, 7], [8], [9, 10], [4, 3, 2, 1, 5], [6, 6], [7, 8, 9], [2], [3, 9, 4, 5]]
PROMPT, SUFFIX = (3, 1, 4), (2, 7)
WINDOWS = [np.array(w) for w in ([1, 2, 3, 4], [5, 6], [7, 8, 1, 2, 3, 2], [8, 4, 4])]


def build(
    backbone: PreTrainedModel, prompt: tuple[int, ...] = PROMPT, suffix: tuple[int, ...] = ()
) -> Recommender:
    torch.manual_seed(0)
    items = torch.randn(len(TOKENS) + 1, 6)
    model = Recommender(backbone, items, prompt, suffix=suffix, words=Words(TOKENS))
    return model.double().eval()


def read_alone(model: Recommender, history: list[int]) -> Tensor:
    """A user's vectors after each item, (T, d): the whole text as token ids, nothing shared."""
    vectors = []
    for stop in range(1, len(history) + 1):
        text = [t for item in history[:stop] for t in TOKENS[item - 1]]
        ids = torch.tensor([[*model.prompt.tolist(), *text, *model.suffix.tolist()]])
        state = model.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        vectors.append(model.read_out(state))
    return torch.stack(vectors)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "gemma3n_text"])
@pytest.mark.parametrize(("prompt", "suffix"), [(PROMPT, ()), ((), ()), (PROMPT, SUFFIX)])
def test_equals_each_user_read_alone(
    name: str,
    prompt: tuple[int, ...],
    suffix: tuple[int, ...],
    make_model: Callable[..., PreTrainedModel],
) -> None:
    model = build(make_model(name), prompt, suffix)
    batch = make_batch(WINDOWS, np.arange(len(WINDOWS)), torch.device("cpu"), "every")
    within = 1e-6 if name == "gemma3n_text" else 1e-10  # parts of it are in float32
    with torch.no_grad():
        last = model.encode(batch.inputs, batch.lengths)
        every = None if suffix else model(batch.inputs)
        for row, window in enumerate(WINDOWS):
            expected = read_alone(model, window[:-1].tolist())
            torch.testing.assert_close(last[row], expected[-1], rtol=within, atol=within)
            if every is not None:
                own = every[row, : len(expected)]
                torch.testing.assert_close(own, expected, rtol=within, atol=within)


def test_gradients_are_those_of_users_read_alone(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    model = build(make_model("llama"))
    batch = make_batch(WINDOWS, np.arange(len(WINDOWS)), torch.device("cpu"), "every")
    NextItem(model, Recipe())(batch).backward()
    named = dict(model.named_parameters())
    got = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    model.zero_grad()
    losses = []
    for window in WINDOWS:
        scores = read_alone(model, window[:-1].tolist()) @ model.items.weight[1:].T
        targets = torch.from_numpy(window[1:] - 1)
        losses.append(torch.nn.functional.cross_entropy(scores, targets, reduction="none"))
    torch.cat(losses).mean().backward()
    assert any("self_attn" in name for name in got)
    for name, gradient in got.items():
        # the norms of a Llama compute in float32, whatever it is given
        torch.testing.assert_close(gradient, named[name].grad, rtol=1e-6, atol=1e-6, msg=name)


def test_exits_are_the_cut_models(make_model: Callable[..., PreTrainedModel]) -> None:
    eval_set = EvalSet(
        users=np.arange(len(WINDOWS)),
        histories=[window[:-1] for window in WINDOWS],
        targets=np.array([window[-1] for window in WINDOWS]),
        seen=None,
        negatives=None,
    )
    cpu = torch.device("cpu")
    exits = early_exit(build(make_model("llama")), eval_set, device=cpu)  # type: ignore[arg-type]
    for depth in (1, 3):
        cut = build(make_model("llama"))
        keep_blocks(cut.backbone, range(depth))
        expected = evaluate(cut, eval_set, device=cpu)
        np.testing.assert_array_equal(exits[depth]["full"], expected["full"])


def test_batches_are_cut_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthprobe.evaluation.ranks.POSITIONS", 40)
    rng = np.random.default_rng(0)
    words = Words([[1] * n for n in rng.integers(1, 9, size=50)])
    histories = [rng.integers(1, 51, size=n) for n in rng.integers(1, 8, size=300)]
    eval_set = EvalSet(np.arange(300), histories, np.ones(300), None, None)

    class Model:
        def __init__(self) -> None:
            self.words = words

        def positions(self, histories: list[np.ndarray]) -> list[int]:
            return words.lengths(histories)

    real = computed = 0
    for chosen, items, _ in eval_set.batches(device=torch.device("cpu"), model=Model()):  # type: ignore[arg-type]
        text = words(items)
        own = words.lengths([histories[place] for place in chosen])
        assert text.numel() <= 40 or len(chosen) == 1
        assert text.shape[1] == max(own)
        real, computed = real + sum(own), computed + text.numel()
    assert real == sum(words.lengths(histories))
    assert computed <= 1.1 * real


def test_exported_and_read_again(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    backbone = make_model("llama").float()
    model = build(backbone).float()
    ids = [f"i{n}" for n in range(1, len(TOKENS) + 1)]
    write_recommender(
        tmp_path, model, backbone, item_ids=ids, titles=None, max_history=3, filter_seen=False
    )
    again = load_recommender(tmp_path)
    histories = [[f"i{item}" for item in window] for window in WINDOWS]
    for window, listed in zip(WINDOWS, again.recommend(histories, top=len(ids)), strict=True):
        own = read_alone(model, window[-3:].tolist())[-1] @ model.items.weight[1:].T
        expected = [ids[place] for place in own.argsort(descending=True).tolist()]
        assert [each.item for each in listed] == expected


def test_titles_are_cut_and_put_on_one_line() -> None:
    tokenizer = embedded_tokenizer()
    settings = Backbone(reads="titles", title_tokens=8, title_template="* {title}\n")
    titles = ["Heart " * 2000, "a\nb\t c", "", "Heart " * 50]
    tokens = item_tokens(settings, ["i1", "i2", "i3", "i4"], titles)
    assert tokens is not None
    head, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("* ", "\n"))
    assert len(tokens[0]) == len(head) + 8 + len(end)
    assert tokens[0][-len(end) :] == end
    assert [tokenizer.decode(each) for each in tokens[1:3]] == ["* a b c\n", "* i3\n"]
    (warning,) = look_alikes(tokens)
    assert warning.startswith("2 of 4 items read like another one")
    assert not look_alikes(tokens[:3])


def test_titles_that_cannot_be_read_are_refused() -> None:
    bare = Backbone(reads="titles", title_template="{title}")
    for ids, titles in ((["i1"], None), (["i1"], [""]), ([" "], ["x"][:0] + [" "])):
        with pytest.raises(BadInput, match="backbone.reads"):
            item_tokens(bare, ids, titles)
    assert item_tokens(Backbone(), ["i1"], None) is None
    with pytest.raises(BadInput, match="title_template"):
        Backbone(title_template="title")
