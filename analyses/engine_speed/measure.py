"""How much faster the shared prompt in length buckets is than the papers' padded layout.

    python analyses/engine_speed/measure.py [--histories sequences.txt] [--backbone FOLDER]

Both sides encode, and train on, the same users at the same depth in one process, batch by batch in
turn. The padded side is SLMRec's layout: 61 prompt slots, 30 left-padded items, 8 response slots,
all of them for every user. A time is the sum over all batches of a round; medians over rounds.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from depthprobe.data.batches import length_buckets
from depthprobe.models.recommender import Recommender
from depthprobe.study import Recipe
from depthprobe.training.losses import catalogue_loss
from depthprobe.training.objectives import Batch, NextItem, at_rows, make_batch

PROMPT, ITEMS, SUFFIX = 61, 30, 8  # slots of SLMRec's layout
CATALOGUE, D_ITEM = 12_101, 64  # Beauty's items, a SASRec's width
# interactions of a user in Amazon 2014 Beauty, 5-core: how many users have 5, 6, ... 30 or more
BEAUTY = (7162, 4221, 2680, 1811, 1366, 881, 695, 558, 439, 361, 262, 207, 213, 141, 118, 112)
BEAUTY += (117, 84, 66, 73, 74, 61, 54, 44, 44, 519)


class Padded(torch.nn.Module):
    """The papers' layout around the parts of a recommender: every slot of every user."""

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.model = model

    def states(self, left: Tensor) -> Tensor:
        """Histories left-padded to 30, (B, 30), to normed states of all slots, (B, 99, D)."""
        model, users = self.model, len(left)
        prompt, suffix = (
            model.token_embeddings(part).expand(users, -1, -1)
            for part in (model.prompt, model.suffix)
        )
        items = model.input_adapter(model.items(left)).to(prompt.dtype)
        ones = left.new_ones(users, 1)
        mask = [ones.expand(-1, len(model.prompt)), left > 0, ones.expand(-1, len(model.suffix))]
        seen = torch.cat([part.long() for part in mask], dim=1)
        out = model.backbone(
            inputs_embeds=torch.cat([prompt, items, suffix], dim=1),
            attention_mask=seen,
            position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        )
        states: Tensor = out.last_hidden_state
        return states

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) right-padded as everywhere in depthprobe, (B,) -> (B, d)."""
        return self.model.read_out(self.states(to_left(histories, lengths))[:, -1])

    def every(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """User vectors after every item, (N, d) in the order of rows; no suffix."""
        states = self.states(to_left(histories, lengths))[:, len(self.model.prompt) :]
        places = torch.arange(ITEMS, device=lengths.device)
        return self.model.read_out(states[places >= ITEMS - lengths[:, None]])


def to_left(histories: Tensor, lengths: Tensor) -> Tensor:
    """Right-padded (B, T) to left-padded (B, 30)."""
    left = histories.new_zeros(len(histories), ITEMS)
    width = histories.shape[1]
    left[:, :width] = histories
    place = torch.arange(ITEMS, device=lengths.device) - (ITEMS - lengths[:, None])
    return torch.where(place >= 0, left.gather(1, place.clamp(min=0)), 0)


def main() -> None:
    options = _options()
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    backbone = _backbone(options.backbone)
    users = _users(options.histories, options.users)
    depth = backbone.config.num_hidden_layers
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    source = options.backbone or "random weights"
    mean = np.mean([len(user) - 1 for user in users])
    print(f"{depth} blocks ({source}), {len(users)} users, {mean:.1f} items a test history")
    for objective in ("last", "every"):
        suffix = range(5, 5 + SUFFIX) if objective == "last" else ()
        torch.manual_seed(0)
        table = torch.randn(CATALOGUE + 1, D_ITEM) * D_ITEM**-0.5
        prompt = range(3, 3 + PROMPT)
        model = Recommender(copy.deepcopy(backbone), table, prompt, suffix=list(suffix))
        model.token_embeddings.requires_grad_(False)
        print(f"\nobjective {objective}")
        _compare_exactly(copy.deepcopy(model).double(), users[:256], objective, options.batch)
        _encoding(model, users, options)
        _training(model, users, objective, options)


def _encoding(model: Recommender, users: list[np.ndarray], options: argparse.Namespace) -> None:
    """All items but the last of each user, to a vector: the prompt is computed once in all."""
    ours = _batches(users, "last", options.batch, buckets=True)
    theirs = _batches(users, "last", options.batch, buckets=False)
    padded = Padded(model.eval())
    with torch.inference_mode():
        prompt = model.prepare_prompt()
        _race(
            "encode",
            [lambda b=b: padded.encode(b.inputs, b.lengths) for b in theirs],
            [lambda b=b: model.encode(b.inputs, b.lengths, prompt) for b in ours],
            options.rounds,
        )
    _count_slots(model, theirs, ours)


def _training(
    model: Recommender, users: list[np.ndarray], objective: str, options: argparse.Namespace
) -> None:
    """Steps of forward, loss, backward, clipping, AdamW, on all items but the last two."""
    recipe = Recipe(objective=objective, batch_size=options.batch)
    users = [user[:-2] for user in users]
    ours = _batches(users, objective, options.batch, buckets=True, seed=0)
    theirs = _batches(users, objective, options.batch, buckets=False)
    padded, shared = Padded(copy.deepcopy(model)).train(), NextItem(model, recipe).train()

    def loss(batch: Batch) -> Tensor:
        find = padded.encode if objective == "last" else padded.every
        vectors = find(batch.inputs, batch.lengths)
        targets = batch.targets
        return catalogue_loss(vectors, padded.model.item_matrix(), targets, recipe=recipe)

    old, new = _step(padded, loss), _step(shared, shared)
    _race(
        "train",
        [lambda b=b: old(b) for b in theirs],
        [lambda b=b: new(b) for b in ours],
        options.rounds,
    )
    _count_slots(model, theirs, ours)


def _step(model: torch.nn.Module, loss: Callable[[Batch], Tensor]) -> Callable[[Batch], None]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def step(batch: Batch) -> None:
        loss(batch).backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _race(
    what: str,
    theirs: list[Callable[[], object]],
    ours: list[Callable[[], object]],
    rounds: int,
) -> None:
    """Batches of both sides in turn, and what they took, in all and of the processor."""
    theirs[0](), ours[0]()
    walls, works = [], []
    for _ in range(rounds):
        wall, work = [0.0, 0.0], [0.0, 0.0]
        for pair in zip(theirs, ours, strict=True):
            for side, run in enumerate(pair):
                start = time.perf_counter(), time.process_time()
                run()
                wall[side] += time.perf_counter() - start[0]
                work[side] += time.process_time() - start[1]
        walls.append(wall)
        works.append(work)
    for name, found in (("wall", walls), ("processor", works)):
        old, new = (statistics.median(side) for side in zip(*found, strict=True))
        ratios = [a / b for a, b in found]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}, {rounds} rounds"
        ratio = statistics.median(ratios)
        print(f"{what}, {name} s: padded {old:.2f}, shared {new:.2f}: {ratio:.2f}x ({spread})")


def _count_slots(model: Recommender, theirs: list[Batch], ours: list[Batch]) -> None:
    old = sum(len(b.lengths) for b in theirs) * (PROMPT + ITEMS + len(model.suffix))
    width = sum(b.inputs.shape[0] * (b.inputs.shape[1] + len(model.suffix)) for b in ours)
    new = width + len(ours) * PROMPT
    print(f"  slots: padded {old:,}, shared {new:,}, a prompt a batch included: {old / new:.2f}x")


def _compare_exactly(
    model: Recommender, users: list[np.ndarray], objective: str, batch_size: int
) -> None:
    """Outputs and gradients of both sides in float64; Llama's norms stay in float32 by design."""
    padded, found = Padded(model.eval()), []
    batches = _batches(users, objective, batch_size, buckets=True)
    for shared in (False, True):
        vectors = []
        for batch in batches:
            if objective == "last":
                encode = model.encode if shared else padded.encode
                vectors.append(encode(batch.inputs, batch.lengths))
            elif shared:
                vectors.append(at_rows(model(batch.inputs), batch.rows))
            else:
                vectors.append(padded.every(batch.inputs, batch.lengths))
        every = torch.cat(vectors)
        model.zero_grad()
        every.square().mean().backward()
        grads = [w.grad for w in model.parameters() if w.grad is not None]
        found.append((every.detach(), grads))
    (old, olds), (new, news) = found
    gap = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(olds, news, strict=True))
    outputs = (old - new).abs().max() / old.abs().max()
    print(f"float64, relative: outputs {outputs.item():.1e}, gradients {gap:.1e}")


def _batches(
    users: list[np.ndarray], objective: str, size: int, *, buckets: bool, seed: int | None = None
) -> list[Batch]:
    """Batches of like lengths, or as the users come."""
    lengths = np.array([len(user) for user in users])
    order = np.arange(len(users))
    chosen = [order[start : start + size] for start in range(0, len(users), size)]
    if buckets:
        chosen = length_buckets(lengths, size, seed=seed)
    return [make_batch(users, part, torch.device("cpu"), objective) for part in chosen]


def _users(path: Path | None, count: int) -> list[np.ndarray]:
    """So many users' item ids, in time, at most 31 of each: 30 are read, one is asked."""
    rng = np.random.default_rng(0)
    if path is None:
        sizes = rng.choice(np.arange(5, 5 + len(BEAUTY)), size=count, p=np.divide(BEAUTY, 22_363))
        return [rng.integers(1, CATALOGUE + 1, size=size + (size == 30)) for size in sizes]
    lines = path.read_text().splitlines()
    rows = [lines[index].split()[1:] for index in rng.choice(len(lines), count, replace=False)]
    return [np.array(row[-(ITEMS + 1) :], dtype=np.int64) for row in rows]


def _backbone(folder: str | None) -> PreTrainedModel:
    if folder is not None:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=12, num_attention_heads=4))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=Path, help="user item item ... a line, in time")
    parser.add_argument("--backbone", help="a folder; default: random weights of the same sizes")
    parser.add_argument("--users", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
