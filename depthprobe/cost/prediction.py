"""Predicted time and memory of a depth on a device, from its shape and the device's roof.

Nothing here is measured. Times are bounds from below: each phase takes its FLOPs at the peak or
its bytes at the bandwidth, whichever is longer. The bytes are those of weights read, of what every
matrix reads and writes, and of scores; a step of training reads the weights twice, keeps
activations, and touches each trained weight ten times (gradient, clipping, AdamW's two moments).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from depthprobe.cost.actions import CHUNK
from depthprobe.cost.depths import Shape
from depthprobe.cost.gpus import Roof
from depthprobe.cost.serving import serving_cost
from depthprobe.cost.workload import Workload

SINGLE = 4  # bytes of a number in float32, which adapters, items and scores are in
FIRST, LAST = 8, 4096  # users in the smallest and the largest batch that is tried
USABLE = 0.9  # of a device's memory, the rest is the driver's and lost in fragments


def encode_seconds(shape: Shape, batch: int, roof: Roof) -> float:
    """Users to vectors, the prompt having run before."""
    moved = shape.block_weights + batch * shape.positions * _traffic(shape)
    return roof.seconds(batch * shape.flops_encode, moved, shape.dtype)


def score_seconds(shape: Shape, batch: int, roof: Roof) -> float:
    """Vectors to the best items: the scores are written, and read again to find the best."""
    moved = _item_bytes(shape) + 2 * batch * shape.items * SINGLE
    return roof.seconds(batch * shape.flops_score, moved, "float32")


def train_seconds(shape: Shape, batch: int, roof: Roof, *, asked: int) -> float:
    """A step that asks for the next item at so many positions of a user.

    The backward pass takes twice the forward one's FLOPs, or once where the weights of the blocks
    get no gradient.
    """
    passes = 3 if shape.tuning == "full" else 2
    flops = passes * (batch * shape.flops_encode + shape.flops_prompt)
    positions = batch * shape.positions + shape.prompt_positions
    moved = 2 * shape.block_weights + 10 * shape.trained + 3 * positions * _traffic(shape)
    scored = batch * asked
    of_scores = 2 * _item_bytes(shape) + 4 * scored * shape.items * SINGLE
    return roof.seconds(flops, moved, shape.dtype) + roof.seconds(
        2 * scored * shape.flops_score, of_scores, "float32"
    )


def serving_bytes(shape: Shape, batch: int) -> float:
    """Memory of an answer: the weights, and what one block and the scores hold."""
    a_block = shape.ports / shape.depth * _width(shape)
    return shape.weights + batch * shape.positions * a_block + _scores(shape, batch)


def training_bytes(shape: Shape, batch: int) -> float:
    """Memory of a step: weights, gradients, AdamW's moments, activations, some scores.

    Activations: what every matrix reads and writes, which is about what a Llama's block keeps for
    its backward pass; less with low-rank updates, more with attention that keeps its scores.
    """
    positions = batch * shape.positions + shape.prompt_positions
    held = positions * _traffic(shape) + _scores(shape, batch * shape.positions)
    return shape.weights + 3 * shape.trained + held


def predict(shape: Shape, batch: int, roof: Roof, workload: Workload) -> dict[str, float]:
    """Predicted milliseconds of each phase, ``one``: of a batch of one user end to end."""
    encode, score = encode_seconds(shape, batch, roof), score_seconds(shape, batch, roof)
    alone = encode_seconds(shape, 1, roof) + score_seconds(shape, 1, roof)
    step = train_seconds(shape, batch, roof, asked=workload.length)
    times = {"train_step": step, "encode": encode, "score": score, "answer": encode + score}
    times["answer_one"] = alone
    return {f"predicted_{name}_ms": 1000 * value for name, value in times.items()}


def prediction_table(
    found: Sequence[Shape], roof: Roof, workload: Workload, *, price: float | None = None
) -> pd.DataFrame:
    """Predicted time, memory and serving cost of every depth on a device; the last is the whole.

    All columns that are predicted say so in their names; times in ms, memory in bytes. Speed-ups
    are over the last row. ``predicted_fits``: what the memory is enough for.

    Args:
        found: shapes by rising depth.
        price: of an hour of the device.
    """
    batch = workload.batch or largest_gain(found[-1], roof)
    rows: list[dict[str, Any]] = []
    for shape in found:
        row: dict[str, Any] = {"predicted_on": roof.name, "depth": shape.depth}
        row |= {"dtype": shape.dtype, "batch": batch} | predict(shape, batch, roof, workload)
        served = serving_cost(row["predicted_answer_ms"] / 1000, batch, price=price)
        row |= {f"predicted_{name}": value for name, value in served.items()}
        memory = {"serving": serving_bytes(shape, batch), "training": training_bytes(shape, batch)}
        row |= {f"predicted_{name}_bytes": value for name, value in memory.items()}
        fits = [name for name, value in memory.items() if value < USABLE * roof.memory]
        row["predicted_fits"] = " and ".join(fits) or "neither"
        rows.append(row)
    table = pd.DataFrame(rows)
    for name in ("train_step", "answer", "answer_one"):
        times = table[f"predicted_{name}_ms"]
        table[f"predicted_{name}_times_faster"] = times.iloc[-1] / times
    return table


def largest_gain(shape: Shape, roof: Roof) -> int:
    """The predicted batch from which on doubling it serves hardly more users a second."""

    def rate(batch: int) -> float:
        return batch / (encode_seconds(shape, batch, roof) + score_seconds(shape, batch, roof))

    def allowed(batch: int) -> bool:
        if trains(shape, FIRST, roof.memory):
            return trains(shape, batch, roof.memory)
        return serving_bytes(shape, batch) < USABLE * roof.memory

    return saturating_batch(rate, allowed, gain=1.05)


def trains(shape: Shape, batch: int, memory: float) -> bool:
    """Whether a step is predicted to fit into so many bytes."""
    return training_bytes(shape, batch) < USABLE * memory


def saturating_batch(
    rate: Callable[[int], float], allowed: Callable[[int], bool], *, gain: float = 1.1
) -> int:
    """The smallest batch, a power of two, that doubling makes less than ``gain`` times as fast.

    Args:
        rate: users a second at a batch size.
        allowed: whether a batch may be tried.
        gain: what counts as faster; above what repeated measurements differ by.
    """
    batch, found = FIRST, rate(FIRST)
    while 2 * batch <= LAST and allowed(2 * batch):
        more = rate(2 * batch)
        if more < gain * found:
            break
        batch, found = 2 * batch, more
    return batch


def _width(shape: Shape) -> int:
    return int(torch.finfo(getattr(torch, shape.dtype)).bits // 8)


def _traffic(shape: Shape) -> int:
    """Bytes that the matrices of all blocks read and write for a position."""
    return shape.ports * _width(shape)


def _scores(shape: Shape, vectors: int) -> float:
    """Bytes of the scores that are held at a time, and of what is made of them."""
    return 2.0 * min(CHUNK, vectors * shape.items * SINGLE)


def _item_bytes(shape: Shape) -> float:
    return shape.flops_score / 2 * SINGLE  # a multiply-add for each number of the table
