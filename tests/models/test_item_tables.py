"""Item tables from a file and from titles: aligned, as computed one by one, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.embedded import embedded_backbone, embedded_tokenizer
from depthprobe.models.families import family_config
from depthprobe.models.item_tables import (
    LONGEST_TITLE,
    balanced,
    embed_titles,
    item_texts,
    make_table,
    read_embeddings,
    table_hash,
)
from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import tap_blocks
from depthprobe.models.tiny import tiny_model
from depthprobe.study import Backbone

IDS = ["i1", "i2", "i10"]
VALUES = np.arange(12, dtype=np.float64).reshape(3, 4)
TEXTS = ["a", "Glow in the dark", "é" * 60, "a longer title, of many words", "x"]


def write(path: Path, values: np.ndarray, ids: list[str] | None = None) -> Path:
    np.save(path, values)
    if ids is not None:
        path.with_suffix(".ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_without_ids_rows_are_the_items_in_order(tmp_path: Path, dtype: str) -> None:
    table = read_embeddings(write(tmp_path / "v.npy", VALUES.astype(dtype)), IDS)
    assert table.dtype == torch.float32
    assert table.tolist() == [[0, 0, 0, 0], *VALUES.tolist()]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_rows_are_found_by_id_whatever_their_order(tmp_path: Path, ending: str) -> None:
    items = [f"i{k}" for k in range(50)]
    values = np.random.default_rng(0).normal(size=(60, 3))
    shuffled = np.random.default_rng(1).permutation([*items, *(f"other{k}" for k in range(10))])
    path = write(tmp_path / "v.1.npy", values)
    (tmp_path / "v.1.ids.txt").write_text("".join(i + ending for i in shuffled), newline="")
    table = read_embeddings(path, items)
    for number, item in enumerate(items, start=1):
        row = values[shuffled.tolist().index(item)]
        np.testing.assert_array_equal(table[number].numpy(), row.astype(np.float32))


NAN, HUGE = VALUES.copy(), VALUES.copy()
NAN[1, 2], HUGE[2, 0] = np.nan, 1e300

REFUSED: dict[str, tuple[np.ndarray, list[str] | None, list[str]]] = {
    "too few rows": (VALUES[:2], None, ["2 rows", "3 items", "v.ids.txt"]),
    "too many rows": (np.ones((4, 2)), None, ["4 rows", "3 items", "v.ids.txt"]),
    "a vector": (VALUES[0], None, ["float64 (4,)"]),
    "no columns": (VALUES[:, :0], None, ["float64 (3, 0)"]),
    "whole numbers": (VALUES.astype(int), None, ["int64 (3, 4)"]),
    "complex numbers": (VALUES.astype(complex), None, ["complex128"]),
    "objects": (np.array([["a", 1]], dtype=object), None, [".npy"]),
    "a NaN": (NAN, None, ["row 1", "'i2'"]),
    "a NaN, with ids": (NAN[::-1], ["i10", "i2", "i1"], ["row 1", "'i2'"]),
    "too large for float32": (HUGE, None, ["row 2", "'i10'"]),
    "ids missing": (VALUES, ["i1", "i3", "i4"], ["2 of 3", "'i2'", "v.ids.txt"]),
    "an id twice": (VALUES, ["i1", "i2", "i1 "], ["'i1'", "lines 1 and 3"]),
    "too few ids": (VALUES, ["i1", "i2"], ["2 lines", "3 rows"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_aligned_is_refused(tmp_path: Path, case: str) -> None:
    values, ids, words = REFUSED[case]
    with pytest.raises(BadInput, match="^item_table: ") as error:
        read_embeddings(write(tmp_path / "v.npy", values, ids), IDS)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "v.npy", VALUES).read_bytes()
    np.savez(tmp_path / "v.npz", VALUES)
    archive = (tmp_path / "v.npz").read_bytes()
    for content in (b"", b"item,vector\n", whole[:-8], whole[:40], b"\x80\x04K\x01.", archive):
        (tmp_path / "v.npy").write_bytes(content)
        with pytest.raises(BadInput, match=r"^item_table: .* a \.npy file") as error:
            read_embeddings(tmp_path / "v.npy", IDS)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="item_table"):
        read_embeddings(tmp_path / "nowhere.npy", IDS)


def test_ids_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "v.npy", VALUES)
    (tmp_path / "v.ids.txt").write_bytes(b"i1\ni2\n\xff\n")
    with pytest.raises(BadInput, match=r"UTF-8.*v\.ids\.txt"):
        read_embeddings(path, IDS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "qwen3_moe"])
def test_a_title_is_embedded_as_if_it_were_alone(
    name: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    """Oracle: one title at a time in float64, no padding, no mask; the start token not pooled."""
    tokenizer = embedded_tokenizer()
    model = make_model(name).double()
    model.resize_token_embeddings(len(tokenizer))
    (table,) = embed_titles(model, tokenizer, TEXTS, batch=2)
    assert table.dtype == torch.float32
    assert not table[0].any()
    for number, text in enumerate(TEXTS, start=1):
        title = list(text.encode())[: LONGEST_TITLE - 1]
        tokens = [1, *tokenizer(text)["input_ids"]][:LONGEST_TITLE]
        assert len(tokens) == 1 + len(title)
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        expected = states[1:].mean(dim=0).float()
        torch.testing.assert_close(table[number], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_titles_are_read_by_some_blocks_alone(last: bool) -> None:
    """Oracle: the state after block 2 of one title at a time, through the final norm."""
    backbone, tokenizer, titles = embedded_backbone(), embedded_tokenizer(), ["Glow", "Red Sun"]
    source = "text:2:last" if last else "text:2"
    made = make_table(source, Backbone(), ["i1", "i2"], titles, device=torch.device("cpu"))
    expected = torch.zeros(3, made.shape[1])
    for number, title in enumerate(titles, start=1):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(title)["input_ids"]]])
        with torch.no_grad(), tap_blocks(backbone) as tap:
            backbone.base_model(input_ids=ids)
            states = backbone.base_model.norm(tap.states[2])[0, 1:]
        expected[number] = states[-1] if last else states.mean(dim=0)
    torch.testing.assert_close(made, balanced(expected, source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "qwen3_moe"])
@pytest.mark.parametrize("last", [False, True])
def test_all_depths_come_from_one_pass(
    name: str, last: bool, make_model: Callable[..., PreTrainedModel]
) -> None:
    """Oracle: the backbone cut to each depth; at depth 0 its token embeddings, normed, in words."""
    tokenizer = embedded_tokenizer()
    model = make_model(name).double()
    model.resize_token_embeddings(len(tokenizer))
    blocks = len(find_blocks(model))
    out = torch.full((blocks + 1, len(TEXTS) + 1, model.config.hidden_size), torch.nan)
    out[:, 0] = 0
    how = {"last": last, "batch": 2}
    tables = embed_titles(model, tokenizer, TEXTS, depths=range(blocks + 1), out=out, **how)
    assert tables is out
    for depth in range(1, blocks + 1):
        cut = keep_blocks(copy.deepcopy(model), range(depth))
        (expected,) = embed_titles(cut, tokenizer, TEXTS, **how)
        torch.testing.assert_close(tables[depth], expected, rtol=1e-6, atol=1e-6)
    chosen = embed_titles(model, tokenizer, TEXTS, depths=[2, 0], **how)
    torch.testing.assert_close(chosen, tables[[2, 0]])
    if name == "llama":
        ids = torch.tensor(tokenizer("a")["input_ids"])
        with torch.no_grad():
            read = model.base_model.norm(model.get_input_embeddings()(ids))[0]
        torch.testing.assert_close(tables[0, 1], read.float())


@pytest.mark.parametrize("batch", [1, 3, 5, 100])
def test_the_batch_does_not_matter(batch: int) -> None:
    backbone, tokenizer = embedded_backbone(), embedded_tokenizer()
    expected = embed_titles(backbone, tokenizer, TEXTS, batch=2)
    found = embed_titles(backbone, tokenizer, TEXTS, batch=batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_tokenizer_without_a_start_token() -> None:
    backbone, tokenizer = embedded_backbone(), embedded_tokenizer()
    tokenizer.bos_token = None
    found = embed_titles(backbone, tokenizer, ["ab"])[0, 1]
    with torch.no_grad():
        ids = torch.tensor([tokenizer("ab")["input_ids"]])
        states = backbone.base_model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(found, states.mean(dim=0))


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(BadInput, match="item_table.*''"):
        embed_titles(embedded_backbone(), embedded_tokenizer(), ["a", ""])


def test_an_item_without_a_title_goes_by_its_id() -> None:
    assert item_texts(IDS, ["Glow", "", "Sun"]) == ["Glow", "i2", "Sun"]
    for titles in (None, ["", "", ""]):
        with pytest.raises(BadInput, match="item_table: expected .*titles.*'text'"):
            item_texts(IDS, titles)


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    embedded_backbone().save_pretrained(tmp_path)
    settings = Backbone(source=str(tmp_path))
    with pytest.raises(BadInput, match="no tokenizer"):
        make_table("text", settings, IDS, ["a", "b", "c"], device=torch.device("cpu"))


def test_a_balanced_table_is_centred_and_as_large_whatever_its_scale() -> None:
    table = torch.zeros(101, 16)
    table[1:] = torch.randn(100, 16) + 30 * torch.randn(16)
    found = balanced(table, "v.npy")
    torch.testing.assert_close(found[1:].mean(dim=0), torch.zeros(16), rtol=0, atol=1e-6)
    assert not found[0].any()
    torch.testing.assert_close(balanced(1000 * table, "v.npy"), found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(balanced(found, "v.npy"), found)
    # distances between items keep their proportions
    ratio = torch.pdist(found[1:]) / torch.pdist(table[1:])
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


def test_balancing_changes_nothing_that_a_recommender_can_say() -> None:
    """Adapters exist that give the balanced table the same probabilities as the raw one."""
    table = torch.zeros(9, 6)
    table[1:] = 3 * torch.randn(8, 6) + 5
    found = balanced(table, "v.npy")
    factor = (table[1] - table[2]).norm() / (found[1] - found[2]).norm()
    shift = (table[1] - factor * found[1]).double()
    raw = Recommender(embedded_backbone(), table, [1]).double().eval()
    model = Recommender(embedded_backbone(), found, [1]).double().eval()
    with torch.no_grad():
        model.input_adapter.weight.copy_(raw.input_adapter.weight * factor)
        model.input_adapter.bias.copy_(raw.input_adapter.bias + raw.input_adapter.weight @ shift)
        model.output_adapter.weight.copy_(raw.output_adapter.weight * factor)
        model.output_adapter.bias.copy_(raw.output_adapter.bias * factor)
        histories = torch.tensor([[1, 5, 3], [2, 8, 4]])
        scores = [(m(histories) @ m.item_matrix()[1:].T).log_softmax(-1) for m in (raw, model)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", [[0.0, 0.0], [3.0, 1.0]])
def test_a_constant_table_is_refused(row: list[float]) -> None:
    table = torch.zeros(5, 2)
    table[1:] = torch.tensor(row)
    for noise in (0, 1e-8):
        with pytest.raises(BadInput, match="item_table: expected .*differ.*'v.npy'"):
            balanced(table + noise * torch.randn(5, 2) * sum(row), "v.npy")


def test_the_hash_is_of_shape_and_values() -> None:
    table = torch.randn(4, 6)
    assert table_hash(table) == table_hash(table.clone())
    changed = table.clone()
    changed[3, 5] = changed[3, 5] + 1e-3
    assert len({table_hash(t) for t in (table, changed, table.reshape(6, 4))}) == 3


def test_a_title_with_a_token_beyond_the_embeddings_is_refused() -> None:
    tokenizer = embedded_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(BadInput, match="item_table: .*tokens that the backbone has embeddings of"):
        embed_titles(embedded_backbone(), tokenizer, ["plain", "a <new> title"])


def test_titles_are_as_long_as_the_positions_allow() -> None:
    config = family_config("gpt2", max_position_embeddings=16)
    model = tiny_model(config, depth=1).float()
    tokenizer = embedded_tokenizer()
    long, cut = (embed_titles(model, tokenizer, ["x" * n, "y"]) for n in (40, 15))
    torch.testing.assert_close(long, cut)
