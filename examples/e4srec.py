"""A checkpoint in E4SRec's layout (Li et al., arXiv 2312.02443).

Its training leaves, beside the base model that it names: ``adapter.pth`` with the states of
``input_proj`` and ``score``, a PEFT adapter (``adapter_config.json``, ``adapter_model.*``), and the
frozen item embeddings of a SASRec. Those it pickles, so save them once as ``item_embed.npy``; row i
of them, and of ``score``, is item i, and row 0 pads.

    export E4SREC_BASE=BASE E4SREC=FOLDER
    depthprobe sweep --recommender examples.e4srec:build --data LOG --set recipe.objective=last

E4SRec pads on the left, between the instruction and the items; here a history is as in E4SRec's
batches of one user, without padding.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

INSTRUCTION = (  # its template "alpaca", sequential
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Given the user\u2019s purchase history, predict next possible item to be purchased."
    "\n\n### Input:\n"
)
RESPONSE = "\n### Response:\n"


class E4SRec(nn.Module):
    """Instruction, items through ``input_proj``, response; ``score`` reads the last state."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        items: Tensor,
        instruction: list[int],
        response: list[int],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.item_ids = [str(number) for number in range(1, len(items))]  # those of its data.txt
        width = backbone.config.hidden_size
        self.input_embeds = nn.Embedding.from_pretrained(items, freeze=True)
        self.input_proj = nn.Linear(items.shape[1], width)
        self.score = nn.Linear(width, len(items), bias=False)
        self.register_buffer("instruction", torch.tensor(instruction))
        self.register_buffer("response", torch.tensor(response))

    def states(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) items -> (B, I + T + R, D) behind the final norm."""
        users, tokens = histories.shape[0], self.backbone.get_input_embeddings()
        before = tokens(self.instruction).expand(users, -1, -1)  # (B, I, D)
        after = tokens(self.response).expand(users, -1, -1)  # (B, R, D)
        items = self.input_proj(self.input_embeds(histories))  # (B, T, D)
        rows = torch.cat([before, items, after], dim=1)
        # the padding behind a history goes to the end, where nobody sees it
        place = torch.arange(rows.shape[1], device=rows.device)[None]
        end = len(self.instruction) + lengths[:, None]
        padding = histories.shape[1] - lengths[:, None]
        source = torch.where(place < end, place, (place + padding).clamp(max=rows.shape[1] - 1))
        rows = rows.gather(1, source[..., None].expand_as(rows))
        return self.backbone(inputs_embeds=rows, use_cache=False).last_hidden_state

    def last_place(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """The end of the response, (B,)."""
        return len(self.instruction) + lengths + len(self.response) - 1

    def item_matrix(self) -> Tensor:
        """(items + 1, D)."""
        return self.score.weight


def build() -> E4SRec:
    """Read base model, adapter, maps and item embeddings."""
    base, folder = os.environ["E4SREC_BASE"], Path(os.environ["E4SREC"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    instruction, response = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (INSTRUCTION, RESPONSE)
    )
    backbone = AutoModel.from_pretrained(base, dtype=torch.float32)
    backbone = PeftModel.from_pretrained(backbone, folder).merge_and_unload()
    items = torch.from_numpy(np.load(folder / "item_embed.npy")).float()
    model = E4SRec(backbone, items, instruction, response)
    maps = torch.load(folder / "adapter.pth", map_location="cpu", weights_only=True)
    model.input_proj.load_state_dict(maps["input_proj"])
    model.score.load_state_dict(maps["score"])
    return model.requires_grad_(True)
