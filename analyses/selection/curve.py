"""A plain language model under the same probes: what a block does, and what is lost without it.

    python analyses/selection/curve.py build/smollm2 --draw curve.png

The text is Python's documentation of its own language, which every Python has. Block influence and
angular distance come from ``depthprobe.probing.similarity``, which takes the tokens as items. Those
of a plain loop over ``output_hidden_states`` stand beside them. Perplexity without a block is
by ``skip_blocks``.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import depthprobe as dp
from depthprobe.evaluation.ranks import EvalSet
from depthprobe.probing.passes import CausalEncoder
from depthprobe.probing.similarity import similarities

LENGTH = 256  # tokens a text


class LanguageModel(nn.Module, CausalEncoder):
    """A language model seen as a recommender: its items are its tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.backbone, self.head = model.model, model.lm_head

    def encode(self, histories: Tensor, lengths: Tensor, *prompt: object) -> Tensor:
        """The last state of each text, (B, D)."""
        states = self.backbone(input_ids=histories, use_cache=False).last_hidden_state
        return states[torch.arange(len(lengths)), self.last_place(histories, lengths)]

    def item_matrix(self) -> Tensor:
        """The head's weights, (V, D)."""
        return self.head.weight


def texts(folder: str, number: int) -> Tensor:
    """The first tokens of the documentation, cut to texts of equal length, (N, LENGTH)."""
    words = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = AutoTokenizer.from_pretrained(folder)(words[: 8 * LENGTH * number])["input_ids"]
    return torch.tensor(tokens[: number * LENGTH]).view(number, LENGTH)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    """Of every token of the texts but the first."""
    losses = [model(input_ids=own, labels=own).loss.double() for own in tokens.split(8)]
    return float(torch.stack(losses).mean().exp())


@torch.inference_mode()
def by_hand(model: PreTrainedModel, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Block influence (L,), and the angular distance of neighbours (L,), at the last token."""
    turned = []
    # the last of output_hidden_states has gone through the final norm: take the block's own
    kept: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda _m, _a, out: kept.append(out))
    for own in tokens.split(8):
        kept.clear()
        states = model(input_ids=own, output_hidden_states=True).hidden_states[:-1]
        last = kept[0] if isinstance(kept[0], Tensor) else kept[0][0]
        along = torch.stack([*states, last])[:, :, -1].double()  # (L + 1, B, D)
        turned.append(torch.cosine_similarity(along[:-1], along[1:], dim=-1))
    hook.remove()
    cosines = torch.cat(turned, dim=1).numpy()
    return (1 - cosines).mean(1), (np.arccos(cosines) / np.pi).mean(1)


def draw(influence: np.ndarray, lost: np.ndarray, whole: float, path: Path) -> None:
    """Influence and perplexity by block, on logarithmic axes."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 4.6), sharex=True, layout="constrained")
    blocks = np.arange(len(influence))
    above.bar(blocks, lost, color="#1f5fa8")
    above.axhline(whole, color="black", lw=0.8)
    above.set_ylabel("perplexity without it")
    below.bar(blocks, influence, color="#999999")
    below.set_ylabel("block influence")
    below.set_xlabel("block")
    for axes in (above, below):
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--draw", type=Path)
    asked = parser.parse_args()
    tokens = texts(asked.model, asked.texts)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    users, whole = np.arange(len(tokens)), perplexity(model, tokens)
    histories = [*tokens.numpy()]
    own = EvalSet(users, histories, np.zeros(len(users), np.int64), seen=None, negatives=None)
    found = similarities(LanguageModel(model).eval(), own, device=torch.device("cpu"))
    influence, angular = by_hand(model, tokens)
    neighbours = found.angular.diagonal(1)
    print(f"{len(tokens)} texts of {LENGTH} tokens; perplexity with all blocks {whole:.2f}\n")
    print("| block | influence | by hand | angular distance | by hand | perplexity without it |")
    print("|---|---|---|---|---|---|")
    lost = []
    for block, values in enumerate(
        zip(found.influence, influence, neighbours, angular, strict=True)
    ):
        with dp.skip_blocks(model, {block}):
            lost.append(perplexity(model, tokens))
        cells = [*(f"{value:.4f}" for value in values), f"{lost[-1]:.2f}"]
        print(f"| {block} | {' | '.join(cells)} |", flush=True)
    if asked.draw:
        draw(found.influence, np.array(lost), whole, asked.draw)


if __name__ == "__main__":
    main()
