"""The prompt-only ranker equals whole texts read alone by cut models, and ranks by them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.families import family_config
from depthprobe.models.prompt import can_share_prompt
from depthprobe.models.tiny import tiny_model
from depthprobe.probing import prompt_only
from depthprobe.probing.prompt_only import log_likelihoods, rank_by_title

# items 2 and 4 have one text; one text is a single token
TOKENS = [[5, 6, 7], [8, 2], [9, 10, 4, 3, 2, 1], [8, 2], [6], [7, 8, 9], [2, 2], [3, 9, 4, 5]]
PROMPT, SUFFIX, DEPTHS = [3, 1, 4], [2, 7], (1, 3, 4)
USERS = EvalSet(
    users=np.arange(3),
    histories=[np.array([1, 5, 2, 8, 3]), np.array([7]), np.array([6, 6, 1])],
    targets=np.array([4, 3, 6]),
    seen=None,
    negatives=np.array([[2, 5, 7], [1, 2, 4], [8, 3, 5]]),
)


def model_of(family: str) -> PreTrainedModel:
    return tiny_model(family_config(family), depth=4)


def cut_to(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    return keep_blocks(copy.deepcopy(model), range(depth))


@torch.no_grad()
def read_alone(model: PreTrainedModel, before: Sequence[int], text: Sequence[int]) -> float:
    """The whole sequence in one pass, nothing shared or cached."""
    ids = torch.tensor([[*before, *text]])
    values = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(dim=-1)
    places = range(len(before), ids.shape[1])
    return sum(float(values[place - 1, ids[0, place]]) for place in places)


def text_before(history: Sequence[int], suffix: Sequence[int] = ()) -> list[int]:
    return [*PROMPT, *(token for item in history for token in TOKENS[item - 1]), *suffix]


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        "gemma2",  # windows of 4 tokens, soft caps on the logits
        "mamba",  # no keys and values to share
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("opt", "cohere", "qwen3_moe", "granite", "roberta", "falcon_h1")
        ),
    ],
)
def test_equals_whole_texts_read_by_cut_models(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_only, "BATCH", 3)
    monkeypatch.setattr(prompt_only, "LOGITS", 300)  # of 128 tokens: two states at once
    model, before = model_of(family), text_before(USERS.histories[0].tolist(), SUFFIX)
    share = can_share_prompt(model.base_model)
    assert share == (family not in {"mamba", "falcon_h1"})
    found = log_likelihoods(model, before, TOKENS, DEPTHS, share=share)
    expected = [
        [read_alone(cut, before, text) for text in TOKENS]
        for cut in (cut_to(model, depth) for depth in DEPTHS)
    ]
    within = 1e-5 if family == "mamba" else 1e-9  # parts of it are in float32
    np.testing.assert_allclose(found, expected, rtol=within, atol=within)
    assert np.ptp(expected, axis=0).min() > 1e-3  # depths differ


@pytest.mark.parametrize(("family", "suffix"), [("llama", []), ("llama", SUFFIX), ("mamba", [])])
def test_ranks_by_both_scores(family: str, suffix: list[int]) -> None:
    model = model_of(family)
    found = rank_by_title(model, USERS, TOKENS, prompt=PROMPT, suffix=suffix, depths=DEPTHS)
    for place, depth in enumerate(DEPTHS):
        cut = cut_to(model, depth)
        for user, history in enumerate(USERS.histories):
            items = [USERS.targets[user], *USERS.negatives[user]]
            texts = [TOKENS[item - 1] for item in items]
            before = text_before(history.tolist(), suffix)
            given = np.array([read_alone(cut, before, text) for text in texts])
            alone = np.array([read_alone(cut, [*PROMPT, *suffix], text) for text in texts])
            for name, scores in (("likelihood", given), ("normalised", given - alone)):
                near = np.isclose(scores, scores[0], rtol=0, atol=1e-9)
                rank = (scores[~near] > scores[0]).sum() + (near.sum() + 1) / 2
                assert found[name][place, user] == rank
    # the first user's target has the text of a negative: they share their places
    assert found["likelihood"][:, 0] % 1 == pytest.approx(0.5)


def test_a_history_is_cut_to_the_latest_items_that_the_positions_hold() -> None:
    model = model_of("gpt2")
    model.config.max_position_embeddings = 16  # the prompt takes 3 and the longest title 6: 7 left
    given = {"prompt": PROMPT, "depths": DEPTHS}
    long = rank_by_title(model, USERS, TOKENS, **given)
    latest = [np.array([3]), np.array([7]), np.array([6, 1])]  # 6, 2 and 6 tokens
    short = rank_by_title(model, replace(USERS, histories=latest), TOKENS, **given)
    for name, ranks in long.items():
        np.testing.assert_array_equal(ranks, short[name])
    model.config.max_position_embeddings = 8
    with pytest.raises(BadInput, match="a shorter prompt or fewer title_tokens.*8 positions"):
        rank_by_title(model, USERS, TOKENS, **given)


def test_targets_that_are_never_served_are_misses() -> None:
    seen = [np.array([4]), np.array([1]), np.array([5])]
    users, given = replace(USERS, seen=seen), {"prompt": PROMPT, "depths": [2]}
    found = rank_by_title(model_of("llama"), users, TOKENS, **given)
    for ranks in found.values():
        assert np.isinf(ranks[0]).tolist() == [True, False, False]


def test_a_title_needs_something_before_it() -> None:
    with pytest.raises(BadInput, match="backbone.prompt: expected a text"):
        rank_by_title(model_of("llama"), USERS, TOKENS, prompt=[], depths=[1])


def test_a_head_that_reads_more_than_the_last_state_is_refused() -> None:
    model = model_of("llama")

    def remember(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        output.logits.add_(given["input_ids"].sum(dim=1)[:, None, None] * output.logits.sign())

    model.register_forward_hook(remember, with_kwargs=True)
    with pytest.raises(BadInput, match="its language-model head reads more than the last state"):
        rank_by_title(model, USERS, TOKENS, prompt=PROMPT, depths=[1])
