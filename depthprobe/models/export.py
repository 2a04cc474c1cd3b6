"""Exported recommenders: a plain Hugging Face checkpoint with the recommender's parts.

``FOLDER/config.json, model.safetensors, tokenizer``: the cut backbone, as transformers reads it.
``FOLDER/recommender.safetensors, recommender.json``: adapters, item table, head, item ids, prompt.
SASRec has no backbone, so it has only these two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NotRequired, TypedDict, Unpack, cast

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.models.backbones import load_backbone
from depthprobe.models.build import build_sasrec, fill, save_weights
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.exits import LIST, Exit, encode_settled
from depthprobe.models.own import OwnRecommender, code_of, load_own
from depthprobe.models.precision import compute_in_bfloat16, resolve_device
from depthprobe.models.quantize import (
    Int8Rows,
    load_parts,
    make_ready,
    mark,
    put_back,
    save_parts,
)
from depthprobe.models.recommender import (
    Recommender,
    best_columns,
    dequantized,
    is_quantized,
    score,
)
from depthprobe.models.sasrec import SASRec
from depthprobe.models.tiny import ends_at_positions, positions_of
from depthprobe.models.words import POSITIONS, Words
from depthprobe.study import SasRecSettings

PARTS, CARD = "recommender.safetensors", "recommender.json"
BATCH = 256  # users encoded at once
SCORE_BYTES = 64 * 2**20  # of scores at a time; at least one user's
ITEMS, ROWS = "items", "items.weight"  # the table; in fewer bits it has several parts
OWN = ("input_adapter.", "output_adapter.", "head.")  # the recommender's parts, by their names
# in every torch, and deterministic on a device; other kernels are the server's choice
Attention = Literal["auto", "eager", "sdpa"]
ATTENTIONS: dict[str, Attention] = {"eager": "eager", "sdpa": "sdpa"}


class SasRecShape(msgspec.Struct):
    """What decides the shapes of SASRec's weights, besides the items and the longest history."""

    width: int
    blocks: int
    heads: int


class OwnShape(msgspec.Struct):
    """A user's own recommender: the function that builds it, and the kept blocks."""

    source: str
    kept: list[int]


class Card(msgspec.Struct, kw_only=True):
    """The content of ``recommender.json``; ``sasrec`` and ``own`` for these kinds only."""

    schema: Literal[1]
    sasrec: SasRecShape | None = None
    own: OwnShape | None = None
    prompt: list[Annotated[int, msgspec.Meta(ge=0)]]
    suffix: list[Annotated[int, msgspec.Meta(ge=0)]] = []
    head: Literal["dot", "linear"] = "dot"
    tokens: list[list[Annotated[int, msgspec.Meta(ge=0)]]] | None = None
    max_history: Annotated[int, msgspec.Meta(ge=1)]
    filter_seen: bool
    attention: Attention = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    item_ids: Annotated[list[str], msgspec.Meta(min_length=1)]
    titles: list[str] | None
    exit: Exit | None = None

    def __post_init__(self) -> None:
        if len(set(self.item_ids)) < len(self.item_ids):
            raise ValueError("an item id twice")
        if self.tokens is not None and list(map(bool, self.tokens)) != [True] * len(self.item_ids):
            raise ValueError(f"tokens that are not some for each of {len(self.item_ids)} items")
        if self.titles is not None and len(self.titles) != len(self.item_ids):
            raise ValueError(f"{len(self.titles)} titles of {len(self.item_ids)} items")


class Served(TypedDict):
    """What a card says of items and histories for every model, under the card's names."""

    item_ids: list[str]
    titles: list[str] | None
    max_history: int
    filter_seen: bool
    precision: NotRequired[Literal["float32", "bfloat16"]]  # that the model was evaluated in


class Recommendation(NamedTuple):
    """One recommended item."""

    item: str
    title: str | None
    score: float


@dataclass(frozen=True, eq=False)
class ExportedRecommender:
    """Top items for histories of raw item ids."""

    model: Recommender | SASRec
    item_ids: list[str]
    titles: list[str] | None
    max_history: int
    filter_seen: bool
    #: when a user's answer counts as settled; None where that was not calibrated
    exit: Exit | None = None
    #: of early exit, how many users were answered after how many blocks
    depths: Counter[int] = field(default_factory=Counter)

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Raw item id -> row of the item table, 1 to I."""
        return {raw: number for number, raw in enumerate(self.item_ids, start=1)}

    @torch.inference_mode()
    def recommend(
        self, histories: Sequence[Sequence[str]], top: int = 10, *, exit: bool = False
    ) -> list[list[Recommendation]]:
        """The ``top`` best items of each history (raw item ids, oldest first), best first.

        Items of the history are left out if the model was evaluated that way. On ties the item that
        comes first in the catalogue is first. At most 256 users are encoded at a time and 64 MiB of
        scores exist at a time; pass a large file in parts of a few thousand lines.

        With ``exit``, users are served from the block after which their answer has settled, and
        later blocks run only for the others.

        Raises:
            BadInput: for an empty history, an item that the catalogue doesn't hold, or a ``top``
                that is not between 1 and the number of items; for a score that is no number; for
                ``exit`` of a model that was not exported with one.
        """
        rule = self.exit_rule() if exit else None
        if not 1 <= top <= len(self.item_ids):
            raise BadInput("top", top, f"a whole number from 1 to {len(self.item_ids)}")
        known = [self._numbered(history) for history in histories]
        model, titles = self.model, self.titles or [""] * len(self.item_ids)
        recent = [history[-self.max_history :] for history in known]
        prompt: tuple[Cache | None, ...] = ()
        sizes, in_words = list(map(len, recent)), False
        if isinstance(model, Recommender):
            prompt = (model.prepare_prompt(),)
            sizes, in_words = model.positions(recent), model.words is not None
        # users of similar length together, to compute less padding
        order = sorted(range(len(known)), key=sizes.__getitem__)
        answers: list[list[Recommendation]] = [[] for _ in known]
        while order:
            # the longest first; fewer at a time if histories are titles
            room = BATCH
            if in_words:
                room = max(1, min(BATCH, POSITIONS // sizes[order[-1]]))
            batch, order = order[-room:], order[:-room]
            own = [known[p] for p in batch]
            padded = self._padded(own)
            if rule is None:
                vectors = model.encode(*padded, *prompt)  # (B, d)
            else:
                vectors = self._settled(padded, prompt, own, rule)
            best = [each.tolist() for each in self._best(vectors, own, top)]
            for place, items, scores in zip(batch, *best, strict=True):
                answers[place] = [
                    Recommendation(self.item_ids[item - 1], titles[item - 1] or None, score)
                    for item, score in zip(items, scores, strict=True)
                    if score > -torch.inf
                ]
        return answers

    def exit_rule(self) -> Exit:
        """The rule of early exit; ``BadInput`` if none was calibrated."""
        if self.exit is None:
            allowed = "a rule in the export (depthprobe export RUN TRIAL DIR --exit M finds one)"
            raise BadInput("exit", "none", allowed)
        return self.exit

    def _settled(
        self,
        padded: tuple[Tensor, Tensor],
        prompt: Sequence[Cache | None],
        own: list[np.ndarray],
        rule: Exit,
    ) -> Tensor:
        """User vectors, each from the block after which the user's answer had settled, (B, d)."""

        def best(rows: Tensor, vectors: Tensor) -> Tensor:
            items, scores = self._best(vectors, [own[row] for row in rows.tolist()], LIST)
            return items.masked_fill(scores == -torch.inf, 0)

        model = cast("Recommender", self.model)
        vectors, depths = encode_settled(model, *padded, *prompt, same=rule.same, best=best)
        self.depths.update(depths.tolist())
        return vectors

    def _numbered(self, history: Sequence[str]) -> np.ndarray:
        """The rows of a history's items in the item table, int64 (T,)."""
        if not len(history):
            raise BadInput("history", "", "at least one item id a user")
        for raw in history:
            if str(raw) not in self.numbers:
                allowed = f"an item id of the {len(self.numbers)} in the catalogue"
                raise BadInput("history", raw, allowed)
        return np.array([self.numbers[str(raw)] for raw in history], dtype=np.int64)

    def _padded(self, histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Right-padded latest items (B, T) and lengths (B,), on the model's device."""
        recent = [torch.from_numpy(history[-self.max_history :]) for history in histories]
        padded = torch.nn.utils.rnn.pad_sequence(recent, batch_first=True)  # (B, T)
        device = self.model.item_matrix().device
        return padded.to(device), torch.tensor([len(h) for h in recent], device=device)

    def _best(
        self, vectors: Tensor, histories: list[np.ndarray], top: int
    ) -> tuple[Tensor, Tensor]:
        """Items 1..I and scores, the best ``top`` of each user; excluded ones have -inf."""
        size = max(1, SCORE_BYTES // (4 * (len(self.item_ids) + 1)))  # users scored at once
        parts = [
            best_columns(self._scores(vectors[first : first + size], histories[first:]), top)
            for first in range(0, len(vectors), size)
        ]
        items, scores = zip(*parts, strict=True)
        return torch.cat(items), torch.cat(scores)  # (B, top)

    def _scores(self, vectors: Tensor, histories: list[np.ndarray]) -> Tensor:
        """Scores of all items, (B, I + 1); -inf for excluded ones."""
        scores = score(vectors, self.model.item_matrix())
        if scores.isnan().any():
            allowed = "weights that give numbers as scores (they overflow, or are damaged)"
            raise BadInput("recommender", "NaN", allowed)
        scores[:, 0] = -torch.inf
        if self.filter_seen:
            for row, history in enumerate(histories[: len(scores)]):
                scores[row, torch.from_numpy(history).to(scores.device)] = -torch.inf
        return scores


def write_recommender(
    folder: Path,
    model: Recommender,
    backbone: PreTrainedModel,
    *,
    attention: str = "auto",
    **served: Unpack[Served],
) -> None:
    """Write a trained recommender; see the module for the layout.

    The backbone is the causal language model of the same depth, with the trained weights;
    ``attention`` is the implementation that it was evaluated with.
    """
    mark(backbone)
    backbone.save_pretrained(folder)
    table = ROWS if is_quantized(model.items.weight) else ITEMS
    save_parts({table: model.items.weight, **_own_weights(model)}, folder / PARTS)
    card = Card(
        schema=1,
        prompt=model.prompt.tolist(),
        suffix=model.suffix.tolist(),
        head="dot" if model.head is None else "linear",
        tokens=None if model.words is None else model.words.listed(),
        attention=ATTENTIONS.get(attention, "auto"),
        **served,
    )
    _write_card(folder, card)


def write_own(
    folder: Path, model: OwnRecommender, shape: OwnShape, **served: Unpack[Served]
) -> None:
    """Write a user's own cut recommender: by its ``save``, or as a Hugging Face folder.

    Its weights are written beside that, and :func:`load_recommender` reads these.

    Raises:
        BadInput: if its ``save`` fails.
    """
    model.update_configs()
    save = getattr(model.own, "save", None) or getattr(model.own.backbone, "save_pretrained", None)
    weights = dict(model.own.named_parameters())
    if save is not None and not any(map(is_quantized, weights.values())):
        with code_of(shape.source, "its save fails"):
            save(folder)
    save_parts(weights, folder / PARTS)
    _write_card(folder, Card(schema=1, own=shape, prompt=[], **served))


def write_exit(folder: Path, exit: Exit) -> None:
    """Add the rule of early exit to what :func:`write_recommender` wrote."""
    card = msgspec.json.decode((folder / CARD).read_bytes(), type=Card)
    card.exit = exit
    _write_card(folder, card)


def write_sasrec(folder: Path, model: SASRec, **served: Unpack[Served]) -> None:
    """Write a trained SASRec; see the module for the layout."""
    save_weights(dict(model.named_parameters()), folder / PARTS)
    heads = next((block.heads for block in model.blocks), 1)
    shape = SasRecShape(model.width, len(model.blocks), heads)  # type: ignore[arg-type]
    _write_card(folder, Card(schema=1, sasrec=shape, prompt=[], **served))


def _write_card(folder: Path, card: Card) -> None:
    (folder / CARD).write_bytes(msgspec.json.encode(card) + b"\n")


def load_recommender(
    folder: str | Path,
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
    recommender: str | None = None,
    float32: bool = False,
) -> ExportedRecommender:
    """Open what ``depthprobe export`` wrote; needs nothing of the run it came from.

    Args:
        folder: what was exported.
        device: "cpu", "cuda", "mps", or "auto".
        trust_remote_code: run the Python code of a backbone that came with its own.
        recommender: for your own one, the function that builds it, ``module:function``: a folder
            can't name code to import.
        float32: compute in float32, even if the weights or the evaluation were not.

    Raises:
        BadInput: if the folder is not an exported recommender, or is damaged; if the device is
            not here.
    """
    path = Path(folder)
    if not (path / CARD).is_file() or not (path / PARTS).is_file():
        raise BadInput("recommender", str(folder), f"a folder that export wrote ({CARD} in it)")
    place = resolve_device(device)
    try:
        card = msgspec.json.decode((path / CARD).read_bytes(), type=Card)
        parts, longest = load_parts(path / PARTS), card.max_history
        if (card.own is None) != (recommender is None):
            found = "none" if card.own is None else card.own.source
            raise BadInput("--recommender", recommender, f"{found}, as this folder was exported")
        if card.own is not None and recommender is not None:
            own = load_own(recommender, card.item_ids)
            keep_blocks(own.backbone, card.own.kept)
            plain = put_back(own.own, parts)  # before rounding: rounded weights can't be filled
            fill(_plain(own.own.named_parameters()), plain)
            make_ready(own.backbone)
            model: Recommender | SASRec = own
        elif card.sasrec is not None:
            model = _sasrec(card, card.sasrec, parts)
        else:
            backbone = load_backbone(
                path, attention=card.attention, trust_remote_code=trust_remote_code
            )
            make_ready(backbone)  # a recommender tests it when it is made
            model = _around(backbone, card, parts)
            if float32 and len(_plain(model.named_parameters())) < len([*model.parameters()]):
                raise BadInput("float32", True, "False, for weights in fewer bits")
            texts, most = len(card.prompt) + len(card.suffix), positions_of(backbone.config)
            room = longest if model.words is not None or most is None else most - texts
            if room < longest and ends_at_positions(backbone.config):
                longest = room  # no user of the evaluation had more items
        if isinstance(model, Recommender) and card.precision == "bfloat16" and not float32:
            compute_in_bfloat16(model.backbone)
    except BadInput:
        raise
    except Exception as error:  # of several libraries
        reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        allowed = f"a complete export (damaged: {reason.partition(chr(10))[0]})"
        raise BadInput("recommender", str(folder), allowed) from None
    model.to(place, torch.float32 if float32 else None).eval()
    return ExportedRecommender(
        model, card.item_ids, card.titles, longest, card.filter_seen, card.exit
    )


def _around(backbone: PreTrainedModel, card: Card, parts: dict[str, Tensor]) -> Recommender:
    """Our recommender around its backbone, with the weights of its other parts."""
    rounded = parts.pop(ROWS, None)
    items = parts.pop(ITEMS) if rounded is None else dequantized(rounded)
    if items.ndim != 2 or len(items) != len(card.item_ids) + 1:
        rows = f"{tuple(items.shape)} for {len(card.item_ids)} items"
        raise ValueError(f"{PARTS}: the item table is {rows}")
    words = None if card.tokens is None else Words(card.tokens)
    model = Recommender(
        backbone, items, card.prompt, suffix=card.suffix, head=card.head, words=words
    )
    read = [*card.prompt, *card.suffix, *chain.from_iterable(card.tokens or [])]
    if max([0, *read]) >= model.token_embeddings.num_embeddings:
        raise ValueError(f"{CARD} has a token beyond those of the backbone")
    plain = put_back(model, parts)
    own = _plain(_own_weights(model).items())
    fill(own | {ITEMS: model.items.weight}, plain | {ITEMS: items})
    if rounded is not None:
        model.items = Int8Rows(rounded)
    return model


def _sasrec(card: Card, shape: SasRecShape, parts: dict[str, Tensor]) -> SASRec:
    settings = SasRecSettings(width=shape.width, blocks=shape.blocks, heads=shape.heads)
    model = build_sasrec(settings, items=len(card.item_ids), longest=card.max_history)
    fill(dict(model.named_parameters()), parts)
    return model.eval()


def _own_weights(model: Recommender) -> dict[str, Tensor]:
    """Adapters and head by name: everything except the backbone and the item table."""
    return {name: p for name, p in model.named_parameters() if name.startswith(OWN)}


def _plain(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The weights that are not rounded to fewer bits."""
    return {name: weight for name, weight in weights if not is_quantized(weight)}
