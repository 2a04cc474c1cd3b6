"""Exported recommenders: answers against a direct computation, and every kind of damage refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.errors import BadInput
from depthprobe.models import export as exported
from depthprobe.models.export import (
    CARD,
    PARTS,
    ExportedRecommender,
    load_recommender,
    write_recommender,
)
from depthprobe.models.recommender import Recommender

ITEMS, WIDTH = 30, 6
IDS = [f"i{number}" for number in range(1, ITEMS + 1)]
TITLES = ["", *(f"Title {number}" for number in range(2, ITEMS + 1))]
ADAPTERS = [f"{name}_adapter.{part}" for name in ("input", "output") for part in ("weight", "bias")]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(
    tmp_path_factory: pytest.TempPathFactory, llama_config: Callable[..., LlamaConfig]
) -> Write:
    """``write(filter_seen=False)``: the folder of a fresh small recommender."""

    def make(**changes: Any) -> Path:
        torch.manual_seed(0)
        backbone = LlamaForCausalLM(llama_config(num_hidden_layers=2)).eval()
        table = torch.randn(ITEMS + 1, WIDTH)
        table[0] = 0
        model = Recommender(backbone, table, [1, 4]).eval()
        folder = tmp_path_factory.mktemp("exports") / "model"
        settings = {"item_ids": IDS, "titles": TITLES, "max_history": 4, "filter_seen": True}
        write_recommender(folder, model, backbone, **(settings | changes))
        return folder

    return make


@pytest.fixture(scope="module")
def folder(write: Write) -> Path:
    return write()


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    return copy


@torch.inference_mode()
def scores(loaded: ExportedRecommender, history: list[str]) -> list[float]:
    """Of all items, for a user alone: prompt, adapted items, blocks, output adapter, items."""
    model = loaded.model
    items = torch.tensor([[IDS.index(item) + 1 for item in history[-loaded.max_history :]]])
    tokens = model.token_embeddings(model.prompt)[None]
    inputs = torch.cat([tokens, model.input_adapter(model.items(items))], dim=1)
    last = model.backbone(inputs_embeds=inputs).last_hidden_state[0, -1]
    return (model.item_matrix()[1:] @ model.output_adapter(last)).tolist()


@pytest.mark.parametrize("filter_seen", [True, False])
def test_answers_against_users_one_by_one(
    write: Write, filter_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_recommender(write(filter_seen=filter_seen))
    histories = [IDS[start : start + length] for start, length in [(0, 1), (3, 9), (7, 2)] * 5]
    whole = loaded.recommend(histories, top=5)
    for history, answer in zip(histories, whole, strict=True):
        values = scores(loaded, history)
        allowed = [i for i in range(ITEMS) if not (filter_seen and IDS[i] in history)]
        best = sorted(allowed, key=lambda i: -values[i])[:5]
        assert [found.item for found in answer] == [IDS[i] for i in best]
        assert [found.title for found in answer] == [TITLES[i] or None for i in best]
        expected = [values[i] for i in best]
        assert [found.score for found in answer] == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(exported, "BATCH", 2)
    monkeypatch.setattr(exported, "SCORE_BYTES", 1)  # a user at a time
    again = loaded.recommend(histories, top=5)
    assert [[f.item for f in a] for a in again] == [[f.item for f in a] for a in whole]


def test_scores_never_exceed_their_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_recommender(folder)
    monkeypatch.setattr(exported, "SCORE_BYTES", 4 * (ITEMS + 1) * 3)
    sizes: list[int] = []
    score = ExportedRecommender._scores

    def watch(self: ExportedRecommender, vectors: torch.Tensor, *rest: Any) -> Any:
        sizes.append(len(vectors))
        return score(self, vectors, *rest)

    monkeypatch.setattr(ExportedRecommender, "_scores", watch)
    loaded.recommend([["i1"]] * 10)
    assert sizes == [3, 3, 3, 1]


def test_scores_that_overflow_are_no_answer(damaged: Path) -> None:
    parts = load_file(damaged / PARTS)
    large = {name: 3e38 * part.sign() for name, part in parts.items()}  # finite, sums are not
    save_file(large, damaged / PARTS)
    with pytest.raises(BadInput, match="recommender: .*scores .*they overflow"):
        load_recommender(damaged).recommend([["i1"]])


def test_ties_across_the_last_place_are_in_the_order_of_the_catalogue(write: Write) -> None:
    folder = write(filter_seen=True)
    parts = load_file(folder / PARTS)
    parts["items"][1:] = parts["items"][1:4].repeat(ITEMS // 3, 1)  # each item ten times
    save_file(parts, folder / PARTS)
    loaded = load_recommender(folder)
    (answer,) = loaded.recommend([["i5"]], top=ITEMS - 1)
    kinds = list(dict.fromkeys((int(found.item[1:]) - 1) % 3 for found in answer))
    expected = [IDS[i] for kind in kinds for i in range(kind, ITEMS, 3) if IDS[i] != "i5"]
    for top in (2, 5, 13, ITEMS - 1):
        (answer,) = loaded.recommend([["i5"]], top=top)
        assert [found.item for found in answer] == expected[:top]


def test_few_items_left_and_none(folder: Path) -> None:
    loaded = load_recommender(folder)
    first, second = loaded.recommend([IDS[:-2], IDS], top=5)
    assert {found.item for found in first} == set(IDS[-2:])
    assert second == []
    assert loaded.recommend([]) == []


@pytest.mark.parametrize(
    ("history", "top", "words"),
    [
        (["nowhere"], 5, "history: .*got 'nowhere'"),
        ([], 5, "history: .*got ''"),
        (["i1"], 0, "top: .*got 0"),
        (["i1"], ITEMS + 1, f"from 1 to {ITEMS}"),
    ],
)
def test_what_can_not_be_answered(folder: Path, history: list[str], top: int, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        load_recommender(folder).recommend([["i1"], history], top=top)


def test_a_device_that_is_not_here(folder: Path) -> None:
    with pytest.raises(BadInput, match="device"):
        load_recommender(folder, "tpu")
    assert load_recommender(folder, "cpu").model.item_matrix().device.type == "cpu"


def test_attention_is_as_it_was_evaluated(write: Write) -> None:
    for asked, found in (("eager", "eager"), ("auto", "sdpa"), ("flash_attention_2", "sdpa")):
        backbone = load_recommender(write(attention=asked)).model.backbone
        assert backbone.config._attn_implementation == found


def test_nothing_is_pickled(folder: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    load_recommender(write()).recommend([["i1"]])
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}


def edit_card(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps(card | changes))

    return edit


def drop(key: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        del card[key]
        (folder / CARD).write_text(json.dumps(card))

    return edit


def edit_parts(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        parts = load_file(folder / PARTS)
        change(parts)
        save_file(parts, folder / PARTS)

    return edit


def truncate(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return edit


def replace_with(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def as_nan(parts: dict[str, torch.Tensor]) -> None:
    parts[ADAPTERS[0]] = torch.full_like(parts[ADAPTERS[0]], float("nan"))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "parts cut short": truncate(PARTS),
    "parts without content": replace_with(PARTS, b""),
    "parts pickled": replace_with(PARTS, pickle.dumps({"items": 1})),
    "weights cut short": truncate("model.safetensors"),
    "weights absent": delete("model.safetensors"),
    "configuration absent": delete("config.json"),
    "configuration cut short": truncate("config.json"),
    "card cut short": truncate(CARD),
    "card no text": replace_with(CARD, b"\xff\xfe\x00"),
    "card a list": replace_with(CARD, b"[]"),
    "card absent": delete(CARD),
    "parts absent": delete(PARTS),
    "later schema": edit_card(schema=2),
    **{
        f"no {key}": drop(key)
        for key in ("prompt", "max_history", "filter_seen", "item_ids", "titles")
    },
    "an item too few": edit_card(item_ids=IDS[:-1], titles=TITLES[:-1]),
    "a title too few": edit_card(titles=TITLES[:-1]),
    "an item twice": edit_card(item_ids=["i2", *IDS[1:]]),
    "no items": edit_card(item_ids=[], titles=[]),
    "items are numbers": edit_card(item_ids=list(range(ITEMS))),
    "prompt is text": edit_card(prompt="Next:"),
    "prompt beyond the tokens": edit_card(prompt=[10**6]),
    "prompt below the tokens": edit_card(prompt=[-1]),
    "no history": edit_card(max_history=0),
    "filter in words": edit_card(filter_seen="yes"),
    "suffix is text": edit_card(suffix="Next:"),
    "suffix beyond the tokens": edit_card(suffix=[10**6]),
    "a head of another kind": edit_card(head="tree"),
    "a head that is not there": edit_card(head="linear"),
    "a kernel": edit_card(attention="someone/kernel"),
    "no item table": edit_parts(lambda parts: parts.pop("items")),
    **{f"no {name}": edit_parts(lambda p, name=name: p.pop(name)) for name in ADAPTERS},
    "a part too many": edit_parts(lambda parts: parts.update(extra=torch.ones(2))),
    "item table of another width": edit_parts(
        lambda parts: parts.update(items=torch.ones(ITEMS + 1, WIDTH + 1))
    ),
    "item table of one dimension": edit_parts(lambda parts: parts.update(items=torch.ones(5))),
    # would be broadcast by a copy that does not look
    "a bias of one number": edit_parts(lambda parts: parts.update({ADAPTERS[1]: torch.ones(1)})),
    "a NaN": edit_parts(as_nan),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(damaged: Path, case: str) -> None:
    DAMAGE[case](damaged)
    with pytest.raises(BadInput) as caught:
        load_recommender(damaged)
    assert "\n" not in str(caught.value)
    assert str(damaged) in str(caught.value)


def test_what_is_no_export(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="a folder that export wrote"):
            load_recommender(place)
