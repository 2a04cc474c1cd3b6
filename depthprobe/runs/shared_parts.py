"""What the trials of a run share, made once a run or once a seed: what is needed, what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from depthprobe.data.storage import MANIFEST as DATA_MANIFEST
from depthprobe.methods import Task
from depthprobe.runs.context import DATA, ITEM_TABLE, LEARNED, NEGATIVES, TIMING, Context
from depthprobe.runs.effort import asks_greedy, features_id, features_of, greedy_id
from depthprobe.runs.plan import full_trial
from depthprobe.runs.records import is_done
from depthprobe.runs.training import FEATURES


@dataclass(frozen=True)
class Part:
    """What trials share: how many of it the study needs, how many are there."""

    name: str
    needed: int
    there: int


def shared_parts(
    context: Context, tasks: Sequence[Task], blocks: int, *, there: frozenset[str]
) -> list[Part]:
    """What is made once a run or once a seed, and how many of it are there.

    Args:
        there: features and greedy removals that are, see :func:`made`.
    """
    study, shared = context.study, context.shared

    def trials(method: str) -> Part:
        own = [full_trial(method, seed, blocks) for seed in range(study.seeds)]
        done = sum(is_done(context.trial_folder(trial)) for trial in own)
        return Part(method, len(own), done)

    parts = [Part("data", 1, int((shared / DATA / DATA_MANIFEST).is_file()))]
    if study.protocol.sampled:
        parts.append(Part("negatives", 1, int((shared / NEGATIVES).exists())))
    if study.item_table not in ("sasrec", LEARNED):
        parts.append(Part("item table", 1, int((shared / ITEM_TABLE).exists())))
    needed = {need for task in tasks for need in task.needs} | {task.id for task in tasks}
    parts += [
        trials(method)
        for method in ("sasrec", "full")
        if full_trial(method, 0, blocks).id in needed
    ]
    features = {name for task in tasks if (name := features_of(study, task)) is not None}
    if features:
        parts.append(Part("features", len(features), len(features & there)))
    removals = {greedy_id(task.seed) for task in tasks if asks_greedy(study, task)}
    if removals:
        parts.append(Part("removals", len(removals), len(removals & there)))
    parts.append(Part("times", 1, int((shared / TIMING).exists())))
    return parts


def made(context: Context, blocks: int) -> frozenset[str]:
    """Features and greedy removals in the folder, of teachers that are there, too."""
    found = set()
    for seed in range(context.study.seeds):
        if not is_done(context.trial_folder(full_trial("full", seed, blocks))):
            continue
        for objective in ("every", "last"):
            if any(context.shared.glob(f"{FEATURES}-s{seed}-{objective}-*")):
                found.add(features_id(seed, objective))
        if any(context.shared.glob(f"greedy-s{seed}-*.json")):
            found.add(greedy_id(seed))
    return frozenset(found)
