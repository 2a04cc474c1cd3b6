"""The LLM recommender, the popularity baseline, and the best items of a row of scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from depthprobe.models.blocks import (
    find_blocks,
    find_decoder,
    has_per_layer,
    no_token,
    per_layer,
    token_embeddings,
)
from depthprobe.models.prompt import (
    ExactAttention,
    PromptOfStep,
    cache_argument,
    can_share_prompt,
    checkpointed_blocks,
    first_position,
    shared_prompt,
    take_over,
)
from depthprobe.models.words import Words


def best_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of each row, best first, the lower column first on ties.

    The result of a stable sort of each row for the price of a ``topk``. ``topk`` finds the values,
    but chooses arbitrarily among the columns that share the k-th value. Only rows with more such
    columns than places are looked at again. Scores are (C, I) and may be infinite; returns columns,
    int64 (C, k), and their scores (C, k).
    """
    width = scores.shape[1]
    values, columns = scores.topk(min(k + 1, width), dim=1)  # (C, k + 1)
    if k < width:
        # rows where places k and k + 1 have the same value, (R,)
        over = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        values, columns = values[:, :k], columns[:, :k]
        # a quarter at a time: the work takes no more memory than the scores themselves
        for rows in over.split(len(scores) // 4 + 1):
            columns[rows] = _lowest(scores[rows], values[rows], columns[rows])
    # by column, then by score with a stable sort: ties stay in the order of their columns
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), values


def _lowest(scores: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """(R, k) columns of a ``topk``, those with the last value replaced by the lowest such ones."""
    width, k = scores.shape[1], values.shape[1]
    limit = values[:, -1:]  # (R, 1)
    # the columns with the last value, lowest first; every other column counts as ``width``
    places = torch.arange(width, dtype=torch.int32, device=scores.device)
    level = torch.where(scores == limit, places, width)  # (R, I)
    lowest = level.topk(k, dim=1, largest=False).indices  # (R, k)
    # columns above that value stay; after them, place n takes the n-th lowest
    above = values != limit
    ahead = above.sum(dim=1, keepdim=True)
    turn = (torch.arange(k, device=scores.device) - ahead).clamp(min=0)
    return torch.where(above, columns, lowest.gather(1, turn))


ROW_BYTES = 16 * 2**20  # of int8 rows dequantised at a time


def is_quantized(weight: object) -> bool:
    """Whether a weight is one of torchao's."""
    return hasattr(weight, "tensor_data_names")


def dequantized(weight: Any) -> Tensor:
    """The numbers that torchao's weight represents."""
    return weight.dequantize()  # type: ignore[no-any-return]


def score(vectors: Tensor, matrix: Tensor, out: Tensor | None = None, *, first: int = 0) -> Tensor:
    """``vectors @ matrix[first:].T``, (B, d) and (I, d); int8 rows are dequantised in chunks."""
    if not is_quantized(matrix):
        return torch.mm(vectors, matrix[first:].T, out=out)
    own: Any = matrix
    rows, scales = own.qdata[first:], own.scale[first:]  # (I, d), (I, 1)
    scores = vectors.new_empty(len(vectors), len(rows)) if out is None else out
    size = max(1, ROW_BYTES // (vectors.element_size() * rows.shape[1]))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        numbers = rows[part].to(vectors.dtype) * scales[part].to(vectors.dtype)
        torch.mm(vectors, numbers.T, out=scores[:, part])
    return scores


# The popularity baseline: every user gets the items that the training parts hold most often.


class Popularity(nn.Module):
    """Scores are counts in the training interactions; nothing is learned from the history."""

    counts: Tensor

    def __init__(self, items: np.ndarray, n_items: int) -> None:
        """Count training interactions, item ids 1..I of shape (N,)."""
        super().__init__()
        counts = np.bincount(items, minlength=n_items + 1).astype(np.float32)
        self.register_buffer("counts", torch.from_numpy(counts)[:, None])

    def item_matrix(self) -> Tensor:
        """Counts, (I + 1, 1)."""
        return self.counts

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """The vector 1 for every user, (B, 1)."""
        return torch.ones(len(histories), 1, device=histories.device)


# The LLM recommender: prompt, item history, pretrained blocks, scores of the items.
#
# SLMRec's model: item embedding -> input adapter -> blocks -> output adapter -> dot product with
# the item table; or E4SRec's: a linear map from the last state to the items. It reads the next item
# out after *every* item of a history, so one pass trains all its targets; or, after a suffix of
# tokens, once a user, which is the layout of both papers. An item is one position; or, where
# histories are read in words, as many as its title has tokens.


class Recommender(nn.Module):
    """A causal decoder between an item table and itself.

    Histories are right-padded with 0: under a causal mask no real position sees the padding, so no
    padding mask is needed.
    """

    prompt: Tensor
    suffix: Tensor

    def __init__(
        self,
        backbone: PreTrainedModel,
        items: Tensor,
        prompt: Sequence[int],
        *,
        suffix: Sequence[int] = (),
        head: Literal["dot", "linear"] = "dot",
        words: Words | None = None,
    ) -> None:
        """Wrap a backbone; the adapters are initialised from torch's global generator.

        Args:
            backbone: a causal language model or its base model; the blocks are used in place.
            items: item table, (I + 1, d_item); row 0 is padding. It is frozen at first.
            prompt: token ids of the prompt before the items; empty for none.
            suffix: token ids after the last item; with any, users are read out once, after them.
            head: scores by the dot product with the item table, through an adapter, or by a linear
                map from the state to the items, (I + 1, D).
            words: the tokens of each item, where histories are read in words.
        """
        super().__init__()
        self.backbone = find_decoder(backbone)
        self.items = nn.Embedding.from_pretrained(items.clone(), freeze=True, padding_idx=0)
        self.words = words
        self.input_adapter: nn.Linear | None = None  # tokens have the backbone's width
        if words is None:
            self.input_adapter = nn.Linear(items.shape[1], self.token_embeddings.weight.shape[1])
        width = _output_width(backbone)
        self.output_adapter = nn.Linear(width, items.shape[1]) if head == "dot" else None
        self.head = nn.Linear(width, len(items), bias=False) if head == "linear" else None
        self.register_buffer("prompt", torch.tensor(list(prompt), dtype=torch.long))
        self.register_buffer("suffix", torch.tensor(list(suffix), dtype=torch.long))
        #: positions before the first item in every row of a pass: the prompt, if the backbone's
        #: memory of it can't be shared; otherwise 0
        self.lead = len(self.prompt)
        if self.lead and can_share_prompt(self.backbone):
            self.lead = 0
        self.first = first_position(self.backbone)  # position id of the first token
        self.cache_argument = cache_argument(self.backbone)
        self._step: list[PromptOfStep] | None = None  # the prompt's run inside ``one_prompt``
        #: whether training computes the blocks again in the backward pass, to save memory
        self.checkpointing = False
        if self.input_adapter is not None:
            self._match_scale(self.input_adapter)

    @torch.no_grad()
    def _match_scale(self, adapter: nn.Linear) -> None:
        """Scale the adapter so that items start as large as the token embeddings."""
        tokens: Tensor = self.token_embeddings.weight
        if is_quantized(tokens):
            tokens = dequantized(tokens)
        adapter.bias.zero_()
        adapted = adapter(self.items.weight[1:])
        adapter.weight.mul_(tokens.float().std() / adapted.std().clamp_min(1e-8))

    @property
    def token_embeddings(self) -> nn.Embedding:
        """The backbone's input embeddings, of prompt, suffix and words."""
        return token_embeddings(self.backbone)

    @property
    def width(self) -> int:
        """D, the width of the states between blocks."""
        return int(self.backbone.config.get_text_config(decoder=True).hidden_size)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(find_blocks(self.backbone))

    @property
    def prompt_mode(self) -> Literal["shared", "repeated", "none"]:
        """How the prompt is computed: once per pass, once per user, or not at all."""
        if not len(self.prompt):
            return "none"
        return "repeated" if self.lead else "shared"

    def checkpoint_blocks(self, on: bool = True) -> None:
        """Store only each block's input in training, and compute the blocks twice, to save memory.

        Loss and gradients are the same. It replaces the backbone's own method, whose blocks drop
        the shared prompt; if that was switched on, this takes over.
        """
        self.checkpointing = on

    def _running(self) -> AbstractContextManager[Any]:
        """The context in which the backbone runs."""
        exact = self.backbone.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        own = ExactAttention() if exact else nullcontext()
        if not self.backbone.training:
            return own
        if take_over(self.backbone):
            self.checkpointing = True
        if self.checkpointing and torch.is_grad_enabled():
            return checkpointed_blocks(self.backbone)  # a second run is outside other contexts
        return own

    def item_matrix(self) -> Tensor:
        """The matrix that scores user vectors, (I + 1, d); row 0 is padding."""
        matrix: Tensor = self.items.weight if self.head is None else self.head.weight
        return matrix

    def read_out(self, states: Tensor) -> Tensor:
        """Normed states (..., D) to user vectors (..., d): d_item, or D with a linear head."""
        vectors: Tensor = states if self.output_adapter is None else self.output_adapter(states)
        return vectors

    def last_place(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """The place in a block's output where users are read out: (B, T) and (B,) -> (B,)."""
        return self._text_lengths(histories, lengths) - 1 + self.lead + len(self.suffix)

    def _text_lengths(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """How many positions each history's items take, (B, T) and (B,) -> (B,)."""
        if self.words is None:
            return lengths
        return self.words.ends(histories).gather(1, lengths[:, None] - 1)[:, 0] + 1

    def after_items(self, states: Tensor, histories: Tensor) -> Tensor:
        """Of a block's output (B, lead + S, D), the states after each item, (B, T, D)."""
        own = states[:, self.lead :]
        if self.words is None:
            return own
        ends = self.words.ends(histories)  # (B, T)
        return own.gather(1, ends[..., None].expand(-1, -1, own.shape[-1]))

    def positions(self, histories: Iterable[np.ndarray]) -> list[int]:
        """How many positions these histories of item ids take, without prompt and suffix."""
        return [len(h) for h in histories] if self.words is None else self.words.lengths(histories)

    def prepare_prompt(self) -> Cache | None:
        """The prompt's keys and values at the present weights; None if they can't be shared."""
        if not len(self.prompt) or self.lead:
            return None
        shares = self._step is not None and torch.is_grad_enabled()
        if shares and self._step:
            return self._step[0].cache
        with self._running():
            cache = shared_prompt(self.backbone, self.prompt, first=self.first)
        if not shares:
            return cache
        self._step = [PromptOfStep(cache)]
        return self._step[0].cache

    @contextmanager
    def one_prompt(self) -> Iterator[None]:
        """Passes inside run a shared prompt once, although each is followed by a backward pass.

        They must run the same blocks with the same weights. The prompt's own backward pass comes on
        leaving.
        """
        self._step = []
        try:
            yield
            for prompt in self._step:
                prompt.backward()
        finally:
            self._step = None

    def embed(self, histories: Tensor) -> Tensor:
        """Items in the backbone's width: one vector or some tokens each, (B, T) -> (B, S, D)."""
        if self.input_adapter is None:
            vectors: Tensor = self.token_embeddings(self._item_ids(histories))
        else:
            vectors = self.input_adapter(self.items(histories))
        return vectors

    def inputs(
        self, histories: Tensor, lengths: Tensor | None, prompt: Cache | None
    ) -> dict[str, Any]:
        """The backbone's arguments for histories (B, T); ``prompt`` has already run."""
        embeddings = self.embed(histories)  # (B, S, D)
        # the suffix follows each user's last item
        if len(self.suffix):
            if lengths is None:
                raise ValueError("a recommender with a suffix reads users out once, after it")
            tokens = self.token_embeddings(self.suffix).to(embeddings.dtype)
            ends = self._text_lengths(histories, lengths)
            embeddings = _insert(embeddings, tokens, ends)  # (B, T+S, D)
        # a prompt that can't be shared precedes every user's items
        if self.lead:
            tokens = self.token_embeddings(self.prompt).expand(histories.shape[0], -1, -1)
            embeddings = torch.cat([tokens.to(embeddings.dtype), embeddings], dim=1)  # (B, P+T, D)
        # a shared one is in the cache: positions continue after it
        first = self.first + len(self.prompt) - self.lead
        positions = torch.arange(first, first + embeddings.shape[1], device=histories.device)
        beside = {}
        if has_per_layer(self.backbone):
            beside = per_layer(self.backbone, self._token_ids(histories, lengths))
        return beside | {
            "inputs_embeds": embeddings.to(self.backbone.dtype),
            "position_ids": positions[None],
            self.cache_argument: prompt,
            "use_cache": False,
        }

    def _token_ids(self, histories: Tensor, lengths: Tensor | None) -> Tensor:
        """The token at each position of a pass, (B, lead + T + S)."""
        ids = self._item_ids(histories)
        if len(self.suffix) and lengths is not None:
            ends = self._text_lengths(histories, lengths)
            ids = _insert(ids[..., None], self.suffix[:, None], ends)[..., 0]
        if self.lead:
            ids = torch.cat([self.prompt.expand(ids.shape[0], -1), ids], dim=1)
        return ids

    def _item_ids(self, histories: Tensor) -> Tensor:
        """The tokens of the items; for items that are vectors, the id for no token."""
        if self.words is None:
            return torch.full_like(histories, no_token(self.backbone))
        text: Tensor = self.words(histories)
        return text

    def states(
        self, histories: Tensor, lengths: Tensor | None = None, prompt: Cache | None = None
    ) -> Tensor:
        """Normed states of all positions, (B, lead + T + S, D), with S positions for the suffix.

        Arguments are those of a call.
        """
        return self.forward(histories, lengths, prompt, states=True)

    def forward(
        self,
        histories: Tensor,
        lengths: Tensor | None = None,
        prompt: Cache | None = None,
        *,
        states: bool = False,
    ) -> Tensor:
        """User vectors after every item, (B, T, d); with lengths after the last one, (B, d).

        Args:
            histories: (B, T) item ids, right-padded with 0.
            lengths: (B,); needed where the suffix follows the last item.
            prompt: the result of ``prepare_prompt``; without it the prompt is run.
            states: return what :meth:`states` does.
        """
        prompt = prompt or self.prepare_prompt()
        with self._running():
            out = self.backbone(**self.inputs(histories, lengths, prompt))
        last: Tensor = out.last_hidden_state.to(self.item_matrix().dtype)
        if states:
            return last
        if lengths is None:
            return self.read_out(self.after_items(last, histories))
        return self.read_out(states_at(last, self.last_place(histories, lengths)))

    encode = forward  # with lengths: user vectors after the last item and the suffix, (B, d)


def one_prompt(module: nn.Module) -> AbstractContextManager[Any]:
    """Within it every recommender of a module runs its prompt once: see ``Recommender.one_prompt``.

    For steps in several parts. Not for several processes, where the last part's backward pass
    exchanges the gradients, nor for compiled models, whose code has the prompt inside.
    """
    stack = ExitStack()
    for each in module.modules():
        if isinstance(each, Recommender):
            stack.enter_context(each.one_prompt())
    return stack


def _output_width(backbone: PreTrainedModel) -> int:
    """The width of a decoder's last hidden state, taken from the head that reads it."""
    head: Any = backbone.get_output_embeddings()
    if head is not None and any(child is head for child in backbone.children()):
        return int(head.weight.shape[1])  # not the hidden size if a projection follows (OPT)
    return int(backbone.config.get_text_config(decoder=True).hidden_size)


def _insert(embeddings: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Insert tokens (S, D) directly after each row's items: (B, T, D) and (B,) -> (B, T + S, D).

    The padding moves after them, where a causal model does not see it.
    """
    longer = torch.cat([embeddings, tokens.expand(embeddings.shape[0], -1, -1)], dim=1)
    # which token of the suffix a position holds: 0 directly after the last item
    place = torch.arange(longer.shape[1], device=lengths.device) - lengths[:, None]  # (B, T + S)
    inside = (place >= 0) & (place < len(tokens))
    return torch.where(inside[..., None], tokens[place.clamp(0, len(tokens) - 1)], longer)


def states_at(states: Tensor, places: Tensor) -> Tensor:
    """The state of each user at one place, (B, T, D) and (B,) -> (B, D)."""
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, places]
