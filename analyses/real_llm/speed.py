"""Seconds and memory of a real LLM here, beside a plain transformers and accelerate loop.

    python analyses/real_llm/speed.py BACKBONE LOG [--history 50] [--depths 1,4,8,16,30]

Both sides do the same work at each depth, in a process of their own, in turn: train on the same
windows for one epoch (a new AdamW, every position a target, cross-entropy over the catalogue), and
rank the same users. The plain side is what one writes first: float32, the prompt before every user,
every history padded to the longest, as the Trainer's collators pad. Seconds are medians over the
turns; memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from depthprobe.cost.size import peak_memory
from depthprobe.cost.timing import processor_name
from depthprobe.data.prepared import read_data
from depthprobe.evaluation.ranks import EvalSet, evaluate
from depthprobe.models.backbones import pretrained
from depthprobe.models.build import build_recommender
from depthprobe.models.precision import compute_in_bfloat16, precision_on
from depthprobe.study import PROMPT, Backbone, Data, Recipe
from depthprobe.training.loop import fit
from depthprobe.training.objectives import NextItem

WINDOWS, USERS, BATCH, WIDTH = 256, 256, 32, 64
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbone")
    parser.add_argument("log")
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument("--depths", default="1,4,8,16,30")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=("depthprobe", "plain"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    depths = [int(depth) for depth in asked.depths.split(",")]
    if asked.side:
        print(json.dumps(SIDES[asked.side](asked, depths[0])))
        return
    rows = []
    for depth in depths:
        for turn in range(asked.turns):
            for side in SIDES:
                command = [sys.executable, __file__, asked.backbone, asked.log, "--side", side]
                command += ["--history", str(asked.history), "--depths", str(depth)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
                rows.append({"depth": depth, "turn": turn, "side": side} | json.loads(done.stdout))
                print(rows[-1], file=sys.stderr)
    table = pd.DataFrame(rows)
    if asked.output:
        table.to_csv(asked.output, index=False)
    show(table)


def show(table: pd.DataFrame) -> None:
    """Print a Markdown table of both sides by depth, and of all depths together: a sweep."""
    medians = table.groupby(["depth", "side"], as_index=False).median(numeric_only=True)
    sweep = medians.groupby("side")[["train", "test"]].sum()
    print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__},")
    print(f"load {os.getloadavg()[0]:.1f}; {WINDOWS} windows, {USERS} users\n")
    print("| blocks | train, s | plain | ratio | test, s | plain | ratio | peak, GB | plain |")
    print("|---|---|---|---|---|---|---|---|---|")
    for depth in sorted(medians["depth"].unique()):
        own, plain = (
            medians[(medians["depth"] == depth) & (medians["side"] == side)].iloc[0]
            for side in SIDES
        )
        print(
            f"| {depth} | {own['train']:.2f} | {plain['train']:.2f} |"
            f" {plain['train'] / own['train']:.1f} | {own['test']:.2f} | {plain['test']:.2f} |"
            f" {plain['test'] / own['test']:.1f} | {own['peak']:.2f} | {plain['peak']:.2f} |"
        )
    own, plain = (sweep.loc[side] for side in SIDES)
    print(
        f"| all | {own['train']:.1f} | {plain['train']:.1f} | {plain['train'] / own['train']:.1f} |"
        f" {own['test']:.1f} | {plain['test']:.1f} | {plain['test'] / own['test']:.1f} | | |"
    )
    print(f"\nTraining and test of all depths: {plain.sum() / own.sum():.1f} times faster.")


def work(asked: argparse.Namespace) -> tuple[list[np.ndarray], EvalSet, Tensor]:
    """Training windows, users to rank, and an item table of random vectors."""
    log = read_data(Data(source=asked.log))
    drawn = np.random.default_rng(0)
    histories = [log.history(user)[-asked.history - 2 :] for user in range(log.n_users)]
    histories = [history for history in histories if len(history) > 3]
    places = drawn.permutation(len(histories))
    windows = [histories[place][:-1] for place in places[:WINDOWS]]
    tested = [histories[place] for place in places[:USERS]]
    users = EvalSet(
        users=np.arange(len(tested)),
        histories=[history[-asked.history - 1 : -1] for history in tested],
        targets=np.array([history[-1] for history in tested]),
        seen=None,
        negatives=None,
    )
    items = torch.randn(log.n_items + 1, WIDTH, generator=torch.Generator().manual_seed(0)) / 8
    items[0] = 0
    return windows, users, items


def timed_depthprobe(asked: argparse.Namespace, depth: int) -> dict[str, float]:
    windows, users, items = work(asked)
    settings = Backbone(source=asked.backbone)
    with peak_memory(CPU) as peak:
        shape = pretrained(settings, weights=False)
        precision = precision_on(CPU, sum(weight.numel() for weight in shape.parameters()))
        model = build_recommender(settings, items, kept=tuple(range(depth)), seed=0)
        if precision == "bfloat16":
            compute_in_bfloat16(model.backbone)
        recipe = Recipe(epochs=1, batch_size=BATCH, precision=precision)
        objective = NextItem(model, recipe)

        def train(some: list[np.ndarray]) -> None:
            fit(objective, some, recipe=recipe, validate=lambda: 0.0, seed=0, device=CPU)

        train(windows[:BATCH])  # warm up
        began = time.perf_counter()
        train(windows)
        trained = time.perf_counter()
        evaluate(model.eval(), users, device=CPU)
        ended = time.perf_counter()
    return {"train": trained - began, "test": ended - trained, "peak": peak["rss"] / 1e9}


class Plain(nn.Module):
    """A decoder between item vectors and scores, as one writes it first."""

    def __init__(self, asked: argparse.Namespace, items: Tensor, depth: int) -> None:
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(asked.backbone, dtype=torch.float32)
        self.decoder, self.items = model.model, nn.Embedding.from_pretrained(items)
        self.decoder.layers = self.decoder.layers[:depth]
        self.decoder.embed_tokens.requires_grad_(False)
        hidden = model.config.hidden_size
        self.enter, self.leave = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        prompt = AutoTokenizer.from_pretrained(asked.backbone)(PROMPT)["input_ids"]
        self.register_buffer("prompt", torch.tensor(prompt))

    def forward(self, histories: Tensor) -> Tensor:
        """Right-padded items (B, T) to user vectors after each of them (B, T, d)."""
        prompt = self.decoder.embed_tokens(self.prompt).expand(len(histories), -1, -1)
        vectors = torch.cat([prompt, self.enter(self.items(histories))], dim=1)
        before = histories.new_ones(len(histories), prompt.shape[1])
        mask = torch.cat([before, (histories > 0).long()], dim=1)
        out = self.decoder(inputs_embeds=vectors, attention_mask=mask, use_cache=False)
        return self.leave(out.last_hidden_state[:, prompt.shape[1] :])


def timed_plain(asked: argparse.Namespace, depth: int) -> dict[str, float]:
    windows, users, items = work(asked)
    with peak_memory(CPU) as peak:
        accelerator, model = Accelerator(cpu=True), Plain(asked, items, depth)
        trained = [p for p in model.parameters() if p.requires_grad]
        model = accelerator.prepare(model)

        def train(some: list[np.ndarray]) -> None:
            model.train()
            optimizer = torch.optim.AdamW(trained, lr=1e-3)
            padded = torch.from_numpy(padded_to(some, asked.history + 1))
            for batch in padded[torch.randperm(len(padded))].split(BATCH):
                scores = model(batch[:, :-1]) @ model.items.weight.T
                goal = batch[:, 1:]
                loss = functional.cross_entropy(
                    scores.flatten(0, 1), goal.flatten(), ignore_index=0
                )
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()

        train(windows[:BATCH])  # warm up
        began = time.perf_counter()
        train(windows)
        done = time.perf_counter()
        model.eval()
        padded = torch.from_numpy(padded_to(users.histories, asked.history))
        targets = torch.from_numpy(users.targets.astype(np.int64))
        lengths = torch.tensor(users.lengths)
        with torch.no_grad():
            for rows in torch.arange(len(padded)).split(128):
                vectors = model(padded[rows])[torch.arange(len(rows)), lengths[rows] - 1]
                scores = vectors @ model.items.weight.T
                (scores > scores.gather(1, targets[rows, None])).sum(dim=1)
        ended = time.perf_counter()
    return {"train": done - began, "test": ended - done, "peak": peak["rss"] / 1e9}


def padded_to(histories: list[np.ndarray], length: int) -> np.ndarray:
    """Item ids right-padded with 0, (B, length)."""
    padded = np.zeros((len(histories), length), dtype=np.int64)
    for row, history in zip(padded, histories, strict=True):
        row[: len(history)] = history[-length:]
    return padded


SIDES = {"depthprobe": timed_depthprobe, "plain": timed_plain}

if __name__ == "__main__":
    main()
