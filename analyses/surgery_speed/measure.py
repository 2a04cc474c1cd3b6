"""How long a cut and the self-test of an architecture take, and how much memory the test needs.

    python analyses/surgery_speed/measure.py

Medians over runs in this process after one that is not counted; memory in a process of its own.
"""

from __future__ import annotations

import copy
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from depthprobe.models.check import can_be_cut, check_backbone
from depthprobe.models.cutting import keep_blocks

RUNS = 5
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 32,
    "num_attention_heads": 4,
}
MEMORY = """
import resource, sys
from transformers import LlamaConfig
from transformers.utils.logging import disable_progress_bar
from depthprobe.models.check import can_be_cut, check_backbone
disable_progress_bar()
unit = 2**20 if sys.platform == "darwin" else 2**10
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
assert can_be_cut(check_backbone(LlamaConfig()))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
"""


def main() -> None:
    disable_progress_bar()
    config = LlamaConfig(**TINY)
    model = LlamaForCausalLM(config).eval()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    def cut() -> None:
        keep_blocks(copy.deepcopy(model), range(0, 32, 8))

    def check(of: LlamaConfig) -> None:
        if not can_be_cut(check_backbone(of)):
            raise SystemExit("the check failed")

    def both() -> None:
        cut()
        check(config)

    _show("cut 4 of 32 tiny blocks, a copy of the model included", cut)
    _show("check the 32-block tiny configuration", lambda: check(config))
    _show("both", both)
    _show("check a 7B configuration", lambda: check(LlamaConfig()))
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    before, after = map(float, done.stdout.split())
    weights = 6.74e9 * 2 / 2**20
    print(f"peak memory of checking a 7B configuration: {after:,.0f} MiB, {before:,.0f} of them")
    print(f"for the imports alone; its weights in half precision are {weights:,.0f} MiB")


def _show(what: str, action: Callable[[], None]) -> None:
    action()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
    print(f"{what}: {statistics.median(seconds):.2f} s ({spread}, {RUNS} runs)")


if __name__ == "__main__":
    main()
