"""Methods that read the items' titles up to each block: how many blocks does an encoder need?"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor

from depthprobe.evaluation.ranks import evaluate
from depthprobe.files import complete_folder, reserve
from depthprobe.methods import Task
from depthprobe.models.backbones import pretrained_config
from depthprobe.models.item_tables import balanced, item_texts, read_titles
from depthprobe.probing.titles import anisotropy, effective_rank, fit_title_readout
from depthprobe.runs.context import Context, Result, Scores
from depthprobe.runs.records import digests_in, write_sealed
from depthprobe.runs.training import SECONDS, is_whole, sasrec

TITLES, STATES = "titles", "states.npy"  # in the folder of what all trials share


def sasrec_on_titles(context: Context, task: Task) -> Iterator[Result]:
    """SASRec on titles read up to each depth, mapped linearly to its width."""
    return sasrec(context, task, title_table(context, task.blocks, task.trials[0].depth))


def linear_readouts(context: Context, task: Task) -> Iterator[Result]:
    """At each depth, a ridge regression from a history's titles to the next item's title."""
    for trial in task.trials:
        table = title_table(context, task.blocks, trial.depth).to(context.device)
        readout = fit_title_readout(table, context.windows, context.validation)
        ranks = evaluate(readout, context.test, device=context.device)
        fitted, items = readout.weight.numel(), table.numel()
        counts = {"blocks": 0, "token_embeddings": 0, "adapters": fitted, "item_table": items}
        yield Result(trial, ranks, counts | {"total": fitted + items, "trainable": fitted})


def spread_by_depth(context: Context, task: Task) -> Iterator[Scores]:
    """How the vectors of the titles are spread at each depth, before any training."""
    rows = []
    for depth, table in enumerate(title_states(context, task.blocks)):
        vectors = torch.from_numpy(np.array(table))
        rows.append((depth, anisotropy(vectors), effective_rank(vectors)))
    yield Scores(pd.DataFrame(rows, columns=["depth", "anisotropy", "effective_rank"]))


def title_table(context: Context, blocks: int, depth: int) -> Tensor:
    """The item table of titles read up to a depth, (I + 1, D), on the CPU."""
    states = title_states(context, blocks)[depth]
    return balanced(torch.from_numpy(np.array(states)), f"text:{depth}")


def title_states(context: Context, blocks: int) -> np.ndarray:
    """The titles read up to every depth, (L + 1, I + 1, D) float32, memory-mapped.

    From one pass over the catalogue, by the first task that needs it: 4 (L + 1) (I + 1) D bytes on
    disk, or 173 MB for 2,420 items and 30 blocks of width 576.
    """
    folder = context.shared / TITLES
    with FileLock(context.shared / f".{TITLES}.lock"):
        if not is_whole(folder):
            settings, sequences = context.backbone, context.sequences
            texts = item_texts(sequences.item_ids.tolist(), sequences.titles)
            width = pretrained_config(settings).get_text_config(decoder=True).hidden_size
            began = time.perf_counter()
            with complete_folder(folder, parents=False) as temporary:
                path, shape = temporary / STATES, (blocks + 1, len(texts) + 1, width)
                tables = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
                reserve(path)
                out, depths = torch.from_numpy(tables), range(blocks + 1)
                read_titles(settings, texts, depths=depths, out=out, device=context.device)
                tables.flush()
                seconds = time.perf_counter() - began
                own = {"seconds": seconds, "files": digests_in(temporary)}
                write_sealed(temporary / SECONDS, own)
    states: np.ndarray = np.load(folder / STATES, mmap_mode="r")
    return states
