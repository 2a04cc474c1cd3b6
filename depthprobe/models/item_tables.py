"""Frozen item tables without SASRec: from a ``.npy`` file, or from titles through the backbone.

Row ``i`` of a table, (I + 1, d) float32, is item ``i``; row 0 is padding and zero.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprobe.errors import BadInput
from depthprobe.models.backbones import move, pretrained, pretrained_tokenizer
from depthprobe.models.blocks import check_tokens, find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.parts import check_readable
from depthprobe.models.skipping import after_blocks
from depthprobe.models.taps import tap_blocks
from depthprobe.models.tiny import positions_of
from depthprobe.study import Backbone

FIELD, TEXT = "item_table", "text"
IDS = ".ids.txt"
LONGEST_TITLE = 64  # tokens of a text, with the start token
SMALLEST_SPREAD = 1e-6  # of the values' size: below, items differ only by float32's rounding
# a fresh output adapter turns items of this RMS length into scores of a spread near 1: the loss
# starts close to ln(I), and usual learning rates move it
ITEM_LENGTH = 1.0

logger = logging.getLogger(__name__)


def make_table(
    source: str,
    settings: Backbone,
    item_ids: Sequence[str],
    titles: Sequence[str] | None,
    *,
    device: torch.device,
) -> Tensor:
    """The balanced item table of a ``.npy`` file or of texts, (I + 1, d) on the CPU.

    Raw ids and titles are of items 1..I, a title empty where unknown. The backbone that the
    settings describe reads the titles, on the device: with ``text:K`` its first K blocks alone,
    with ``text:last`` or ``text:K:last`` up to the last token and not the mean of all.
    """
    if source.endswith(".npy"):
        return balanced(read_embeddings(source, item_ids), source)
    _, *chosen = source.split(":")
    blocks = next((int(word) for word in chosen if word.isdigit()), None)
    texts, last = item_texts(item_ids, titles), "last" in chosen
    (table,) = read_titles(settings, texts, blocks=blocks, last=last, device=device)
    return balanced(table, source)


def read_titles(
    settings: Backbone,
    texts: Sequence[str],
    *,
    device: torch.device,
    blocks: int | None = None,
    **how: Any,
) -> Tensor:
    """:func:`embed_titles` by the backbone that the settings describe, or its first blocks."""
    tokenizer = pretrained_tokenizer(settings)
    backbone = pretrained(settings)
    if blocks is not None:
        keep_blocks(backbone, range(blocks))
    move(backbone, settings, device)
    logger.info("embedding the titles of %s items", f"{len(texts):,}")  # this can take minutes
    return embed_titles(backbone, tokenizer, texts, **how)


def read_embeddings(path: str | Path, item_ids: Sequence[str]) -> Tensor:
    """The item table of a ``.npy`` file of floats, (rows, d) -> (I + 1, d) float32.

    ``NAME.ids.txt`` beside ``NAME.npy`` has the raw id of each row, one per line; rows of other
    items are ignored. Without it, row i is the i-th of ``item_ids``.
    """
    file = Path(path).expanduser()
    values = _open(file)
    rows = _rows(file, len(values), list(map(str, item_ids)))
    table = torch.zeros(len(rows) + 1, values.shape[1])
    with np.errstate(over="ignore"):  # too large values become infinite, and are refused
        table[1:] = torch.from_numpy(values[rows].astype(np.float32))
    finite = table[1:].isfinite().all(dim=1).numpy()
    if not finite.all():
        place = int(np.argmin(finite))
        allowed = f"finite numbers (row {rows[place]}, item {item_ids[place]!r}, has another)"
        raise BadInput(FIELD, file, allowed)
    return table


def item_texts(
    item_ids: Sequence[str], titles: Sequence[str] | None, *, field: str = FIELD, asked: str = TEXT
) -> list[str]:
    """The text of each item: its title, or its raw id if it has none."""
    if titles is None or not any(titles):
        raise BadInput(field, asked, "a log with item titles (data.items names a file with them)")
    return [title or str(raw) for raw, title in zip(item_ids, titles, strict=True)]


def embed_titles(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    depths: Sequence[int] | None = None,
    last: bool = False,
    batch: int = 64,
    out: Tensor | None = None,
) -> Tensor:
    """Mean of the backbone's normed states over each title's tokens, (K, I + 1, D) float32.

    With ``last`` the state at the last token instead. ``depths`` are numbers of blocks, 0 for the
    token embeddings; by default only all blocks. One pass makes all depths, and each equals the
    result of the backbone cut to that depth. The tables are written into ``out``: K (I + 1) D
    numbers. Besides it, only one batch's states, at all depths, are in memory.

    A start token is read before the title but not pooled, since no title changes its state. A text
    is cut to 64 tokens; texts of similar length share a batch.
    """
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    most = positions_of(backbone.config)
    longest = min(LONGEST_TITLE, most or LONGEST_TITLE) - len(start)
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in texts]
    if [] in tokens:
        unread = texts[tokens.index([])]
        raise BadInput(FIELD, TEXT, f"titles that the tokenizer can read (in {unread!r} it can't)")
    decoder, device = backbone.base_model, backbone.device
    check_tokens(FIELD, TEXT, chain.from_iterable(tokens), backbone)
    blocks = len(find_blocks(backbone))
    depths = [blocks] if depths is None else depths
    inner = any(depth < blocks for depth in depths)
    if inner:
        check_readable(backbone)
    if out is None:
        width = backbone.config.get_text_config(decoder=True).hidden_size
        out = torch.zeros(len(depths), len(texts) + 1, width)
    order = sorted(range(len(texts)), key=lambda place: len(tokens[place]))
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        lengths = torch.tensor([len(start) + len(tokens[place]) for place in chosen])
        places = torch.arange(int(lengths.max()))
        seen = places < lengths[:, None]  # (B, T)
        padded = torch.zeros(seen.shape, dtype=torch.long)
        padded[seen] = torch.tensor([t for place in chosen for t in [*start, *tokens[place]]])
        begins = lengths - 1 if last else torch.full_like(lengths, len(start))  # (B,)
        pooled = (seen & (places >= begins[:, None])).to(device)
        # keep states only for depths below the last
        tapped = tap_blocks(backbone) if inner else nullcontext()
        with torch.inference_mode(), tapped as tap:
            final = decoder(
                input_ids=padded.to(device), attention_mask=seen.long().to(device), use_cache=False
            ).last_hidden_state  # (B, T, D)
            for table, depth in zip(out, depths, strict=True):
                states = final
                if tap is not None and depth < blocks:
                    # the final norm comes before the mean: it treats each token by itself
                    states = after_blocks(backbone, tap.states[depth])
                total = (states.float() * pooled[:, :, None]).sum(dim=1)
                table[torch.tensor(chosen) + 1] = (total / pooled.sum(dim=1, keepdim=True)).cpu()
    return out


def balanced(table: Tensor, source: str) -> Tensor:
    """Centre the table over its items and scale it to a common size, (I + 1, d).

    Neither changes what a recommender can learn. A vector common to all items adds the same to all
    scores of a user, and a bias to the adapted items; a factor is one of the adapters' weights.
    Both change how fast it learns. Mean-pooled states of a language model nearly all point the same
    way, so scores would start equal; and embeddings of length 1 and of length 20 would learn at
    different speeds.
    """
    items = table[1:].double()
    centred = items - items.mean(dim=0)
    spread = float(centred.square().sum(dim=1).mean().sqrt())  # the items' RMS length
    if not spread > SMALLEST_SPREAD * float(items.square().sum(dim=1).mean().sqrt()):
        raise BadInput(FIELD, source, "embeddings that differ from item to item")
    result = torch.zeros_like(table)
    result[1:] = (centred * (ITEM_LENGTH / spread)).float()
    return result


def table_hash(table: Tensor) -> str:
    """``sha256:`` of a float32 table's shape and values."""
    values = table.numpy()
    digest = hashlib.sha256(repr(values.shape).encode())
    digest.update(values.astype("<f4", copy=False).tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _open(file: Path) -> np.ndarray:
    allowed = "a .npy file that holds a matrix of floats, a row an item"
    try:
        values: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise BadInput(FIELD, file, f"{allowed} ({reason})") from error
    if not isinstance(values, np.ndarray):  # an archive of several arrays
        raise BadInput(FIELD, file, f"{allowed}, not several in an archive")
    if values.ndim != 2 or values.shape[1] < 1 or values.dtype.kind != "f":
        raise BadInput(FIELD, file, f"{allowed} (it holds {values.dtype} {values.shape})")
    return values


def _rows(file: Path, rows: int, item_ids: list[str]) -> np.ndarray:
    """The row of each item, int64 (I,)."""
    beside = file.with_suffix(IDS)
    if not beside.is_file():
        if rows != len(item_ids):
            raise BadInput(
                FIELD,
                file,
                f"it has {rows:,} rows, and the log {len(item_ids):,} items after cleaning: a row"
                f" an item in the natural order of their ids, or {beside.name} beside it with the"
                " raw id of each row, one a line",
                fault=True,
            )
        return np.arange(rows)
    try:
        lines = beside.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(FIELD, beside, "UTF-8 text that can be read, a raw id a line") from error
    if len(lines) != rows:
        allowed = (
            f"a raw id for each of the {rows:,} rows of {file.name} (it has {len(lines):,} lines)"
        )
        raise BadInput(FIELD, beside, allowed)
    index = pd.Index([line.strip() for line in lines])
    if not index.is_unique:
        twice = index[index.duplicated()][0]
        first, second = np.flatnonzero(index == twice)[:2] + 1
        raise BadInput(FIELD, beside, f"each id once ({twice!r} is on lines {first} and {second})")
    row = index.get_indexer(pd.Index(item_ids))
    if (row < 0).any():
        missing = f"{(row < 0).sum():,} of {len(row):,} are not in it, the first is"
        allowed = f"a row for each of the log's items ({missing} {item_ids[row.argmin()]!r})"
        raise BadInput(FIELD, beside, allowed)
    return row
