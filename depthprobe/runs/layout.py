"""What all trials of a run share: study, log, item table, and where the numbers come from."""

from __future__ import annotations

import copy
import datetime
import os
import platform
import subprocess  # noqa: S404 - asks git for its commit, with fixed arguments
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from depthprobe.cost.size import training_memory
from depthprobe.cost.timing import processor_name
from depthprobe.data.batches import negatives
from depthprobe.data.prepared import read_data
from depthprobe.data.splits import Split, make_split
from depthprobe.data.storage import MANIFEST as DATA_MANIFEST
from depthprobe.data.storage import Sequences, load_data, write_data
from depthprobe.errors import BadInput, check_writable
from depthprobe.files import complete_file, digest_of, remove_leftovers
from depthprobe.methods import Task, base_of, method_of, method_order
from depthprobe.models.backbones import (
    backbone_revision,
    describe,
    pinned_now,
    pretrained,
    pretrained_config,
    pretrained_tokenizer,
)
from depthprobe.models.blocks import check_tokens
from depthprobe.models.build import Shape, check_lengths, lora_maps, prompt_and_suffix, reshape
from depthprobe.models.check import check_own
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.item_tables import item_texts, make_table, table_hash
from depthprobe.models.own import OwnRecommender, load_own
from depthprobe.models.precision import precision_on, resolve_device
from depthprobe.models.quantize import ITEMS, check_scheme, maps_to_round
from depthprobe.models.words import item_tokens, look_alikes
from depthprobe.runs.context import LEARNED, same_backbone, words_digest
from depthprobe.runs.plan import SASREC, TEACHER, plan
from depthprobe.runs.records import (
    DATA,
    ITEM_TABLE,
    MANIFEST,
    NEGATIVES,
    PLACES,
    SHARED,
    STUDY,
    BackboneFacts,
    Dataset,
    Git,
    ItemTable,
    Machine,
    Manifest,
    Sampled,
    read_manifest,
    shared_file,
    write_manifest,
)
from depthprobe.runs.store import open_run
from depthprobe.runs.tables import SLICES, own_slices, slice_columns, write_slices
from depthprobe.study import (
    OWN,
    Backbone,
    Study,
    differences,
    load_study,
    settings_of,
    study_to_toml,
)
from depthprobe.training.tracking import check_trackers

NEGATIVE_SEED = 999
TOO_SMALL = "sampled ranking is left out: some user has fewer than 999 items left to draw from"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a sweep reads and checks before it writes anything.

    Attributes:
        study: merged with the methods and variants that the run already has.
        working: the same, with the commit in place of the backbone's branch or tag, and the actual
            precision in place of ``auto``.
        before: the manifest of the run that is continued; None where a run begins.
        manifest: of the run, if it begins with these inputs.
        config: the configuration of the backbone's decoder.
        table: the item table that all trials share, not yet written; None if each seed has its own.
    """

    study: Study
    working: Study
    before: Manifest | None
    manifest: Manifest
    tasks: list[Task]
    split: Split
    config: PreTrainedConfig
    table: Tensor | None

    @property
    def blocks(self) -> int:
        """The number of blocks of the full backbone."""
        return int(self.config.num_hidden_layers)

    @property
    def job_memory(self) -> float:
        """Roughly the bytes that training all blocks takes; 0 if no method uses them."""
        study, facts = self.working, self.manifest.backbone
        if not any(method_of(name).reads_users for name in study.methods):
            return 0.0
        recipe, settings = study.recipe, study.backbone
        longest = min(study.data.max_history, int(np.diff(self.split.sequences.offsets).mean()))
        most = recipe.positions_on(resolve_device(study.device).type)
        positions = min(recipe.batch_size * longest, most)
        if settings.reads_titles:
            positions = most
        return training_memory(
            self.config,
            facts.parameters,
            positions=positions,
            trained=settings.tuning == "full",
            checkpointing=settings.checkpointing,
        )


def read_inputs(
    study: Study, folder: Path, *, command: str | None = None, dry: bool = False
) -> Inputs:
    """Read and check what a sweep of a study into a folder needs.

    The tasks are those of the methods that the study itself names, and of all seeds of the run.

    Args:
        command: that repeats the run.
        dry: compute only the shape of an item table that comes from texts.

    Raises:
        BadInput: if a tracker, the cache, the data, the backbone, the item table or the depths
            can't be used, or the folder holds another study.
    """
    device = resolve_device(study.device)
    check_trackers(study.tracking.to)
    if study.cache is not None:
        check_writable("cache", Path(study.cache).expanduser())
    before = manifest_before(folder)
    if before is not None:
        open_run(folder).check()
    merged = continued(folder, study)
    if before is None:
        backbone = pinned_now(merged.backbone)
    else:
        backbone = same_backbone(merged.backbone, before.backbone)
    working = replace(merged, backbone=backbone)
    config = pretrained_config(backbone).get_text_config(decoder=True)
    tasks = plan(replace(study, seeds=merged.seeds), int(config.num_hidden_layers))
    # refuses a log in which no user can be tested
    split = make_split(_read_log(merged, folder), merged.protocol)
    _check_sizes(study, split.sequences.n_items, config)
    _new_slices(merged, split, before)
    width = int(config.hidden_size) if dry else None
    table = _shared_table(working, split.sequences, folder, device, width)
    ids, titles = split.sequences.item_ids.tolist(), split.sequences.titles
    for name in study.methods:
        if method_of(name).titles:  # refused where there are none
            item_texts(ids, titles, field="methods", asked=name)
            pretrained_tokenizer(backbone)
        if method_of(name).lever:
            check_scheme(base_of(name), device)
    schemes = {base_of(name) for name in study.methods if method_of(name).lever} - {ITEMS}
    if schemes and not backbone.own:
        shape = pretrained(backbone, weights=False)
        for scheme in sorted(schemes):
            maps_to_round(shape, scheme)  # refused where nothing can be rounded
    tokens = item_tokens(backbone, ids, titles)
    longest = _longest_text(split.sequences, merged.data.max_history, tokens or [])
    if before is None:
        own = load_own(backbone.source, ids) if backbone.own else None
        if own is not None:
            _check_own(merged, own, longest)
        facts = _checked(study, backbone, tasks, tokens or [], own)
        facts.words = words_digest(tokens)
        facts.precision = precision_on(device, facts.parameters)
    else:  # nothing may be left to do
        facts = before.backbone
    working = working.with_precision(facts.precision)
    manifest = _new_manifest(merged, split, table, facts, device, command)
    manifest.data.warnings += look_alikes(tokens or [])
    if any(method_of(name).reads_users for name in merged.methods):
        manifest.data.warnings += check_lengths(backbone, config, longest)
    if before is not None:
        _check_same(folder, before, manifest)
    return Inputs(
        study=merged,
        working=working,
        before=before,
        manifest=manifest,
        tasks=tasks,
        split=split,
        config=config,
        table=table,
    )


def _check_sizes(study: Study, items: int, config: PreTrainedConfig) -> None:
    """Refuse sizes that don't fit the log or backbone, and weights that don't fit in memory."""
    width, blocks = int(config.hidden_size), int(config.num_hidden_layers)
    if study.embeds_titles and (study.title_blocks or 0) > blocks:
        allowed = f"at most {blocks} blocks, those of the backbone"
        raise BadInput("item_table", study.item_table, allowed)
    if study.backbone.tuning == "lora" and study.backbone.lora_rank > width:
        allowed = f"at most the width of the backbone, {width:,}"
        raise BadInput("backbone.lora_rank", study.backbone.lora_rank, allowed)
    for name in study.methods:
        chosen = settings_of(study, name)
        if chosen.method.settings == "distillation" and chosen.distillation.top > items:
            allowed = f"at most the {items:,} items of the log, or 0 for all"
            raise BadInput("distillation.top", chosen.distillation.top, allowed)
    sasrec, memory = study.sasrec, psutil.virtual_memory().total
    rows = items + study.data.max_history + 6 * sasrec.blocks * sasrec.width  # blocks: 6 matrices
    for field, value, weights in (
        ("sasrec.width", sasrec.width, rows * sasrec.width if SASREC in study.methods else 0),
        ("item_width", study.item_width, items * study.item_width * (study.item_table == LEARNED)),
    ):
        if 16 * weights > memory:  # gradients and AdamW's two moments beside the weights
            held = f"{16 * weights / 1e9:,.0f} GB, there are {memory / 1e9:,.0f}"
            raise BadInput(field, value, f"what fits the memory (it takes {held})")


def _longest_text(sequences: Sequences, max_history: int, tokens: list[list[int]]) -> int:
    """Positions of the longest history that is read, without its target."""
    if not tokens:  # an item is one position
        return max(1, min(max_history, int(np.diff(sequences.offsets).max()) - 1))
    sizes = np.array([0, *map(len, tokens)])
    texts = (sizes[sequences.history(user)] for user in range(sequences.n_users))
    # any items of a user in a row, since a split may end them anywhere
    window = np.ones(max_history, dtype=np.int64)
    return max(int(np.convolve(text, window).max()) for text in texts)


def _check_own(study: Study, own: OwnRecommender, longest: int) -> None:
    """Refuse a user's own recommender that can't be cut, or can't be trained as the study asks."""
    settings = study.backbone
    trained = [n for n in study.methods if method_of(n).trains and n != TEACHER]
    objectives = {settings_of(study, name).recipe.objective for name in trained}
    objective = min(objectives, default=None)  # every before last
    for each in check_own(own, settings.source, longest=longest, objective=objective):
        if not each.passed and (each.name != "training" or settings.tuning != "lora"):
            reason = f"{each.name}: {each.detail}"
            raise BadInput("backbone.source", settings.source, reason, fault=True)


def _checked(
    study: Study,
    settings: Backbone,
    tasks: Sequence[Task],
    tokens: Sequence[Sequence[int]],
    own: OwnRecommender | None,
) -> BackboneFacts:
    """Check that a backbone has its weights and can be cut; returns what a run records of it."""
    model = pretrained(settings, weights=False) if own is None else own.backbone
    facts = BackboneFacts(**describe(model, settings.source, backbone_revision(settings)))
    check_tokens("backbone.reads", settings.reads, chain.from_iterable(tokens), model)
    if settings.tuning == "lora":
        lora_maps(model, settings.lora_targets)  # refuses names of no map
    # refuses texts that it can't read, and a decoder without tokens
    facts.prompt = [*map(list, prompt_and_suffix(settings, model))]
    trained = [task.trials[-1] for task in tasks if method_of(task.method).trains]
    asked = [settings_of(study, trial.method) for trial in trained]
    for width, loops in {(each.width, each.loops) for each in asked if each.reshapes}:
        reshape(copy.deepcopy(model), Shape(width, loops))  # refuses what can't be narrower
    cut = [trial for trial in trained if trial.depth < trial.blocks]
    if cut:  # what probes cuts nothing
        keep_blocks(model, min(cut, key=lambda trial: trial.depth).kept)
    return facts


def continued(folder: Path, study: Study) -> Study:
    """The study with the methods and seeds that the run has; refuses what changes its numbers."""
    # another sweep that lays the run out may have files here for a moment, named with a dot
    entries = [*folder.iterdir()] if folder.is_dir() else []
    is_file = folder.exists() and not folder.is_dir()
    if not is_file and all(entry.name[0] == "." for entry in entries):
        return study
    if not (folder / STUDY).is_file():
        raise BadInput("output", str(folder), "a new or empty folder, or an earlier run")
    # the study is written first: a sweep killed at that moment has left nothing else
    before = load_study(folder / STUDY)
    # a search goes on from what any sweep has trained
    changed = differences(replace(before, layers=study.layers) if study.searches else before, study)
    if changed:
        allowed = f"another folder, or the study it began with ({'; '.join(changed)})"
        raise BadInput("output", str(folder), allowed)
    methods = tuple(sorted({*before.methods, *study.methods}, key=method_order))
    variants, seeds = {**before.variants, **study.variants}, max(before.seeds, study.seeds)
    return replace(study, name=before.name, methods=methods, variants=variants, seeds=seeds)


def manifest_before(folder: Path) -> Manifest | None:
    """The manifest of the run that is continued; None where a run begins."""
    return read_manifest(folder) if os.path.lexists(folder / MANIFEST) else None


def _check_same(folder: Path, before: Manifest, manifest: Manifest) -> None:
    """Refuse to mix records of other data or embeddings under the same names."""
    for name, was, now in (
        ("data", before.data.fingerprint, manifest.data.fingerprint),
        ("item table", before.item_table.sha256, manifest.item_table.sha256),
    ):
        if was != now:
            allowed = f"another folder (the {name} has changed since this run began)"
            raise BadInput("output", str(folder), allowed)


def _new_slices(study: Study, split: Split, before: Manifest | None) -> pd.DataFrame | None:
    """Read the user's columns for slices; None if the run already has them, or needs none."""
    had = {"user": [], "item": []} if before is None else before.slices
    return None if slice_columns(study.protocol) == had else own_slices(study.protocol, split)


def _read_log(study: Study, folder: Path) -> Sequences:
    """The log that the run was begun with, or the source, read but not yet written."""
    prepared = folder / SHARED / DATA
    if study.data.source == "embedded" and (prepared / DATA_MANIFEST).is_file():
        return load_data(shared_file(folder, manifest_before(folder), DATA))
    return read_data(study.data)


def _shared_table(
    study: Study, sequences: Sequences, folder: Path, device: torch.device, width: int | None
) -> Tensor | None:
    """The item table that all trials share; given a width, an empty one of that shape."""
    if study.item_table in {SASREC, LEARNED, OWN}:
        return None
    written, before = folder / SHARED / ITEM_TABLE, manifest_before(folder)
    if study.embeds_titles and before is not None and written.is_file():
        return torch.from_numpy(np.load(shared_file(folder, before, ITEM_TABLE)))
    ids, titles = sequences.item_ids.tolist(), sequences.titles
    if study.embeds_titles and width is not None:
        pretrained_tokenizer(study.backbone)  # refused where there is none
        return torch.empty(len(item_texts(ids, titles)) + 1, width, device="meta")
    return make_table(study.item_table, study.backbone, ids, titles, device=device)


def lay_out(folder: Path, given: Study, inputs: Inputs) -> bool:
    """Write what all trials share, under the run's lock; keep what the folder already has.

    Another sweep may have added methods since the inputs were read, so study and manifest are read
    again.

    Args:
        given: the study as asked for, without the methods that the run already has.

    Returns:
        Whether the slices of the run are new.
    """
    split, table, manifest = inputs.split, inputs.table, inputs.manifest
    shared, before = folder / SHARED, manifest_before(folder)
    study = continued(folder, given)
    slices = _new_slices(study, split, before)
    if before is not None:
        for name in ("created", "wall_seconds", "timing", "backbone", "studies", "files"):
            setattr(manifest, name, getattr(before, name))
        # the commands that repeat the run: all so far, and this one if it adds methods or seeds
        had, now = (
            {(name, seed) for name in each.methods for seed in range(each.seeds)}
            for each in (load_study(folder / STUDY), given)
        )
        if manifest.command is None or had >= now:
            manifest.command = before.command
        elif before.command is not None and not now >= had:
            manifest.command = f"{before.command}\n{manifest.command}"
    folder.mkdir(parents=True, exist_ok=True)
    tidy(folder)
    drawn = None
    if study.protocol.sampled and (before is None or not (shared / NEGATIVES).exists()):
        popular = study.protocol.negatives == "popularity"
        pool = split.sequences.items[split.trained] if popular else None
        # (E, 999); None where some user has too few items left
        drawn = negatives(split.sequences, split.test.users, seed=NEGATIVE_SEED, pool=pool)
    if drawn is not None or (shared / NEGATIVES).exists():
        manifest.sampled = Sampled(study.protocol.negatives, NEGATIVE_SEED)
    elif study.protocol.sampled:
        manifest.data.warnings.append(TOO_SMALL)
    if before is None:  # first of all, since it marks the folder as a run
        _write_study(folder, study)
    files = manifest.files
    if before is None or not (shared / DATA / DATA_MANIFEST).is_file():
        write_data(split.sequences, shared / DATA)
        # which in turn has those of the arrays
        files[f"{SHARED}/{DATA}/{DATA_MANIFEST}"] = digest_of(shared / DATA / DATA_MANIFEST)
    for name, array in ((ITEM_TABLE, None if table is None else table.numpy()), (NEGATIVES, drawn)):
        if array is not None and (before is None or not (shared / name).exists()):
            with complete_file(shared / name) as temporary:
                np.save(temporary, array)
            files[f"{SHARED}/{name}"] = digest_of(shared / name)
    if slices is not None:
        write_slices(slices, shared)
        files.pop(f"{SHARED}/{SLICES}", None)
        if (shared / SLICES).is_file():
            files[f"{SHARED}/{SLICES}"] = digest_of(shared / SLICES)
    manifest.study_hash = study.digest()
    if before is None or before.studies:  # or some records' study is written nowhere
        manifest.studies = sorted({*manifest.studies, manifest.study_hash})
    # the manifest first: at any moment it names the study that is on disk
    write_manifest(folder, manifest)
    _write_study(folder, study)
    return slices is not None


def _write_study(folder: Path, study: Study) -> None:
    with complete_file(folder / STUDY) as temporary:
        temporary.write_text(study_to_toml(study), encoding="utf-8")


def tidy(folder: Path) -> None:
    """Delete half-written files of processes that no longer exist."""
    for place in PLACES:
        remove_leftovers(folder / place)


def _new_manifest(
    study: Study,
    split: Split,
    table: Tensor | None,
    backbone: BackboneFacts,
    device: torch.device,
    command: str | None,
) -> Manifest:
    """The manifest of a run that begins."""
    sequences = split.sequences
    width = study.sasrec.width if study.item_table == SASREC else study.item_width
    return Manifest(
        study_hash=study.digest(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        data=Dataset(
            name=sequences.name,
            users=sequences.n_users,
            items=sequences.n_items,
            interactions=sequences.n_interactions,
            fingerprint=sequences.fingerprint,
            warnings=[*sequences.warnings, *split.warnings],
            statistics=sequences.statistics,
            cleaning=[asdict(step) for step in sequences.cleaning],
            split=split.statistics,
        ),
        item_table=ItemTable(
            source=study.item_table,
            width=width if table is None else table.shape[1],
            trained=study.trains_items,
            sha256=None if table is None or table.is_meta else table_hash(table),
        ),
        slices=slice_columns(study.protocol),
        machine=machine(device),
        versions={"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
        git=_git_state(),
        backbone=backbone,
    )


# --- where numbers come from: machine, versions, git ---------------------------------------------

FOR_JOBS = 0.6  # of the machine's memory; the sweep itself and other work need the rest
MOST_JOBS = 4  # by default on a CPU: each job holds its own copy of the model
PACKAGES = ("depthprobe", "torch", "transformers", "accelerate", "peft", "numpy", "pandas")


def machine(device: torch.device) -> Machine:
    """Processor, memory and accelerator of this machine."""
    return Machine(
        device=device.type,
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
        cpu=processor_name(),
        cores=available_cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=platform.system(),
    )


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs_at_once(jobs: int | None, device: torch.device, tasks: int, *, memory: float) -> int:
    """How many tasks run at the same time; 0 means in this process.

    By default each needs a core, and on a CPU ``memory`` bytes of the machine's total memory. Free
    memory would vary, and the number must not: it decides the threads of a training.
    """
    if jobs is None:
        cpu = device.type == "cpu"
        jobs = min(available_cores(), MOST_JOBS) if cpu else max(1, torch.cuda.device_count())
        if cpu and memory:
            jobs = max(1, min(jobs, int(FOR_JOBS * psutil.virtual_memory().total / memory)))
    return min(jobs, tasks)


def threads_of(workers: int, cores: int) -> int:
    """Threads for each of ``jobs`` processes: its share of the cores, or OMP_NUM_THREADS.

    Without workers, the threads of this process.
    """
    own = torch.get_num_threads()
    return own if workers == 0 else max(1, min(own, cores // workers))


def _git_state() -> Git | None:
    """Commit of the code's checkout and whether it has changes; None outside a checkout."""
    # installed into a virtual environment, the package may lie in somebody else's checkout
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return None
    return Git(_git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "-uno")))


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
