"""Histories in words: a user's items written as text, one title after the other.

A causal model's state at the end of a title is its state after that item. So one pass over the text
reads a user out after every item, as it does for items that are vectors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.errors import BadInput
from depthprobe.models.backbones import pretrained_tokenizer
from depthprobe.models.item_tables import item_texts
from depthprobe.study import TITLE, Backbone

FIELD = "backbone.reads"
POSITIONS = 16_384  # of texts read at a time, without gradients


class Words(nn.Module):
    """The tokens of each item of a catalogue."""

    tokens: Tensor
    sizes: Tensor

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        """Take the token ids of items 1..I, at least one each."""
        super().__init__()
        sizes = np.array([0, *map(len, tokens)])  # row 0 is padding: no tokens
        table = np.zeros((len(sizes), sizes.max(initial=1)), dtype=np.int64)  # (I + 1, W)
        table[np.arange(table.shape[1]) < sizes[:, None]] = np.concatenate([[], *tokens])
        self.register_buffer("tokens", torch.from_numpy(table))
        self.register_buffer("sizes", torch.from_numpy(sizes))

    def ends(self, histories: Tensor) -> Tensor:
        """The position of each item's last token in its user's text, (B, T) -> (B, T).

        Padding gets the position of the item before it.
        """
        return self.sizes[histories].cumsum(dim=1) - 1

    def forward(self, histories: Tensor) -> Tensor:
        """Texts of histories of item ids: (B, T) -> (B, S) token ids, right-padded with 0."""
        if self.tokens.shape[1] == 1:
            return self.tokens[histories][..., 0]
        # only gathers, which torch.export can follow
        sizes = self.sizes[histories]  # (B, T)
        ends = sizes.cumsum(dim=1)
        longest = ends.max()
        if torch.compiler.is_exporting():  # attention branches on a single position
            longest = longest.clamp(min=2)
            torch._check(longest.item() > 1)
        places = torch.arange(longest.item(), device=histories.device)  # (S,)
        # the item at each position, and which of its tokens
        item = (places[:, None] >= ends[:, None, :]).sum(dim=-1)  # (B, S)
        item = item.clamp(max=histories.shape[1] - 1)
        token = places - (ends - sizes).gather(1, item)
        token = token.clamp(max=self.tokens.shape[1] - 1)
        text = self.tokens[histories.gather(1, item), token]
        return torch.where(places < ends[:, -1:], text, 0)

    def listed(self) -> list[list[int]]:
        """The token ids of items 1..I."""
        pairs = zip(self.tokens[1:].tolist(), self.sizes[1:].tolist(), strict=True)
        return [tokens[:size] for tokens, size in pairs]

    def lengths(self, histories: Iterable[np.ndarray]) -> list[int]:
        """How many tokens each of these histories of item ids has."""
        sizes = self.sizes.cpu().numpy()
        return [int(sizes[history].sum()) for history in histories]


def item_tokens(
    settings: Backbone, item_ids: Sequence[str], titles: Sequence[str] | None
) -> list[list[int]] | None:
    """Token ids of the text of items 1..I; None where items are read as vectors.

    An item's text is its title, cut to ``title_tokens``, in the template; or its raw id where it
    has no title. ``BadInput`` if there are no titles, or the tokenizer reads nothing of one.
    """
    if settings.reads == "items":
        return None
    tokenizer = pretrained_tokenizer(settings)
    before, after = settings.title_template.split(TITLE)

    def read(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    # tokenise what precedes a title with it: a blank there may be part of its first word
    longest, end = len(read(before)) + settings.title_tokens, read(after)
    found = []
    for text in item_texts(item_ids, titles, field=FIELD, asked=settings.reads):
        ids = read(before + " ".join(text.split()))[:longest] + end
        if not ids:
            raise BadInput(FIELD, settings.reads, f"titles that can be read (in {text!r} nothing)")
        found.append(ids)
    return found


def look_alikes(tokens: Sequence[Sequence[int]]) -> list[str]:
    """A warning if items have the same tokens: no history can tell them apart."""
    counts = Counter(map(tuple, tokens))
    alike = sum(count for count in counts.values() if count > 1)
    if not alike:
        return []
    what = f"{alike:,} of {len(tokens):,} items read like another one"
    return [f"{what}: titles that are the same, or the same as far as they are read"]
