"""Plan a sweep and estimate its time, without writing anything.

Each method declares its work in units, and a short measurement gives the seconds per unit. Their
products are the jobs, which are assigned to workers as the scheduler would assign them.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from depthprobe.cost.size import free_memory
from depthprobe.cost.timing import machine
from depthprobe.data.storage import MANIFEST as DATA_MANIFEST
from depthprobe.methods import RANKED, Sizes, Task, method_of, method_order
from depthprobe.runs.context import LEARNED, Context
from depthprobe.runs.layout import Inputs, available_cores, jobs_at_once, read_inputs, threads_of
from depthprobe.runs.plan import full_trial
from depthprobe.runs.probing import REMOVAL
from depthprobe.runs.records import DATA, ITEM_TABLE, NEGATIVES, TIMING, is_done, state_of
from depthprobe.runs.timing import covers, measure, read_timing, shape_name
from depthprobe.runs.training import FEATURES, models_in, spec_of, stage_depths
from depthprobe.study import (
    OWN,
    STATE_SELECTIONS,
    Recipe,
    Study,
    parse_layers,
    settings_of,
)

SECONDS = 4.0  # to measure, if the run has no times yet
START = 4.0  # seconds until a worker has loaded its libraries and the log; on two Xeon cores


class Estimate(NamedTuple):
    """Upper estimates, in seconds, of what is left to do."""

    timed: bool  # True: from the run's times. False: from a short measurement
    busy: float  # processes that wanted a core while that was made, by core
    seconds: float  # until all is done, with the sweep's workers
    work: float  # of all jobs in sequence
    chain: tuple[Job, ...]  # of the longest chain of jobs that need each other
    by_method: dict[str, float]
    memory: float | None  # peak bytes of a process that trains all blocks
    fewer: bool  # whether it was measured with smaller batches than the study's


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The plan of a sweep, what its folder already holds, and an estimate for the rest."""

    inputs: Inputs
    folder: Path
    device: torch.device
    workers: int  # jobs at a time
    threads: int  # of a worker, on a CPU
    processes: int  # that train together
    apart: bool  # each job has a machine of its own
    together: int  # jobs that share one memory, the machine's or a GPU's
    retry_failed: bool
    rows: list[tuple[Any, ...]]  # a method, and its tasks, trials, done, failed, left
    shared: list[tuple[str, int, int]]  # what trials share, how many are needed, are there
    lost: int  # trials that can't run, since something that they need has failed
    waiting: list[Task]  # that will be done
    free: int  # bytes of memory that the jobs may use
    estimate: Estimate | None = None  # None if nothing is left, or nothing could be measured:
    why: str = ""


def preview(
    study: Study,
    folder: Path,
    *,
    jobs: int | None = None,
    retry_failed: bool = False,
    processes: int = 1,
    apart: bool = False,
) -> Preview:
    """Plan a sweep into a folder as :func:`depthprobe.runs.sweep.run_sweep` would.

    Weights are not loaded, so missing ones show only when the sweep begins. A public log or a
    configuration of the Hub that is not on this machine yet is downloaded into its cache.

    Args:
        processes: that train together, under a launcher.
        apart: the jobs, by default one, run on machines of their own that are like this one.
    """
    inputs = read_inputs(study, folder, dry=True)
    context, tasks = _context(folder, inputs.working, inputs), inputs.tasks
    device = context.device
    states = {task.id: state_of(context.outputs(task)) for task in tasks}
    left = [task for task in tasks if states[task.id] != "done"]
    failed = {name for name, state in states.items() if state == "failed" and not retry_failed}
    waiting = without_lost(left, failed)
    doable = {task.id for task in waiting}
    there = _there(context, tasks)
    asked = 1 if processes > 1 or (apart and jobs is None) else jobs
    at_once = partial(jobs_at_once, asked, device, memory=inputs.job_memory)
    most = 1 if inputs.working.searches else len(tasks)  # a search trains one after the other
    workers = max(1, at_once(min(len(waiting), most)))
    plan = Preview(
        inputs=inputs,
        folder=folder,
        device=device,
        workers=workers,
        threads=threads_of(1 if apart else at_once(most), available_cores()),
        processes=processes,
        apart=apart,
        # of several GPUs each has its share of the workers
        together=1 if apart else -(-workers // max(1, torch.cuda.device_count())),
        retry_failed=retry_failed,
        rows=_rows(context, tasks, failed),
        shared=_shared(context, tasks, there),
        lost=sum(len(context.outputs(task)) for task in left if task.id not in doable | failed),
        waiting=waiting,
        free=free_memory(device),
    )
    if not waiting:
        return plan
    start = 0.0 if jobs == 0 or processes > 1 else START
    try:
        return replace(plan, estimate=_estimate(plan, context, start, there))
    except (ValueError, RuntimeError) as error:  # the plan can be shown without it
        return replace(plan, why=str(error).partition("\n")[0])


def _context(folder: Path, study: Study, inputs: Inputs) -> Context:
    """A context that has what the run's folder would hold."""
    context, split = Context(folder, study), inputs.split
    vars(context).update(split=split, sequences=split.sequences, _shared_table=inputs.table)
    return context


def _estimate(plan: Preview, context: Context, start: float, there: Collection[str]) -> Estimate:
    """Estimate the waiting tasks from the run's times, or from a short measurement."""
    study, device, blocks = context.study, context.device, plan.inputs.blocks
    path, measured = context.shared / TIMING, {}
    if path.exists():
        measured = read_timing(path)
    timed = bool(measured) and measured["conditions"]["device"] == device.type
    timed = timed and covers(measured, context, blocks)
    sizes = _sizes(context, blocks)
    trained = any(method_of(task.method).reads_users for task in plan.waiting)
    busy, alone = 0.0, 0.0
    if not timed:
        busy = float(machine(device)["busy"])
        if trained:
            _check_memory(context, plan)
        asked = tuple(dict.fromkeys(task.method for task in plan.waiting))
        few = _context(plan.folder, replace(study, methods=asked), plan.inputs)
        before = torch.get_num_threads()
        torch.set_num_threads(plan.threads if device.type == "cpu" else before)
        try:
            measured = measure(few, blocks, seconds=SECONDS, all_depths=False)
        finally:
            torch.set_num_threads(before)
        # the sweep begins with a longer one
        a_round = sum(float(np.median(values)) for values in measured["seconds"].values())
        rounds = study.cost.warmup + study.cost.rounds
        alone = max(a_round, min(study.cost.seconds, rounds * a_round))
    units = units_of(measured)
    jobs = jobs_of(study, plan.waiting, sizes, units, there=there, processes=plan.processes)
    if not math.isfinite(sum(job.seconds for job in jobs)):
        raise ValueError("a step takes too long to be timed")
    times = float(plan.together)  # a task takes at most this long beside others
    if device.type == "cpu":  # as if all threads had been used fully
        times = 1.0 if plan.apart else max(1.0, measured["conditions"]["threads"] / plan.threads)
    jobs = [replace(job, seconds=times * job.seconds) for job in jobs]
    by_method: defaultdict[str, float] = defaultdict(float)
    for job in jobs:
        by_method[job.method] += job.seconds
    return Estimate(
        timed=timed,
        busy=busy,
        seconds=alone + start + schedule(jobs, plan.workers),
        work=sum(by_method.values()),
        chain=longest_chain(jobs),
        by_method=by_method,
        memory=measured.get("peak_bytes") if trained else None,
        fewer=measured["conditions"]["train_batch"] < min(study.recipe.batch_size, sizes.windows),
    )


def _sizes(context: Context, blocks: int) -> Sizes:
    study = context.study
    return Sizes(
        windows=len(context.windows),
        validation=min(len(context.split.validation.users), study.protocol.validation_users),
        test=len(context.test.users),
        depths=parse_layers(study.layers, blocks),
    )


def seconds_of(task: Task, context: Context, *, processes: int = 1) -> float:
    """Upper estimate of a task's seconds, from the times that the run has measured."""
    units = units_of(read_timing(context.shared / TIMING))
    return _task_seconds(context.study, task, _sizes(context, task.blocks), units, processes)


def _check_memory(context: Context, plan: Preview) -> None:
    """Raise ``ValueError`` if stand-ins can't be made or do not fit into memory."""
    settings, facts = context.study.backbone, plan.inputs.manifest.backbone
    if settings.quantize != "none":
        raise ValueError("quantised weights can't be made up; the sweep will measure them")
    # gradients and AdamW's two moments beside the weights
    copies = 4 if settings.tuning == "full" else 1
    held = copies * facts.parameters * getattr(torch, facts.dtype).itemsize
    if held > plan.free:
        have = f"{plan.free / 1e9:.1f} GB available"
        raise ValueError(f"a training takes about {held / 1e9:.1f} GB, {have}")


def _rows(context: Context, tasks: Sequence[Task], failed: set[str]) -> list[tuple[Any, ...]]:
    counts: dict[str, Any] = {}
    for task in tasks:
        states = [state_of([path]) for path in context.outputs(task)]
        count, done = len(states), states.count("done")
        lost = count - done if task.id in failed else 0
        own = [1, count, done, lost or states.count("failed"), count - done - lost]
        counts[task.method] = counts.get(task.method, 0) + np.array(own)
    return [(name, *counts[name].tolist()) for name in sorted(counts, key=method_order)]


def _shared(
    context: Context, tasks: Sequence[Task], there: Collection[str]
) -> list[tuple[str, int, int]]:
    """What is made once per run or per seed, how many are needed, and how many exist."""
    study, shared = context.study, context.shared
    parts = [("data", 1, int((shared / DATA / DATA_MANIFEST).is_file()))]
    if study.protocol.sampled:
        parts.append(("negatives", 1, int((shared / NEGATIVES).exists())))
    if study.item_table not in ("sasrec", LEARNED, OWN):
        parts.append(("item table", 1, int((shared / ITEM_TABLE).exists())))
    needed = {need for task in tasks for need in (*task.needs, task.id)}
    for method in ("sasrec", "full"):
        own = [full_trial(method, seed, tasks[0].blocks) for seed in range(study.seeds)]
        if own[0].id in needed:
            done = sum(is_done(context.trial_folder(trial)) for trial in own)
            parts.append((method, len(own), done))
    wanted = {name for task in tasks for name in shared_of(study, task)}
    for kind in (FEATURES, REMOVAL):
        if own_kind := {name for name in wanted if name.startswith(kind)}:
            parts.append((kind, len(own_kind), len(own_kind & {*there})))
    return [*parts, ("times", 1, int((shared / TIMING).exists()))]


def _there(context: Context, tasks: Sequence[Task]) -> set[str]:
    """Shared outputs that exist in the folder, including trained teachers."""
    return {
        name
        for task in tasks
        for name in shared_of(context.study, task)
        if is_done(context.trial_folder(full_trial("full", task.seed, task.blocks)))
        and any(context.shared.glob(f"{name}-*"))
    }


# --- units of work ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Units:
    """Seconds of each unit of work.

    Attributes:
        seconds: of a step of ``batch`` windows and of encoding a user, by action.
        score: of the best items of the catalogue for one user.
    """

    batch: int
    seconds: Mapping[str, float]
    score: float

    def of(self, kind: str, depth: int | str) -> float:
        """Seconds of ``encode``, ``train`` or a method's step; NaN if its kind was not timed."""
        if f"{kind}:{depth}" in self.seconds:
            return self.seconds[f"{kind}:{depth}"]
        names = [(*name.rpartition(":"), seconds) for name, seconds in self.seconds.items()]
        timed = {int(d): s for of_kind, _, d, s in names if of_kind == kind and d.isdigit()}
        if kind not in ("encode", "train"):
            # the same multiple of a plain step as at the depths that were timed
            ratios = [seconds / self.of("train", each) for each, seconds in timed.items()]
            return self.of("train", depth) * (float(np.mean(ratios)) if ratios else 1.0)
        if not timed:
            return math.nan
        # linear between two measured depths, and beyond the last one
        depths = [0, *sorted(timed)]
        values = [timed.get(each, 0.0) for each in depths]
        slope = (values[-1] - values[-2]) / (depths[-1] - depths[-2])
        further = max(0, int(depth) - depths[-1]) * max(0.0, slope)
        return float(np.interp(int(depth), depths, values)) + further


def units_of(measured: dict[str, Any]) -> Units:
    """Measured seconds by unit. Batches of other lengths are assumed to average out."""
    conditions, seconds = measured["conditions"], {}
    for name, values in measured["seconds"].items():
        users = conditions["batch"] if name.startswith(("encode", "score")) else 1
        seconds[name] = float(np.median(values)) / users
    return Units(batch=conditions["train_batch"], seconds=seconds, score=seconds["score"])


# --- jobs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Work that one worker does without a break, once the jobs it needs have ended."""

    id: str
    seconds: float
    needs: tuple[str, ...] = ()
    method: str = ""


def jobs_of(
    study: Study,
    tasks: Sequence[Task],
    sizes: Sizes,
    units: Units,
    *,
    there: Collection[str] = (),
    processes: int = 1,
) -> list[Job]:
    """The jobs of the tasks, and of what the first task of a seed makes for all others.

    Trainings are counted in full; early stopping may end them sooner.

    Args:
        there: what :func:`shared_of` names and was made before.
        processes: that train together.
    """
    jobs: list[Job] = []
    made = set(there)
    for task in tasks:
        shared = shared_of(study, task)
        for name in (name for name in shared if name not in made):
            seconds = _removal_seconds(task.blocks, sizes, units)
            if name.startswith(FEATURES):  # every position is read out: about one more pass
                seconds = 2 * units.of("encode", task.blocks) * sizes.windows
            jobs.append(Job(name, seconds, task.needs, task.method))
        made.update(shared)
        seconds = _task_seconds(study, task, sizes, units, processes)
        jobs.append(Job(task.id, seconds, (*task.needs, *shared), task.method))
    return jobs


def shared_of(study: Study, task: Task) -> list[str]:
    """What a task needs besides trials, by the prefix of its file's name."""
    settings = settings_of(study, task.method)
    found = [f"{REMOVAL}-s{task.seed}"] if settings.select == "greedy" else []
    spec = spec_of(settings, task.trials[0]) if task.trials else None
    if spec is not None and settings.distillation.features == "cached":
        found.append(f"{FEATURES}-s{task.seed}-{spec.objective}")
    return found


def _removal_seconds(blocks: int, sizes: Sizes, units: Units) -> float:
    """Every single skip at each removal: an upper bound for the lazy search."""
    passes = (blocks**2 / 6 + 1) * units.of("encode", blocks)
    return (passes + blocks * (blocks + 1) / 2 * RANKED * units.score) * sizes.validation


def _task_seconds(study: Study, task: Task, sizes: Sizes, units: Units, processes: int) -> float:
    settings = settings_of(study, task.method)
    method, recipe = settings.method, settings.recipe
    steps = math.ceil(sizes.windows / (recipe.batch_size * processes))
    epochs = _epochs(study, task, recipe) * (1 if task.seed else len(recipe.rates))
    sizes = replace(sizes, epochs=epochs, steps=steps)
    work = method.work(task, sizes)
    own = task.method if method.settings in ("distillation", "elastic") else "train"
    stages: list[int] = []
    if settings.at_once < 1:
        stages = stage_depths(task.blocks, task.trials[0].depth, settings.at_once)

    def each(kind: str, depth: int | str) -> float:
        """Seconds of a unit of work, by the shape of the blocks, or in stages of equal length."""
        if depth == "sasrec" or not (stages or settings.reshapes):
            return units.of(kind, depth)
        if stages:
            return float(np.mean([units.of(kind, one) for one in stages]))
        name = shape_name(study, task.method, int(depth))
        if kind not in ("encode", "train") or f"{kind}:{name}" in units.seconds:
            return units.of(kind, depth if kind == own != "train" else name)
        return units.of(kind, int(depth) * settings.loops)

    seconds = work.score * units.score
    seconds += sum(users * each("encode", depth) for depth, users in work.encode.items())
    for depth, count in work.steps.items():
        # a smaller batch is not taken to be faster
        larger = 1.0 if depth == "sasrec" else max(1.0, recipe.batch_size / units.batch)
        seconds += count * larger * each(own, depth)
    for blocks in [task.blocks, *stages[:-1]] if settings.select in STATE_SELECTIONS else ():
        seconds += sizes.validation * units.of("encode", blocks)
    for blocks in stages[:-1] if settings.select == "greedy" else ():
        seconds += _removal_seconds(blocks, sizes, units)
    return seconds


def _epochs(study: Study, task: Task, recipe: Recipe) -> int:
    """Upper bound of the epochs; ``budget = "compute"`` gives a shallower model more."""
    method = method_of(task.method)
    if study.budget == "steps" or method.role not in ("trained", "control"):
        return recipe.epochs
    models = models_in(study, task.method, task.blocks)
    # half the depth saves at most the time of the blocks; scoring items takes as long as before
    run = task.trials[-1].depth * settings_of(study, task.method).loops
    return max(1, round(recipe.epochs * models * task.blocks / run))


def schedule(jobs: Sequence[Job], workers: int) -> float:
    """Seconds until the last job ends, if each free worker takes the first job that is ready.

    A sweep assigns its tasks in this way (list scheduling).

    >>> sasrec, full = Job("sasrec", 2), Job("full", 5, ("sasrec",))
    >>> schedule([sasrec, full, Job("student", 1, ("full",)), Job("variant", 3, ("sasrec",))], 2)
    8.0
    """
    waiting = {job.id: job for job in jobs}
    missing = set(waiting)  # jobs that have not ended; a need that is no job exists already
    running: list[tuple[float, str]] = []  # a heap: when it ends, its id
    now = 0.0
    while missing:
        ready = [job for job in waiting.values() if missing.isdisjoint(job.needs)]
        for job in ready[: workers - len(running)]:
            heapq.heappush(running, (now + job.seconds, waiting.pop(job.id).id))
        if not running:
            raise ValueError(f"no job can begin: {', '.join([*waiting][:3])}")
        now, name = heapq.heappop(running)
        missing.remove(name)
    return now


def longest_chain(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """The longest chain of jobs that need each other; more workers can't shorten it."""
    best: dict[str, tuple[Job, ...]] = {}

    def seconds(chain: tuple[Job, ...]) -> float:
        return sum(job.seconds for job in chain)

    for job in jobs:  # each comes after what it needs
        before = max((best[need] for need in job.needs if need in best), key=seconds, default=())
        best[job.id] = (*before, job)
    return max(best.values(), key=seconds, default=())


def without_lost(tasks: Sequence[Task], lost: Collection[str]) -> list[Task]:
    """The tasks that can still run: neither failed ones nor those that need them."""
    gone, kept = set(lost), list[Task]()
    for task in tasks:  # each comes after what it needs
        if task.id in gone or gone & {*task.needs}:
            gone.add(task.id)
        else:
            kept.append(task)
    return kept
