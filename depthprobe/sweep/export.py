"""Take a trained recommender out of a run, as a Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from depthprobe.files import complete_folder
from depthprobe.models.backbones import pretrained, pretrained_tokenizer
from depthprobe.models.build import around, load_trained, merge_lora
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.exported import write_recommender
from depthprobe.models.recommender import Recommender
from depthprobe.models.revision import pinned
from depthprobe.probing.maps import load_replacement
from depthprobe.probing.replace import fold_map
from depthprobe.study import Backbone, BadInput, base_of, settings_of
from depthprobe.sweep.context import MODEL, Context
from depthprobe.sweep.model_card import model_card
from depthprobe.sweep.plan import BASELINES, Trial, whole_trial
from depthprobe.sweep.store import open_run

# trials without training: their weights are the teacher's
CUT_FROM_TEACHER = ("early-exit", "skip", "span", "interval", "greedy", "replace")
# what these read is no model of whole blocks behind the final norm and the teacher's own head
MEASURED_ONLY = (
    "early-exit-raw",
    "readout",
    "tuned-lens",
    "drop-attention",
    "drop-mlp",
)


def export_trial(run_path: str | Path, trial: str, folder: str | Path) -> Path:
    """Write a trial's model to ``folder``: the cut backbone, LoRA merged, and the recommender.

    An early exit is the teacher's first blocks, a skip the teacher without one, a span without
    several; a linear map in place of a span is folded into the block before it. Quantised weights
    become ordinary ones of the same values.

    Raises:
        BadInput: if the run has no such trial, the trial is of a baseline or failed or of a method
            that makes no model, its model is not in the run any more, or the folder is not empty.
    """
    disable_progress_bar()
    run = open_run(run_path)
    record = run.record(trial)
    target = Path(folder)
    if record["status"] != "done":
        raise BadInput("trial", trial, f"a trial that is done (it failed: {record['error']})")
    if record["method"] in BASELINES:
        allowed = f"a recommender with a backbone; {record['method']} has none to export"
        raise BadInput("trial", trial, allowed)
    if record["method"] in MEASURED_ONLY or not record["kept"]:
        allowed = f"a model of whole blocks; {record['method']} at this depth measures, and is none"
        raise BadInput("trial", trial, allowed)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput("folder", str(folder), "a new or empty folder")
    recorded = run.manifest["backbone"]
    study = replace(run.study, backbone=pinned(run.study.backbone, recorded["revision"]))
    context, blocks = Context(run.path, study), int(recorded["blocks"])
    what = Trial(record["method"], tuple(record["kept"]), int(record["seed"]), blocks)
    model, backbone = _rebuild(context, what)
    sequences = context.sequences
    with complete_folder(target) as temporary:
        write_recommender(
            temporary,
            model,
            backbone,
            item_ids=[str(raw) for raw in sequences.item_ids],
            titles=None if sequences.titles is None else [str(t) for t in sequences.titles],
            max_history=study.data.max_history,
            filter_seen=study.protocol.filter_seen,
            attention=study.backbone.attention,
        )
        _save_tokenizer(study.backbone, temporary)
        (temporary / "README.md").write_text(model_card(run, record), encoding="utf-8")
    return target


def _rebuild(context: Context, trial: Trial) -> tuple[Recommender, PreTrainedModel]:
    """The trial's recommender, and the causal language model whose blocks it uses."""
    settings, source = context.study.backbone, trial
    if trial.method in CUT_FROM_TEACHER:
        source = whole_trial("full", trial.seed, trial.blocks)
    if base_of(trial.method) == "elastic":
        source = whole_trial(trial.method, trial.seed, trial.blocks)
    weights, own = (context.trial_folder(each) / MODEL for each in (source, trial))
    for needed in {weights, own} if trial.method == "replace" else {weights}:
        if not needed.is_dir():
            allowed = f"a trial whose model is still in the run's folder ({needed} is not)"
            raise BadInput("trial", trial.id, allowed)
    # where nothing was pretrained, the head is fresh too: it is not the pretrained model's
    fresh = trial.seed if settings_of(context.study, trial.method).fresh else None
    backbone = pretrained(settings, random_init=fresh, plain=True)
    keep_blocks(backbone, source.kept)
    model = around(
        backbone,
        settings,
        context.item_table(trial.seed),
        seed=trial.seed,
        train_items=context.study.trains_items,
    )
    load_trained(model, weights)
    merge_lora(model)
    if trial.method == "replace":
        fold_map(model, load_replacement(own))
    keep_blocks(backbone, _places(source.kept, trial.kept))
    return model.eval(), backbone


def _places(kept: tuple[int, ...], chosen: tuple[int, ...]) -> list[int]:
    """Where the chosen blocks are among those that are kept."""
    return [kept.index(block) for block in chosen]


def _save_tokenizer(settings: Backbone, folder: Path) -> None:
    try:
        tokenizer: Any = pretrained_tokenizer(settings)
    except BadInput:
        if settings.prompt or settings.suffix:
            raise
        return  # nothing was read with it
    tokenizer.save_pretrained(folder)
