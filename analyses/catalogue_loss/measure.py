"""Peak memory and time of a training step over a catalogue, whole or sampled.

    python analyses/catalogue_loss/measure.py

Memory is the peak of a process of its own. Times are CPU seconds of one thread, which do not depend
on what else the machine does: medians over rounds in which every way takes its turn, after one
round that is not counted.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from depthprobe.models.sasrec import SASRec
from depthprobe.runs.layout import machine
from depthprobe.study import Recipe
from depthprobe.training.losses import catalogue_loss

MILLION, BEAUTY = 1_000_000, 12_101
USERS, LENGTH, WIDTH = 128, 10, 64
POSITIONS = USERS * LENGTH
STEPS = 4
RECIPES = {
    "full": Recipe(),
    "full, bfloat16": Recipe(precision="bfloat16"),
    "sampled softmax, 256": Recipe(loss="sampled-softmax"),
    "gBCE, 256": Recipe(loss="gbce"),
}
NAIVE = "the whole matrix"
NEEDED = 24e9  # bytes free before the whole matrix, of which autograd holds three, is tried
UNIT = 1 if sys.platform == "darwin" else 1024  # of the peak that the system tells

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure memory, then time, then what the choice of negatives does to the gradient."""
    torch.set_num_threads(1)
    print(f"{machine(torch.device('cpu')).cpu}, torch {torch.__version__}\n")
    show_steps()
    show_times(BEAUTY, torch_rows=256, rounds=15)
    show_times(MILLION, torch_rows=32, rounds=5)
    show_negatives(100_000, draws=10)


def show_steps() -> None:
    """Whole steps of SASRec with AdamW over a million items, a process each."""
    print(f"| a step, {MILLION:,} items, {POSITIONS:,} positions | peak GB | median s |")
    print("|---|---|---|")
    for name in (*RECIPES, NAIVE):
        free = psutil.virtual_memory().available
        if name == NAIVE and free < NEEDED:
            print(f"| {name} | not tried: {free / 1e9:.0f} GB free | |")
            continue
        command = [sys.executable, __file__, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
        peak, seconds = map(float, done.stdout.split())
        print(f"| {name} | {peak:.2f} | {seconds:.2f} |", flush=True)
    print()


def step(name: str) -> None:
    """Some steps of one way; print the peak in GB, and the median second of all but the first."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SASRec(MILLION, width=WIDTH, blocks=2, heads=2, drop=0.5, longest=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    way = naive if name == NAIVE else partial(ours, recipe=RECIPES[name])
    low = name in RECIPES and RECIPES[name].precision == "bfloat16"
    seconds = []
    for _ in range(STEPS):
        windows = torch.randint(1, MILLION + 1, (USERS, LENGTH + 1))
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            vectors = model(windows[:, :-1]).flatten(0, 1)
            loss = way(vectors, model.item_matrix(), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / 1e9
    print(peak, statistics.median(seconds[1:]))


def show_times(n_items: int, *, torch_rows: int, rounds: int) -> None:
    """Loss and gradients alone, each way in turn."""
    vectors, items, targets = make(n_items)
    ways: dict[str, Way] = {name: partial(ours, recipe=r) for name, r in RECIPES.items()}
    ways["sampled softmax, 256 shared by the batch"] = shared
    if hasattr(functional, "linear_cross_entropy"):
        ways[f"torch's linear_cross_entropy, {torch_rows} rows"] = partial(fused, rows=torch_rows)
    if n_items < MILLION:
        ways[NAIVE] = naive
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            vectors.grad = items.grad = None
            began = time.process_time()
            low = name in RECIPES and RECIPES[name].precision == "bfloat16"
            with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
                loss = way(vectors, items, targets)
            loss.backward()
            seconds[name].append(time.process_time() - began)
    print(f"| loss and gradients, {n_items:,} items | median ms | range |\n|---|---|---|")
    for name, taken in seconds.items():
        ms = [1e3 * each for each in taken[1:]]
        print(f"| {name} | {statistics.median(ms):.0f} | {min(ms):.0f}-{max(ms):.0f} |", flush=True)
    print()


def show_negatives(n_items: int, *, draws: int) -> None:
    """How far a sampled softmax's gradients are from the full ones, relative to their norm."""
    vectors, items, targets = make(n_items)
    full = gradients(partial(ours, recipe=RECIPES["full"]), vectors, items, targets)
    print("| negatives | distance of the vectors' gradient | of the items' |\n|---|---|---|")
    sampled = partial(ours, recipe=RECIPES["sampled softmax, 256"])
    for name, way in (("of each position", sampled), ("shared by the batch", shared)):
        far = torch.zeros(2)
        for _ in range(draws):
            made = gradients(way, vectors, items, targets)
            far += torch.stack([(a - b).norm() / b.norm() for a, b in zip(made, full, strict=True)])
        print(f"| {name} | {far[0] / draws:.2f} | {far[1] / draws:.2f} |")


def gradients(way: Way, vectors: Tensor, items: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(way(vectors, items, targets), [vectors, items])


def make(n_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of unit variance, items that give scores of it, targets at random."""
    torch.manual_seed(0)
    vectors = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    items = (torch.randn(n_items + 1, WIDTH) / WIDTH**0.5).requires_grad_()
    return vectors, items, torch.randint(1, n_items + 1, (POSITIONS,))


def ours(vectors: Tensor, items: Tensor, targets: Tensor, *, recipe: Recipe) -> Tensor:
    return catalogue_loss(vectors, items, targets, recipe=recipe)


def naive(vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(vectors @ items[1:].T, targets - 1)


def fused(vectors: Tensor, items: Tensor, targets: Tensor, *, rows: int) -> Tensor:
    """Torch 2.13's own, with a chunk of its users' choice: its own choice is a row or two."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return functional.linear_cross_entropy(vectors, items[1:], targets - 1, options=options)


def shared(vectors: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """The alternative not taken: one set of negatives for all positions, hits masked."""
    n_items, negatives = len(items) - 1, Recipe().negatives
    ids = torch.randperm(n_items)[:negatives] + 1
    wanted = (vectors * functional.embedding(targets, items)).sum(dim=1, keepdim=True)
    scores = vectors @ functional.embedding(ids, items).T
    scores = scores + torch.log(torch.tensor((n_items - 1) / negatives))
    scores = scores.masked_fill(ids == targets[:, None], -torch.inf)
    return functional.cross_entropy(torch.cat([wanted, scores], dim=1), torch.zeros_like(targets))


if __name__ == "__main__":
    step(sys.argv[1]) if len(sys.argv) > 1 else main()
