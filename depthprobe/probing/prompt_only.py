"""The prompt-only ranker: an untouched language model scores titles by how likely they are.

This shows what pretraining alone knows, the floor of every trained recommender: no adapter, no
training, the model's own head. A title has two scores after the prompt and a user's history in
words: its log-probability, and that less its log-probability after only the prompt, since a title
that is likely anyway says nothing about the user (surface form competition: Holtzman et al., arXiv
2104.08315).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprobe.data.batches import length_buckets, pad
from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import EvalSet, rank_targets
from depthprobe.models.blocks import find_decoder, input_device, refusal
from depthprobe.models.parts import check_readable, join_streams, split_streams
from depthprobe.models.prompt import cache_argument, can_share_prompt, first_position, shared_prompt
from depthprobe.models.skipping import after_blocks
from depthprobe.models.taps import tap_blocks
from depthprobe.models.tiny import positions_of, steady_positions
from depthprobe.probing.passes import TOLERANCE, exact

logger = logging.getLogger(__name__)

SCORES = ("likelihood", "normalised")
BATCH = 32  # titles at a time, of similar length
LOGITS = 2**24  # numbers over the vocabulary at a time: 64 MiB


def rank_by_title(
    model: PreTrainedModel,
    eval_set: EvalSet,
    tokens: Sequence[Sequence[int]],
    *,
    prompt: Sequence[int],
    suffix: Sequence[int] = (),
    depths: Sequence[int],
) -> dict[str, np.ndarray]:
    """Ranks of each user's target among its negatives by :data:`SCORES`, each (D, E).

    A history is cut to the latest items that leave room for a title in the model's positions.

    Args:
        model: a causal language model with its head, in evaluation mode.
        eval_set: with negatives (E, n).
        tokens: of the text of items 1..I.
        prompt: tokens before the history.
        suffix: tokens between the history and a title.
        depths: numbers of blocks to run, D of them.

    Raises:
        BadInput: if nothing precedes the first title, if the positions have no room for one, or if
            the head reads more than the last state.
    """
    if eval_set.negatives is None:
        raise ValueError("expected an eval set with negatives")
    if not (prompt or suffix):
        raise BadInput("backbone.prompt", "", "a text: the first word of a title follows it")
    check_readable(model)
    _check_head(model, torch.tensor([[*prompt, *suffix]], device=input_device(model)))
    decoder = find_decoder(model)
    share = can_share_prompt(decoder)  # otherwise each title is read with everything before it
    # items with the same text tie, so each text is scored once
    texts = list(dict.fromkeys(map(tuple, tokens)))
    place = {text: index for index, text in enumerate(texts)}
    text_of = np.array([-1, *(place[tuple(text)] for text in tokens)])  # (I + 1,)
    candidates = text_of[np.column_stack([eval_set.targets, eval_set.negatives])]  # (E, 1 + n)
    used = np.unique(candidates)
    chosen = [texts[index] for index in used]
    around = len(prompt) + len(suffix)
    most = steady_positions(model.config) or positions_of(model.config)
    room = np.inf
    if most is not None:
        room = most - first_position(decoder) - around - max(map(len, chosen))
    if room < 0:
        allowed = f"a shorter prompt or fewer title_tokens: it has {most} positions"
        raise BadInput("backbone", type(model).__name__, allowed, fault=True)

    alone = np.zeros((len(depths), len(texts)))
    alone[:, used] = log_likelihoods(model, [*prompt, *suffix], chosen, depths, share=share)
    sizes = np.array([0, *map(len, tokens)])
    ranks = {name: np.empty((len(depths), len(candidates))) for name in SCORES}
    for user, own in enumerate(candidates):
        if user % 10 == 0:
            logger.info("user %d of %d", user + 1, len(candidates))
        history = eval_set.histories[user]
        fits = sizes[history][::-1].cumsum() <= room
        read = [tokens[item - 1] for item in history[len(history) - int(fits.sum()) :]]
        different, column = np.unique(own, return_inverse=True)
        given = log_likelihoods(
            model,
            [*prompt, *chain.from_iterable(read), *suffix],
            [texts[index] for index in different],
            depths,
            share=share,
        )
        for name, scores in zip(SCORES, (given, given - alone[:, different]), strict=True):
            target = np.full(len(depths), 0)
            ranks[name][:, user] = rank_targets(scores[:, column], target).numpy()
    for values in ranks.values():
        values[:, eval_set.misses] = np.inf
    return ranks


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    before: Sequence[int],
    texts: Sequence[Sequence[int]],
    depths: Sequence[int],
    *,
    share: bool = True,
) -> np.ndarray:
    """Log-probability of each text after the tokens ``before``, at each depth: float64 (D, C).

    The sum over the text's tokens. The states after each depth go through the final norm and the
    head. ``before`` is run once; with ``share`` all texts read its keys and values, otherwise it is
    run again before each text.
    """
    decoder, device = find_decoder(model), input_device(model)
    first, cache, lead = first_position(decoder), None, 0 if share else len(before)
    found = torch.zeros(len(depths), len(texts), dtype=torch.float64)
    with tap_blocks(decoder) as tap:
        prompt = torch.tensor(before, device=device)
        if share:
            cache = shared_prompt(decoder, prompt, first=first)
        else:
            decoder(input_ids=prompt[None], use_cache=False)
        # the first token of every text follows the same state
        starts = torch.tensor([[text[0] for text in texts]], device=device)  # (1, C)
        for row, depth in zip(found, depths, strict=True):
            state = join_streams(tap.states[depth][..., -1, :])  # (1, D)
            row += _log_probabilities(model, state, starts)[0]
        longer = np.array([index for index, text in enumerate(texts) if len(text) > 1])
        for batch in length_buckets([len(texts[index]) for index in longer], BATCH):
            chosen = longer[batch]
            ids = torch.from_numpy(pad([np.array(texts[index]) for index in chosen])).to(device)
            lengths = torch.tensor([len(texts[index]) for index in chosen], device=device)
            again = prompt[len(before) - lead :].expand(len(ids), -1)  # (B, lead)
            read = torch.cat([again, ids[:, :-1]], dim=1)  # no token follows the last one
            places = torch.arange(read.shape[1], device=device)
            decoder(
                input_ids=read,  # (B, lead + T)
                position_ids=(first + len(before) - lead + places)[None],
                **{cache_argument(decoder): cache},
                use_cache=False,
            )
            asked = places[: ids.shape[1] - 1] < lengths[:, None] - 1  # (B, T)
            targets, rows = ids[:, 1:][asked], asked.nonzero()[:, 0].cpu()
            for row, depth in zip(found, depths, strict=True):
                states = tap.states[depth][..., lead:, :].flatten(-3, -2)[..., asked.flatten(), :]
                values = _log_probabilities(model, join_streams(states), targets[:, None])[:, 0]
                row.index_add_(0, torch.from_numpy(chosen)[rows], values)
    return found.numpy()


@torch.inference_mode()
def _check_head(model: PreTrainedModel, ids: Tensor) -> None:
    """Refuse a head whose logits depend on more than the last state."""
    with tap_blocks(model) as tap:
        logits = exact(model(input_ids=ids, use_cache=False).logits[0, -1:])  # (1, V)
        last = join_streams(tap.states[-1][..., -1, :])
    read = exact(after_blocks(model, split_streams(model, last), head=True)[:, 0])
    if (read - logits).abs().max() > TOLERANCE.get(last.dtype, 3e-2) * logits.abs().max():
        raise refusal(model, "its language-model head reads more than the last state")


def _log_probabilities(model: PreTrainedModel, states: Tensor, tokens: Tensor) -> Tensor:
    """Of K tokens each after states of blocks, (N, D) and (N, K) -> float64 (N, K) on the CPU."""
    most = max(1, LOGITS // int(model.config.get_text_config(decoder=True).vocab_size))
    found = []
    for some, asked in zip(states.split(most), tokens.split(most), strict=True):
        logits = after_blocks(model, split_streams(model, some), head=True)[:, 0]  # (N, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found.append(logits.gather(1, asked) - logits.logsumexp(dim=1, keepdim=True))
    return torch.cat(found).cpu().double()
