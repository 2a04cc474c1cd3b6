"""A whole recommender as one ONNX file: rows of items in, the best rows and their scores out.

Inputs: ``histories`` int64 (B, T), rows of the item table, oldest first, right-padded with 0, at
least one per user; ``top`` int64 (1,), the number of items per user. The graph itself takes the
latest rows, and leaves out a user's own items if ``recommend`` does.

Outputs: ``items`` int64 and ``scores`` float32, (B, top), best first, on ties the lower row first.
If fewer items are left, the rest have the score -inf. The graph computes in float32; the prompt's
keys and values are constants.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from depthprobe.errors import BadInput, one_line
from depthprobe.models.export import ExportedRecommender
from depthprobe.models.recommender import Recommender

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FLAG, FILE = "--onnx", "recommender.onnx"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOP, FURTHER = 10, 100  # best items to compare
BATCH = 64  # users at once
TOLERANCE = 1e-4  # of a user's largest score: tolerated rounding


class Agreement(msgspec.Struct):
    """How the file's answers compare with ours."""

    users: int
    reordered: int  # users with items in another order, within the tolerance
    largest_difference: float  # largest difference of a score, over the user's largest score


def check_installed() -> None:
    """Refuse if a package that writes or runs ONNX is not installed."""
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        fault = "not installed; pip install 'depthprobe[onnx]'"
        raise BadInput(FLAG, " ".join(absent), fault, fault=True)


class TopItems(nn.Module):
    """A recommender from rows of items to its best ones, as the graph computes it."""

    def __init__(self, loaded: ExportedRecommender) -> None:
        super().__init__()
        self.model, self.longest = loaded.model, loaded.max_history
        self.filter_seen = loaded.filter_seen
        self.prompt: dict[str, Any] = {}
        if isinstance(self.model, Recommender):
            with torch.inference_mode(False), torch.no_grad():
                self.prompt = {"prompt": self.model.prepare_prompt()}

    def forward(self, histories: Tensor) -> tuple[Tensor, Tensor]:
        """The best rows and their scores, (B, T) -> (B, 10) twice, in the order of a graph."""
        lengths = (histories != 0).sum(dim=1)  # (B,)
        # the latest items, without a branch on their number
        places = torch.arange(torch.sym_min(histories.shape[1], self.longest))
        recent = histories.gather(1, (lengths - self.longest).clamp(min=0)[:, None] + places)
        vectors = self.model.encode(recent, lengths.clamp(max=self.longest), **self.prompt)
        padding = torch.zeros_like(histories[:, :1])
        hidden = torch.cat([histories, padding], dim=1) if self.filter_seen else padding
        scores = (vectors @ self.model.item_matrix().T).scatter(1, hidden, -torch.inf)
        values, items = scores.topk(min(TOP, scores.shape[1] - 1), dim=1)
        return items, values


def write_onnx(loaded: ExportedRecommender, path: Path) -> None:
    """Write a recommender in float32; ``BadInput`` if torch.onnx can't export its architecture.

    Weights of 2 GB or more go into a file beside it.
    """
    graph = TopItems(loaded).eval()
    # Longer than the model reads: windowed attention is traced only for long texts, and holds
    # for shorter texts too. That it was as long is then an assertion, which ONNX has not.
    example = torch.ones(2, loaded.max_history + 1, dtype=torch.long)
    axes = {"histories": {0: torch.export.Dim("users"), 1: torch.export.Dim("length")}}
    silenced = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        # torch's output about a failed graph goes to standard error
        with redirect_stderr(StringIO()), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # torch.export refuses a size that tracing would silently fix
            traced = torch.export.export(
                graph,
                (example,),
                dynamic_shapes=axes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            program: Any = torch.onnx.export(
                traced,
                input_names=list(axes),
                output_names=["items", "scores"],
                dynamic_shapes=axes,
                verbose=False,
            )
            _finish(program.model)
    except Exception as error:  # of several libraries
        name = type(getattr(loaded.model, "backbone", loaded.model)).__name__
        reason = one_line(str(error).strip().partition("\n")[0] or type(error).__name__)
        allowed = f"an architecture that torch.onnx can export ({reason})"
        raise BadInput(FLAG, name, allowed) from None
    finally:
        logging.disable(silenced)
    program.save(path)


def _finish(model: Any) -> None:
    """Turn the number of items, which torch has fixed, into an input; drop source locations."""
    import onnx_ir

    (node,) = (node for node in model.graph if node.op_type == "TopK")
    kind = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    top = onnx_ir.Value(name="top", type=kind, shape=onnx_ir.Shape([1]))
    node.replace_input_with(1, top)
    model.graph.inputs.append(top)
    for value in {*node.outputs, *model.graph.outputs}:
        value.shape = onnx_ir.Shape([value.shape[0], "top"])
    for node in model.graph:  # torch notes the file and line that a node comes from
        node.metadata_props.clear()


def open_session(path: Path) -> InferenceSession:
    """Open a file in onnxruntime, on the processor, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def padded(histories: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of items, right-padded with 0: int64 (B, T)."""
    rows = [torch.tensor(history, dtype=torch.long) for history in histories]
    matrix: np.ndarray = pad_sequence(rows, batch_first=True).numpy()
    return matrix


def compare_answers(
    session: InferenceSession, loaded: ExportedRecommender, histories: Sequence[np.ndarray]
) -> Agreement:
    """Compare the ten best items of a file with those of ``loaded.recommend``, user by user.

    Each place must hold the same item, unless our scores of both items differ by at most 1e-4 of
    the user's largest score. Scores may differ by as much. Exact ties are in the order of the item
    table in both.

    Raises:
        BadInput: if the items for a history differ.
    """
    top, asked = (min(most, len(loaded.item_ids)) for most in (TOP, FURTHER))
    order = sorted(range(len(histories)), key=lambda user: len(histories[user]))
    wrong, reordered, largest = 0, 0, 0.0
    for first in range(0, len(order), BATCH):
        batch = [histories[user] for user in order[first : first + BATCH]]
        given = {"histories": padded(batch), "top": np.array([top])}
        ours = loaded.recommend([[loaded.item_ids[i - 1] for i in each] for each in batch], asked)
        for answer, items, scores in zip(ours, *session.run(None, given), strict=True):
            found = [row for row, score in zip(items, scores, strict=True) if score > -np.inf]
            own = {loaded.numbers[each.item]: each.score for each in answer}
            expected = list(own)[:top]
            if len(found) != len(expected) or not {*found} <= {*own}:
                wrong += 1
                continue
            scale = max(map(abs, own.values()), default=0.0) or 1.0
            gaps = [own[a] - own[b] for a, b in zip(expected, found, strict=True)]
            errors = [own[b] - score for b, score in zip(found, scores, strict=False)]
            difference = float(np.max(np.abs([*gaps, *errors, 0.0]))) / scale
            largest = max(largest, difference)
            wrong += not difference <= TOLERANCE
            reordered += expected != found
    if wrong:
        fault = f"{wrong:,} of {len(histories):,} histories get other items than ours"
        raise BadInput(FLAG, FILE, fault, fault=True)
    return Agreement(len(histories), reordered, largest)
