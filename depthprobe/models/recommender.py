"""The LLM recommender: prompt, item history, pretrained blocks, dot product with the item table.

SLMRec and E4SRec's model: item embedding -> input adapter -> blocks -> output adapter -> scores.
It reads the next item out at *every* position of a history, so one pass trains all its targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from depthprobe.models.blocks import find_blocks, find_decoder
from depthprobe.models.prefix import can_share_prompt, shared_prompt


class Recommender(nn.Module):
    """A causal decoder between an item table and itself.

    Histories are right-padded with 0: under a causal mask no real position sees the padding, so no
    mask is needed and nothing is attended in vain.
    """

    prompt: Tensor

    def __init__(self, backbone: PreTrainedModel, items: Tensor, prompt: Sequence[int]) -> None:
        """Wrap a backbone; the adapters are initialised from torch's global generator.

        Args:
            backbone: a causal language model or its base model; the blocks are used in place.
            items: item table, (I + 1, d_item); row 0 is padding. It is kept frozen.
            prompt: token ids of the prompt before the items; empty for none.
        """
        super().__init__()
        self.backbone = find_decoder(backbone)
        self.items = nn.Embedding.from_pretrained(items.clone(), freeze=True, padding_idx=0)
        self.input_adapter = nn.Linear(items.shape[1], self.token_embeddings.weight.shape[1])
        self.output_adapter = nn.Linear(_output_width(backbone), items.shape[1])
        self.register_buffer("prompt", torch.tensor(list(prompt), dtype=torch.long))
        #: positions before the first item in every row of a pass: the prompt, where the backbone
        #: remembers it in a form that can't be shared; 0 elsewhere
        self.lead = len(self.prompt)
        if self.lead and can_share_prompt(self.backbone):
            self.lead = 0
        self._match_scale()

    @torch.no_grad()
    def _match_scale(self) -> None:
        """Let adapted items start as large as the token embeddings the blocks were trained on."""
        tokens = self.token_embeddings.weight
        self.input_adapter.bias.zero_()
        adapted = self.input_adapter(self.items.weight[1:])
        self.input_adapter.weight.mul_(tokens.float().std() / adapted.std().clamp_min(1e-8))

    @property
    def token_embeddings(self) -> nn.Embedding:
        """The backbone's input embeddings; only the prompt reads them."""
        return cast("nn.Embedding", self.backbone.get_input_embeddings())

    @property
    def width(self) -> int:
        """D, the width of the states between blocks."""
        return int(self.backbone.config.get_text_config(decoder=True).hidden_size)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(find_blocks(self.backbone))

    def item_matrix(self) -> Tensor:
        """What user vectors are scored against, (I + 1, d_item); row 0 is padding."""
        matrix: Tensor = self.items.weight
        return matrix

    def read_out(self, states: Tensor) -> Tensor:
        """Normed states (..., D) to user vectors (..., d_item)."""
        vectors: Tensor = self.output_adapter(states)
        return vectors

    def prepare_prompt(self) -> Cache | None:
        """The prompt's keys and values at the present weights; None where none are shared."""
        if not len(self.prompt) or self.lead:
            return None
        tokens = self.token_embeddings(self.prompt)[None]  # (1, P, D)
        return shared_prompt(self.backbone, tokens)

    def inputs(self, histories: Tensor, prompt: Cache | None) -> dict[str, Any]:
        """Arguments of the backbone for histories (B, T); ``prompt`` is what has already run."""
        embeddings = self.input_adapter(self.items(histories))  # (B, T, D)
        if self.lead:
            tokens = self.token_embeddings(self.prompt).expand(len(histories), -1, -1)
            embeddings = torch.cat([tokens.to(embeddings.dtype), embeddings], dim=1)  # (B, P+T, D)
        first = len(self.prompt) - self.lead
        positions = torch.arange(first, first + embeddings.shape[1], device=histories.device)
        return {
            "inputs_embeds": embeddings.to(self.backbone.dtype),
            "position_ids": positions[None],
            "past_key_values": prompt,
            "use_cache": False,
        }

    def states(self, histories: Tensor, prompt: Cache | None = None) -> Tensor:
        """Normed states of every position, (B, T, D); runs the prompt if it is not given."""
        prompt = prompt or self.prepare_prompt()
        out = self.backbone(**self.inputs(histories, prompt))
        last: Tensor = out.last_hidden_state[:, self.lead :]
        return last.to(self.output_adapter.weight.dtype)

    def forward(self, histories: Tensor) -> Tensor:
        """User vectors at every position, (B, T) item ids -> (B, T, d_item)."""
        return self.read_out(self.states(histories))

    def encode(self, histories: Tensor, lengths: Tensor, prompt: Cache | None = None) -> Tensor:
        """User vectors after the last item, (B, T) and (B,) -> (B, d_item)."""
        return self.read_out(last_positions(self.states(histories, prompt), lengths))


def _output_width(backbone: PreTrainedModel) -> int:
    """The width of a decoder's last hidden state: what the head that reads it expects."""
    head: Any = backbone.get_output_embeddings()
    if head is not None and any(child is head for child in backbone.children()):
        return int(head.weight.shape[1])  # not the hidden size where a projection follows (OPT)
    return int(backbone.config.get_text_config(decoder=True).hidden_size)


def last_positions(states: Tensor, lengths: Tensor) -> Tensor:
    """The state of each user's last item, (B, T, D) and (B,) -> (B, D)."""
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, lengths - 1]
