"""What a method receives and returns: the context of a run in one process, a trial's result."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from depthprobe.cost.flops import Products
from depthprobe.data.splits import Part, Split, make_split
from depthprobe.data.storage import Sequences, load_data
from depthprobe.errors import BadInput
from depthprobe.evaluation.metrics import TrainingPopularity, training_popularity
from depthprobe.evaluation.ranks import Encoder, EvalSet, evaluate, make_eval_set, mean_ndcg
from depthprobe.files import digest_of
from depthprobe.methods import Task, Trial
from depthprobe.models.backbones import HASH, backbone_revision, is_same, pinned
from depthprobe.models.build import (
    WEIGHTS,
    Shape,
    build_recommender,
    build_sasrec,
    learned_table,
    load_trained,
    prompt_and_suffix,
)
from depthprobe.models.narrowing import UnitScores
from depthprobe.models.precision import compute_in_bfloat16, resolve_device
from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.models.words import Words, item_tokens
from depthprobe.probing.replace import Replacement
from depthprobe.runs.plan import SASREC, TEACHER, full_trial
from depthprobe.runs.records import (
    AGAIN,
    CHECKPOINTS,
    DATA,
    FULL,
    ITEM_TABLE,
    MANIFEST,
    MODEL,
    NEGATIVES,
    SHARED,
    TRIALS,
    BackboneFacts,
    Manifest,
    intact,
    outputs_of,
    read_manifest,
    read_record,
    shared_file,
)
from depthprobe.study import OWN, Backbone, Study, settings_of
from depthprobe.training.checkpoint import Fit
from depthprobe.training.tracking import Track, tracked

Blocks = tuple[tuple[int, ...], float, int]  # which are kept, how wide, how many times

LEARNED = "learned"  # an item table that starts random
TRACKING = "tracking"


@dataclass(frozen=True)
class Result:
    """A trial that ran: test ranks by protocol, and the model and its training if it has one.

    Attributes:
        ranks: of every test user, (E,) by protocol; and under ``"top-10"`` the best items, (E, 10).
        validation: NDCG@10 on validation users, for a probe that computes it.
        bytes: of the weights as served, by part; None where they follow from the parameters.
        training_flops: of its training, without its teacher's.
        teacher_seconds: that its teacher took: training and features.
        replacement: the linear map that replaces blocks of the teacher; all else is the teacher's.
    """

    trial: Trial
    ranks: dict[str, np.ndarray]
    parameters: dict[str, int]
    bytes: dict[str, int] | None = None
    flops: int | None = None
    fit: Fit | None = None
    validation: float | None = None
    training_flops: int | None = None
    teacher_seconds: float = 0.0
    model: nn.Module | None = None
    replacement: Replacement | None = None


@dataclass(frozen=True)
class Scores:
    """A probe's table of blocks, spans or users, for probes that make no trials."""

    frame: pd.DataFrame


class Context:
    """A run's folder and study; everything else is read when first needed."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder, self.study = folder, study
        self.device = resolve_device(study.device)
        # FLOPs by kept blocks and items: equal blocks have equal shapes
        self.products: defaultdict[Blocks, dict[int, Products]] = defaultdict(dict)

    @property
    def shared(self) -> Path:
        """The folder of what all trials use."""
        return self.folder / SHARED

    @property
    def cache(self) -> Path | None:
        """The folder of the cache that runs share, if the study names one."""
        return None if self.study.cache is None else Path(self.study.cache).expanduser()

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest that was written when the run began; None before that."""
        return read_manifest(self.folder) if (self.folder / MANIFEST).is_file() else None

    def trial_folder(self, trial: Trial) -> Path:
        """The folder of a trial, complete or absent."""
        return self.folder / TRIALS / trial.id

    def model_folder(self, trial: Trial) -> Path:
        """The folder of a trial's weights; ``BadInput`` if they are not as they were written."""
        folder = self.trial_folder(trial)
        record = read_record(folder) if (folder / MODEL).is_dir() else None
        for name, digest in record.files.items() if record else ():
            if name.startswith(f"{MODEL}/"):
                intact(folder / name, digest, AGAIN)
        return folder / MODEL

    def outputs(self, task: Task) -> list[Path]:
        """The folders that a task leaves, each complete or absent."""
        return outputs_of(self.folder, task)

    def checkpoint(self, trial: Trial, rate: float | None = None, stage: int | None = None) -> Path:
        """The checkpoint from which a killed training continues; deleted once the trial is done.

        Each learning rate and each stage has its own.
        """
        name = trial.id if stage is None else f"{trial.id}.stage-{stage}"
        name = name if rate is None else f"{name}.{rate:g}"
        return self.folder / CHECKPOINTS / f"{name}.safetensors"

    def tracked(self, trial: Trial) -> AbstractContextManager[Track]:
        """Where the trial's training sends its metrics."""
        return tracked(
            self.study.tracking.to,
            folder=self.folder / TRACKING,
            project=self.study.name,
            run=trial.id,
            settings={"method": trial.method, "depth": trial.depth, "seed": trial.seed},
        )

    # --- data ---

    @cached_property
    def sequences(self) -> Sequences:
        """The prepared log."""
        return load_data(shared_file(self.folder, self.manifest, DATA))

    @cached_property
    def split(self) -> Split:
        """What trains, validates and tests."""
        return make_split(self.sequences, self.study.protocol)

    @cached_property
    def windows(self) -> list[np.ndarray]:
        """Training windows: the latest training items of each user with at least two of them."""
        longest = self.study.data.max_history + 1  # one more than a history: the last is a target
        histories = (self.split.train_history(u, longest) for u in range(self.sequences.n_users))
        return [window for window in histories if len(window) > 1]

    @cached_property
    def training(self) -> EvalSet:
        """The last item of each training window, given those before it."""
        return EvalSet(
            users=np.arange(len(self.windows)),
            histories=[window[:-1] for window in self.windows],
            targets=np.array([window[-1] for window in self.windows], dtype=np.int32),
            seen=None,
            negatives=None,
        )

    @cached_property
    def validation(self) -> EvalSet:
        """The validation users, at most ``validation_users`` of them."""
        return self.eval_set("validation", limit=self.study.protocol.validation_users)

    @cached_property
    def test(self) -> EvalSet:
        """The test users, by both protocols where the catalogue allows the sampled one.

        Each user's best items are listed too.
        """
        negatives = None
        if (self.shared / NEGATIVES).exists():
            path = shared_file(self.folder, self.manifest, NEGATIVES)
            negatives = np.load(path, mmap_mode="r")
        return replace(self.eval_set("test", negatives), lists=True)

    @cached_property
    def popularity(self) -> TrainingPopularity:
        """How often each item occurs in training, to compare recommendations with."""
        return training_popularity(self.split)

    def eval_set(
        self, part: Part, negatives: np.ndarray | None = None, limit: int | None = None
    ) -> EvalSet:
        """The users of a part of the split with their target positions, at most ``limit``."""
        return make_eval_set(
            self.split,
            part,
            max_history=self.study.data.max_history,
            filter_seen=self.split.filter_seen,
            negatives=negatives,
            limit=limit,
        )

    def validate(self, model: Encoder) -> float:
        """Validation NDCG@10 by full ranking."""
        return mean_ndcg(evaluate(model, self.validation, device=self.device)[FULL])

    # --- models ---

    def new_sasrec(self, seed: int, table: Tensor | None = None) -> SASRec:
        """SASRec before its training; on a frozen item table, (I + 1, D), if one is given."""
        torch.manual_seed(seed)
        longest = self.study.data.max_history
        items = self.sequences.n_items
        model = build_sasrec(self.study.sasrec, items=items, longest=longest, table=table)
        return model.to(self.device)

    def sasrec(self, seed: int) -> SASRec:
        """The trained baseline, in eval mode."""
        model = self.new_sasrec(seed)
        load_trained(model, self.model_folder(full_trial(SASREC, seed, 0)))
        return model.eval()

    @property
    def item_width(self) -> int:
        """Width of the item table, d_item."""
        width = self.study.sasrec.width
        own = {SASREC: width, OWN: width, LEARNED: self.study.item_width}
        return own.get(self.study.item_table) or self._shared_table.shape[1]

    @lru_cache(maxsize=2)  # noqa: B019 - a context lives as long as its process
    def item_table(self, seed: int) -> Tensor:
        """The item embeddings before a recommender's training, (I + 1, d_item), on the CPU."""
        if self.study.item_table == SASREC:
            return self.sasrec(seed).item_matrix().detach().cpu().clone()
        if self.study.item_table == OWN:
            return torch.empty(0)  # the recommender has it
        if self.study.item_table == LEARNED:
            return learned_table(self.sequences.n_items, self.study.item_width, seed=seed)
        return self._shared_table

    @cached_property
    def _shared_table(self) -> Tensor:
        """The table that does not depend on the seed."""
        return torch.from_numpy(np.load(shared_file(self.folder, self.manifest, ITEM_TABLE)))

    @property
    def backbone(self) -> Backbone:
        """The settings of the backbone, whose files are those that the run began with."""
        own = self.study.backbone
        return own if self.manifest is None else same_backbone(own, self.manifest.backbone)

    def new_recommender(self, trial: Trial, scores: UnitScores | None = None) -> Recommender:
        """A recommender with the trial's blocks before its training.

        A narrower one keeps the channels and heads with the highest scores.
        """
        settings = settings_of(self.study, trial.method)
        model = build_recommender(
            self.backbone,
            self.item_table(trial.seed),
            item_ids=self.sequences.item_ids.tolist(),
            kept=trial.kept,
            shape=Shape(settings.width, settings.loops, scores),
            seed=trial.seed,
            random_init=settings.fresh,
            train_items=self.study.trains_items,
            tokens=self.item_tokens,
        )
        if settings.recipe.precision == "bfloat16":
            compute_in_bfloat16(model.backbone)
        return model.to(self.device)

    @cached_property
    def item_tokens(self) -> list[list[int]] | None:
        """The tokens of items 1..I, where histories are read in words; None elsewhere."""
        ids, titles = self.sequences.item_ids.tolist(), self.sequences.titles
        tokens = item_tokens(self.backbone, ids, titles)
        known = None if self.manifest is None else self.manifest.backbone.words
        if known not in {None, words_digest(tokens)}:
            raise _changed(self.study.backbone, "what its tokenizer makes of the titles")
        return tokens

    def text_lengths(self, histories: Iterable[np.ndarray]) -> list[int]:
        """How many positions a recommender reads of each of these histories of item ids."""
        if self.item_tokens is None:
            return [len(history) for history in histories]
        return Words(self.item_tokens).lengths(histories)

    def known_products(self, trial: Trial) -> dict[int, Products]:
        """FLOPs that were counted before for models with the trial's blocks, by number of items."""
        settings = settings_of(self.study, trial.method)
        return self.products[trial.kept, settings.width, settings.loops]

    def trained(self, trial: Trial) -> Recommender:
        """A trained recommender from disk, in eval mode."""
        model = self.new_recommender(trial)
        if not (self.study.backbone.own and trial.method == TEACHER):  # as loaded
            load_trained(model, self.model_folder(trial))
        return model.eval()

    @lru_cache(maxsize=1)  # noqa: B019
    def teacher(self, seed: int, blocks: int) -> Recommender:
        """The trained teacher; the latest one stays in memory, since many tasks read it."""
        return self.trained(full_trial(TEACHER, seed, blocks))

    def teacher_digest(self, seed: int, blocks: int) -> str:
        """Twelve digits of a hash of the teacher's weights: what is made from them goes by it."""
        if self.study.backbone.own:
            return backbone_revision(self.backbone).removeprefix(HASH)[:12]
        return digest_of(self.model_folder(full_trial(TEACHER, seed, blocks)) / WEIGHTS)[:12]


def same_backbone(settings: Backbone, facts: BackboneFacts) -> Backbone:
    """The settings of a run's backbone; ``BadInput`` if its files or prompt tokens have changed."""
    settings, changed = pinned(settings, facts.revision, facts.source), ""
    if not is_same(facts.revision, now := backbone_revision(settings)):
        changed = "weights, configuration or tokenizer"
    elif facts.prompt is not None and _tokens(settings, now) != facts.prompt:
        changed = "what its tokenizer makes of the prompt"
    if changed:
        raise _changed(settings, changed)
    return settings


def words_digest(tokens: list[list[int]] | None) -> str | None:
    """A hash of the tokens of all items."""
    return None if tokens is None else hashlib.sha256(repr(tokens).encode()).hexdigest()[:32]


def _changed(settings: Backbone, what: str) -> BadInput:
    allowed = f"the backbone has changed since this run began ({what}): begin another run"
    return BadInput("backbone", settings.source, allowed, fault=True)


@lru_cache(maxsize=8)
def _tokens(settings: Backbone, revision: str) -> list[list[int]]:
    return [*map(list, prompt_and_suffix(settings))]
