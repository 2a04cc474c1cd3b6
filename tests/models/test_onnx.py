"""The ONNX file of a recommender: the answers of a naive loop in float64, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.models import onnx
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.export import ExportedRecommender
from depthprobe.models.onnx import compare_answers, open_session, padded, write_onnx
from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.models.words import Words

pytest.importorskip("onnxruntime", reason="in the extra dev")
pytest.importorskip("onnxscript", reason="in the extra dev")

ITEMS, LONGEST = 30, 5
PROMPT, SUFFIX = [3, 9, 4], [7, 8]
CASES = {  # family: what differs
    "llama": {},
    "gpt2": {"suffix": SUFFIX, "head": "linear", "filter_seen": False},
    "gemma3_text": {},  # sliding windows of four positions beside full attention
    "mistral": {"words": Words([[5 + n % 7] * (1 + n % 3) for n in range(ITEMS)])},
}


def histories() -> list[np.ndarray]:
    """Of one item, as many as are read, more than are read, with repeats, nearly all items."""
    rng = np.random.default_rng(0)
    lengths = (1, 2, LONGEST, LONGEST + 1, 3 * LONGEST)
    return [rng.integers(1, ITEMS + 1, size=n) for n in lengths] + [np.arange(1, ITEMS - 3)]


def loaded(model: Any, filter_seen: bool = True) -> ExportedRecommender:
    ids = [f"i{n}" for n in range(1, ITEMS + 1)]
    return ExportedRecommender(model.eval(), ids, None, LONGEST, filter_seen)


def build(backbone: PreTrainedModel, filter_seen: bool = True, **how: Any) -> ExportedRecommender:
    table = torch.randn(ITEMS + 1, 6)
    table[0] = 0
    keep_blocks(backbone, range(2))
    return loaded(Recommender(backbone.float(), table, PROMPT, **how), filter_seen)


@torch.inference_mode()
def naive(model: Recommender, history: np.ndarray) -> list[float]:
    """The scores of items 1..I: one text of vectors through the decoder, in float64."""
    recent = torch.from_numpy(history[-LONGEST:])[None]
    parts = [model.token_embeddings(torch.tensor([tokens])) for tokens in (PROMPT, SUFFIX)]
    items = model.embed(recent)
    text = torch.cat([parts[0], items, *(parts[1:] if len(model.suffix) else [])], dim=1)
    last = model.backbone(inputs_embeds=text, use_cache=False).last_hidden_state[0, -1]
    return (model.item_matrix()[1:] @ model.read_out(last)).tolist()


@pytest.mark.parametrize(
    "case",
    [each if each == "llama" else pytest.param(each, marks=pytest.mark.slow) for each in CASES],
)
def test_answers_against_a_naive_loop(
    case: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    ours = build(make_model(case), **CASES[case])  # type: ignore[arg-type]
    write_onnx(ours, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()  # nor where it was made
    session, users = open_session(tmp_path / "model.onnx"), histories()
    assert compare_answers(session, ours, users).users == len(users)
    exact = ours.model.double()
    for top, batch in ((10, users), (1, users[1:3]), (ITEMS, users[:1]), (ITEMS, users[3:])):
        items, scores = session.run(None, {"histories": padded(batch), "top": np.array([top])})
        assert items.shape == scores.shape == (len(batch), top)
        for history, best, values in zip(batch, items, scores, strict=True):
            own = naive(exact, history)
            seen = {*history} if ours.filter_seen else set()
            left = [item for item in range(1, ITEMS + 1) if item not in seen]
            expected = sorted(left, key=lambda item: -own[item - 1])[:top]
            assert best[values > -np.inf].tolist() == expected
            assert values[: len(expected)] == pytest.approx(
                [own[item - 1] for item in expected], rel=1e-4, abs=1e-4
            )


class Session:
    """Answers as a session gives them, changed."""

    def __init__(self, ours: ExportedRecommender, change: Callable[..., None]) -> None:
        self.graph, self.change = onnx.TopItems(ours), change

    @torch.inference_mode()
    def run(self, _: None, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        rows = torch.from_numpy(given["histories"])
        items, scores = (each.numpy() for each in self.graph(rows))
        self.change(items, scores)
        return items, scores


def swap(items: np.ndarray, scores: np.ndarray) -> None:
    """The first two of each user change places."""
    items[:, [0, 1]] = items[:, [1, 0]]


def test_others_are_found_and_ties_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SASRec(ITEMS, width=8, blocks=1, heads=2, drop=0, longest=LONGEST)
    ours, users = loaded(model), histories()
    same = compare_answers(Session(ours, lambda *_: None), ours, users)  # type: ignore[arg-type]
    assert (same.users, same.reordered) == (len(users), 0)

    def stranger(items: np.ndarray, scores: np.ndarray) -> None:
        items[0, 0] = (items[0, 0] + ITEMS // 2) % ITEMS + 1

    def inflated(items: np.ndarray, scores: np.ndarray) -> None:
        scores[0] += 0.01

    def shorter(items: np.ndarray, scores: np.ndarray) -> None:
        scores[0, 1] = -np.inf

    for change, wrong in ((swap, 6), (stranger, 1), (inflated, 1), (shorter, 1)):
        with pytest.raises(BadInput, match=f"{wrong} of 6 histories"):
            compare_answers(Session(ours, change), ours, users)  # type: ignore[arg-type]
    # items of one vector have one score
    with torch.no_grad():
        model.items.weight[1:] = model.items.weight[1]
    told = compare_answers(Session(ours, swap), ours, users)  # type: ignore[arg-type]
    assert (told.reordered, told.largest_difference) == (6, pytest.approx(0, abs=1e-6))


def test_what_can_not_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Branching(SASRec):
        def encode(self, histories: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            vectors = super().encode(histories, lengths)
            return vectors if vectors.sum() > 0 else -vectors

    model = Branching(ITEMS, width=8, blocks=1, heads=2, drop=0, longest=LONGEST)
    with pytest.raises(BadInput, match="--onnx: expected an architecture .*'Branching'") as caught:
        write_onnx(loaded(model), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(onnx, "NEEDED", ("onnx", "no_such_runtime"))
    with pytest.raises(BadInput, match="no_such_runtime': not installed; pip install 'depthprobe"):
        onnx.check_installed()
