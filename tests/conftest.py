"""One thread a process, no downloads, the same random numbers, folders that all workers share."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

# before anything imports torch: tests run side by side, and more threads than cores slow all down
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("depthprobe", deadline=None, derandomize=True)
settings.load_profile("depthprobe")


def pytest_xdist_auto_num_workers() -> int:
    """Workers for ``-n auto``: the cores this process may use, at most 8 (memory)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``shared_folder(name, make)``: a folder that ``make(folder)`` fills once for all workers.

    Tests only read it: one that changes it copies it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own below

    def share(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not made.exists():
                folder.mkdir()  # fails where another worker has failed before
                make(folder)
                made.touch()
        return folder

    return share


@pytest.fixture(scope="session")
def llama_config() -> Callable[..., Any]:
    """``llama_config(num_hidden_layers=5, ...)``: the configuration of a tiny Llama."""

    def make(**changes: object) -> Any:
        from transformers import LlamaConfig  # most tests need no transformers

        sizes = {
            "vocab_size": 11,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        return LlamaConfig(**{**sizes, **changes})

    return make


@pytest.fixture(scope="session")
def small_inputs(shared_folder: Callable[..., Path], llama_config: Callable[..., Any]) -> Path:
    """A folder with ``log.txt`` of sixty users and a ``backbone`` of three blocks."""
    return shared_folder("small-inputs", lambda folder: _write_inputs(folder, llama_config))


def _write_inputs(folder: Path, llama_config: Callable[..., Any]) -> None:
    import numpy as np
    import torch
    from transformers import LlamaForCausalLM

    from depthprobe.models.embedded import embedded_tokenizer

    rng = np.random.default_rng(0)
    lines = []
    for user in range(60):  # items count up from a random start: easily learnt
        start, length = rng.integers(40), rng.integers(5, 12)
        lines.append(f"u{user} " + " ".join(f"i{(start + k) % 40}" for k in range(length)))
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    config = llama_config(num_hidden_layers=3, vocab_size=259)  # the embedded tokenizer's
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    embedded_tokenizer().save_pretrained(folder / "backbone")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    # a test that has not imported them needs no seed, and should not wait for the import
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command that runs in this process sets the level of our log lines: for itself alone."""
    ours = logging.getLogger("depthprobe")
    level, propagate = ours.level, ours.propagate
    yield
    ours.setLevel(level)
    ours.propagate = propagate
