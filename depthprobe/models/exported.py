"""A recommender outside its run: a plain Hugging Face checkpoint with the recommender's parts.

``FOLDER/config.json, model.safetensors, tokenizer``: the cut backbone, as transformers reads it.
``FOLDER/recommender.safetensors, recommender.json``: adapters, item table, item ids, prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from depthprobe.models.backbones import load_backbone
from depthprobe.models.recommender import Recommender
from depthprobe.study import BadInput

PARTS, CARD = "recommender.safetensors", "recommender.json"
SCHEMA = 1
BATCH = 256


class Recommendation(NamedTuple):
    """One recommended item."""

    item: str
    title: str | None
    score: float


@dataclass(frozen=True, eq=False)
class ExportedRecommender:
    """Top items for histories of raw item ids."""

    model: Recommender
    item_ids: list[str]
    titles: list[str] | None
    max_history: int
    filter_seen: bool

    @torch.inference_mode()
    def recommend(
        self, histories: Sequence[Sequence[str]], top: int = 10
    ) -> list[list[Recommendation]]:
        """The ``top`` best items of each history (raw item ids, oldest first), best first.

        Items of the history are left out where the model was evaluated that way.

        Raises:
            BadInput: for an empty history, an item that the catalogue doesn't hold, or a ``top``
                that is not between 1 and the number of items.
        """
        if not 1 <= top <= len(self.item_ids):
            raise BadInput("top", top, f"a whole number from 1 to {len(self.item_ids)}")
        numbers = {raw: number for number, raw in enumerate(self.item_ids, start=1)}
        known = [self._numbered(history, numbers) for history in histories]
        prompt = self.model.prepare_prompt()
        found: list[list[Recommendation]] = []
        for start in range(0, len(known), BATCH):
            part = known[start : start + BATCH]
            recent = [history[-self.max_history :] for history in part]
            lengths = torch.tensor([len(history) for history in recent])
            padded = torch.zeros(len(part), int(lengths.max()), dtype=torch.long)
            for row, history in enumerate(recent):
                padded[row, : len(history)] = torch.from_numpy(history)
            vectors = self.model.encode(padded, lengths, prompt)
            scores = vectors @ self.model.item_matrix().T  # (B, I + 1)
            scores[:, 0] = -torch.inf
            if self.filter_seen:
                for row, history in enumerate(part):
                    scores[row, torch.from_numpy(history)] = -torch.inf
            best = scores.topk(top, dim=1)
            found += [
                [self._named(i, s) for i, s in zip(items, values, strict=True) if s > -torch.inf]
                for items, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        return found

    def _numbered(self, history: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
        if not len(history):
            raise BadInput("history", "", "at least one item id a user")
        for raw in history:
            if str(raw) not in numbers:
                raise BadInput("history", raw, f"an item id of the {len(numbers)} in the catalogue")
        return np.array([numbers[str(raw)] for raw in history], dtype=np.int64)

    def _named(self, number: int, score: float) -> Recommendation:
        title = self.titles[number - 1] if self.titles else None
        return Recommendation(self.item_ids[number - 1], title or None, score)


def write_recommender(
    folder: Path,
    model: Recommender,
    backbone: PreTrainedModel,
    *,
    item_ids: list[str],
    titles: list[str] | None,
    max_history: int,
    filter_seen: bool,
) -> None:
    """Write a trained recommender; see the module for the layout.

    Args:
        backbone: the causal language model of the same depth, with the trained weights.
    """
    backbone.save_pretrained(folder)
    parts = {
        "items": model.items.weight,
        "input_adapter.weight": model.input_adapter.weight,
        "input_adapter.bias": model.input_adapter.bias,
        "output_adapter.weight": model.output_adapter.weight,
        "output_adapter.bias": model.output_adapter.bias,
    }
    save_file({name: p.detach().cpu().contiguous() for name, p in parts.items()}, folder / PARTS)
    card = {
        "schema": SCHEMA,
        "prompt": model.prompt.tolist(),
        "max_history": max_history,
        "filter_seen": filter_seen,
        "item_ids": item_ids,
        "titles": titles,
    }
    (folder / CARD).write_text(json.dumps(card, allow_nan=False) + "\n", encoding="utf-8")


def load_recommender(folder: str | Path) -> ExportedRecommender:
    """Open what ``depthprobe export`` wrote; needs nothing of the run it came from.

    Raises:
        BadInput: if the folder is not an exported recommender, or is damaged.
    """
    path = Path(folder)
    if not (path / CARD).is_file() or not (path / PARTS).is_file():
        raise BadInput("recommender", str(folder), f"a folder that export wrote ({CARD} in it)")
    try:
        card: dict[str, Any] = json.loads((path / CARD).read_text(encoding="utf-8"))
        parts = load_file(path / PARTS)
        model = Recommender(load_backbone(path), parts.pop("items"), card["prompt"])
        for name, weight in parts.items():
            model.get_parameter(name).data.copy_(weight)
        return ExportedRecommender(
            model=model.eval(),
            item_ids=card["item_ids"],
            titles=card["titles"],
            max_history=card["max_history"],
            filter_seen=card["filter_seen"],
        )
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise BadInput("recommender", str(folder), f"a whole export (damaged: {error})") from None
