"""A tiny float64 recommender with weights that matter, users and targets, and naive fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.evaluation.ranks import EvalSet, mean_ndcg
from depthprobe.models.recommender import Recommender
from depthprobe.probing.passes import passes
from depthprobe.probing.readout import CachedStates


def make_teacher(config: LlamaConfig, prompt: Sequence[int]) -> Recommender:
    torch.manual_seed(0)
    model = Recommender(LlamaForCausalLM(config), torch.randn(41, 6), prompt).double()
    with torch.no_grad():
        for weight in model.backbone.layers.parameters():
            if weight.dim() > 1:
                weight.mul_(8)  # fresh weights are so small that a skipped block changes nothing
    return model.eval()


@pytest.fixture(params=[(), (3, 1, 2)], ids=["no prompt", "prompt"])
def teacher(
    request: pytest.FixtureRequest, llama_config: Callable[..., LlamaConfig]
) -> Recommender:
    return make_teacher(llama_config(num_hidden_layers=5), request.param)


@pytest.fixture
def plain(llama_config: Callable[..., LlamaConfig]) -> Recommender:
    """The teacher without a prompt, for what starts from states."""
    return make_teacher(llama_config(num_hidden_layers=5), ())


@pytest.fixture
def draw() -> Callable[[int, int], EvalSet]:
    """``draw(users, seed)``: users and targets alone."""

    def make(users: int, seed: int) -> EvalSet:
        rng = np.random.default_rng(seed)
        histories = [rng.integers(1, 41, size=rng.integers(1, 9)) for _ in range(users)]
        return EvalSet(np.arange(users), histories, rng.integers(1, 41, size=users), None, None)

    return make


@pytest.fixture
def eval_set(draw: Callable[[int, int], EvalSet]) -> EvalSet:
    """Two batches of users, with seen items and negatives."""
    drawn, rng = draw(300, 0), np.random.default_rng(1)
    return replace(drawn, seen=drawn.histories, negatives=rng.integers(1, 41, size=(300, 7)))


@pytest.fixture
def few(draw: Callable[[int, int], EvalSet]) -> EvalSet:
    """Users and targets for loops over users."""
    return draw(30, 0)


@pytest.fixture
def states_of() -> Callable[[Recommender, EvalSet], CachedStates]:
    """``states_of(teacher, eval_set)``: the states as they are, in memory."""

    @torch.inference_mode()
    def compute(model: Recommender, eval_set: EvalSet) -> CachedStates:
        states = np.empty((len(eval_set.users), model.depth + 1, model.width))
        for chosen, batch in passes(model, eval_set, device=torch.device("cpu")):
            states[chosen] = batch.transpose(0, 1).numpy()
        return CachedStates(eval_set, states)

    return compute


Fit = Callable[..., tuple[int, float, list[Tensor]]]


@pytest.fixture
def fit_alone() -> Fit:
    """The oracle of fitting: one depth, autograd and a plain loop."""

    def fit(
        weights: Sequence[Tensor],
        *,
        loss: Callable[[np.ndarray], Tensor],
        scores: Callable[[], Tensor],
        targets: Tensor,
        epochs: int,
        learning_rate: float,
    ) -> tuple[int, float, list[Tensor]]:
        """The best epoch, its NDCG@10, and its weights; 150 users by 40, seed 3, patience 2.

        ``loss`` is of some users, ``scores`` (E, I) are of the validation users.
        """

        def ndcg() -> float:
            table = scores().detach()
            at_target = table.gather(1, targets[:, None] - 1)
            ranks = 1 + (table > at_target).sum(1) + ((table == at_target).sum(1) - 1) / 2
            return mean_ndcg(ranks.numpy())

        optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.01)
        chosen, best, step = 0, ndcg(), 0
        kept = [weight.detach().clone() for weight in weights]
        for epoch in range(1, epochs + 1):
            order = np.random.default_rng((3, epoch)).permutation(150)
            for rows in (order[:40], order[40:80], order[80:120], order[120:]):
                share = (1 + math.cos(math.pi * step / (4 * epochs))) / 2
                optimizer.param_groups[0]["lr"] = share * learning_rate
                optimizer.zero_grad()
                loss(rows).backward()
                optimizer.step()
                step += 1
            now = ndcg()
            if now > best:
                chosen, best = epoch, now
                kept = [weight.detach().clone() for weight in weights]
            if epoch - chosen >= 2:
                break
        return chosen, best, kept

    return fit
