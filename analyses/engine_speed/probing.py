"""What probes cost, in encodings of the same users by the whole model.

    python analyses/engine_speed/probing.py [--histories sequences.txt] [--backbone FOLDER]

A probe and a plain encoding of all users run in turn in one process; a time is that of all batches;
medians over rounds. Catalogue scoring is per answer whatever the probe is, and apart: one figure.
Without a backbone they are random ones of 12 and of 32 blocks.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.recommender import Recommender
from depthprobe.probing.passes import passes, vectors_of
from depthprobe.probing.similarity import similarities
from depthprobe.probing.walk import Route, blocks_run, route, walk

CATALOGUE, D_ITEM, PROMPT = 12_101, 64, 16  # Beauty's items, a SASRec's width
CPU = torch.device("cpu")
Action = Callable[[Recommender, EvalSet], object]


def main() -> None:
    options = _options()
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    if options.memory:
        _memory(options.memory)
        return
    asked = _questions(options.histories, options.users)
    mean = np.mean([len(history) for history in asked.histories])
    few = _first(asked, options.span_users)  # half a thousand answers take as many passes
    print(f"{len(asked.users)} users, {mean:.1f} items a history, a prompt of {PROMPT}")
    print(f"spans: the first {len(few.users)} of them")
    for depth, backbone in _backbones(options.backbone):
        torch.manual_seed(0)
        table = torch.randn(CATALOGUE + 1, D_ITEM) * D_ITEM**-0.5
        model = Recommender(backbone, table, range(3, 3 + PROMPT)).eval()
        singles = [route(b for b in range(depth) if b != out) for out in range(depth)]
        spans = [
            route(b for b in range(depth) if not first <= b < end)
            for end in range(1, depth + 1)
            for first in range(end)
            if end - first < depth
        ]
        print(f"\n{depth} blocks, {model.width} wide\n")
        print("| what | answers | encodings | range | bar | blocks run / L | a naive loop |")
        print("|---|---|---|---|---|---|---|")
        naive = {
            "all depths": (depth + 1) / 2,
            "all single skips": depth - 1,
            "all spans": sum(len(each) for each in spans) / depth,
        }
        _row("all depths", model, asked, _depths, depth + 1, 1.10, 1.0, naive, options.rounds)
        for name, users, routes, bar in (
            ("all single skips", asked, singles, 0.55 * depth),
            ("all spans", few, spans, 0.20 * depth**2),
        ):
            run = blocks_run(routes) / depth
            _row(name, model, users, _walking(routes), len(routes), bar, run, naive, options.rounds)
        maps = depth * (depth + 1) // 2
        _row("similarity maps", model, asked, _maps, maps, 1.25, 1.0, naive, options.rounds)


@torch.inference_mode()
def _encode(model: Recommender, asked: EvalSet) -> None:
    prompt = model.prepare_prompt()
    for _, histories, lengths in asked.batches(device=CPU):
        model.encode(histories, lengths, prompt)


@torch.inference_mode()
def _depths(model: Recommender, asked: EvalSet) -> None:
    for _, states in passes(model, asked, device=CPU):
        vectors_of(model, states)


def _maps(model: Recommender, asked: EvalSet) -> object:
    return similarities(model, asked, device=CPU)


def _walking(routes: list[Route]) -> Action:
    @torch.inference_mode()
    def action(model: Recommender, asked: EvalSet) -> None:
        for _, states in walk(model, asked, routes, device=CPU):
            vectors_of(model, states)

    return action


def _row(
    name: str,
    model: Recommender,
    asked: EvalSet,
    probe: Action,
    answers: int,
    bar: float,
    run: float,
    naive: dict[str, float],
    rounds: int,
) -> None:
    _encode(model, asked)
    ratios = []
    for _ in range(rounds):
        plain, probed = _seconds(_encode, model, asked), _seconds(probe, model, asked)
        ratios.append(probed / ((plain + _seconds(_encode, model, asked)) / 2))
    loop = f"{naive[name]:.1f}" if name in naive else ""
    print(
        f"| {name} | {answers} | {statistics.median(ratios):.2f} |"
        f" {min(ratios):.2f}-{max(ratios):.2f} | {bar:.2f} | {run:.2f} | {loop} |",
        flush=True,
    )


def _seconds(action: Action, model: Recommender, asked: EvalSet) -> float:
    began = time.perf_counter()
    action(model, asked)
    return time.perf_counter() - began


def _memory(users: list[int]) -> None:
    """Peak memory of the same probes with more and more users; the answers go to files in a run."""
    print("\n| users | peak MiB, above what the questions take |\n|---|---|")
    config = _config(12)
    torch.manual_seed(0)
    model = Recommender(LlamaForCausalLM(config), torch.randn(CATALOGUE + 1, D_ITEM), (3, 1)).eval()
    for count in sorted(users):
        asked = _questions(None, count)
        before = _peak()
        _depths(model, asked)
        _maps(model, asked)
        print(f"| {count} | {max(0, _peak() - before)} |", flush=True)


def _peak() -> int:
    """Most memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _questions(path: Path | None, count: int) -> EvalSet:
    rng = np.random.default_rng(0)
    if path is None:
        lengths = np.clip(rng.geometric(1 / 8, size=count) + 3, 4, 50)
        histories = [rng.integers(1, CATALOGUE + 1, size=n).astype(np.int32) for n in lengths]
    else:
        lines = path.read_text().splitlines()[:count]
        whole = [np.array(line.split()[1:-1], dtype=np.int64) for line in lines]
        histories = [(items[-50:] % CATALOGUE + 1).astype(np.int32) for items in whole]
    targets = rng.integers(1, CATALOGUE + 1, size=len(histories))
    return EvalSet(np.arange(len(histories)), histories, targets, None, None)


def _first(asked: EvalSet, count: int) -> EvalSet:
    return EvalSet(asked.users[:count], asked.histories[:count], asked.targets[:count], None, None)


def _backbones(path: Path | None) -> list[tuple[int, PreTrainedModel]]:
    if path is not None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return [(model.config.num_hidden_layers, model)]
    return [(depth, LlamaForCausalLM(_config(depth))) for depth in (12, 32)]


def _config(depth: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histories", type=Path, help="lines of: user item item ...")
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--span-users", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", type=int, nargs="*", help="instead: for so many users")
    return parser.parse_args()


if __name__ == "__main__":
    main()
