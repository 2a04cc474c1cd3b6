"""The model card of an exported trial: what it is, how good, where from, under which terms."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from depthprobe.errors import BadInput
from depthprobe.evaluation.slices import ALL
from depthprobe.files import complete_folder
from depthprobe.methods import Trial, base_of, names
from depthprobe.models.backbones import (
    EMBEDDED,
    is_folder,
    pinned,
    pretrained,
    pretrained_tokenizer,
)
from depthprobe.models.build import around, load_trained, merge_lora
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.export import write_recommender
from depthprobe.models.recommender import Recommender
from depthprobe.probing.replace import fold_map, load_replacement
from depthprobe.runs.context import MODEL, Context
from depthprobe.runs.plan import full_trial
from depthprobe.runs.records import Git, Record
from depthprobe.runs.store import Run, open_run
from depthprobe.runs.tables import METRICS
from depthprobe.study import Backbone, ranges, settings_of

LONGEST = 120
TAGS = ("depthprobe", "recommender-system", "sequential-recommendation", "layer-pruning")
PARTS = {
    "blocks": "blocks",
    "token_embeddings": "token embeddings",
    "adapters": "adapters",
    "item_table": "item table",
    "total": "all",
}


def model_card(run: Run, record: Record) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads.

    Whatever comes from data or models is shortened and quoted: a name can't break the page.
    """
    backbone, kept = run.manifest.backbone, record.kept
    source = _public_name(backbone.source)
    return "\n".join(
        [
            *_front_matter(run),
            f"# {_code(record.id)}",
            "",
            f"A sequential recommender of depth {record.depth}: blocks {ranges(kept)} of the"
            f" {backbone.blocks} of {_code(source)} (numbered from 0), method"
            f" {_code(record.method)}, seed {record.seed}. Made with depthprobe.",
            "",
            "## Use",
            "",
            "```python",
            "import depthprobe as dp",
            "",
            'dp.load_recommender("FOLDER").recommend([["item", "item"]], top=10)',
            "```",
            "",
            "`depthprobe recommend FOLDER --history FILE` answers a file of users. The backbone"
            ' alone is `AutoModelForCausalLM.from_pretrained("FOLDER")`; its language-model head is'
            " as it was before the training: it is not meant to write text.",
            "",
            "## Accuracy",
            "",
            *_accuracy(run, record),
            "",
            "## Size",
            "",
            *_size(record),
            "",
            "## Provenance",
            "",
            *_provenance(run, record, source),
            "",
            "## Licence",
            "",
            f"The weights derive from {_code(source)}: its own licence applies to this model, and"
            " the terms of the data that it was trained on may apply as well. depthprobe grants"
            " nothing beyond them.",
            "",
        ]
    )


def _front_matter(run: Run) -> list[str]:
    source = run.manifest.backbone.source
    on_hub = source != EMBEDDED and not is_folder(source)
    return [
        "---",
        "library_name: transformers",
        "license: other",
        "license_name: licence-of-the-backbone",
        # JSON's strings are YAML's
        *([f"base_model: {json.dumps(_plain(source), ensure_ascii=False)}"] if on_hub else []),
        "tags:",
        *(f"- {tag}" for tag in TAGS),
        "---",
        "",
    ]


def _accuracy(run: Run, record: Record) -> list[str]:
    found, data = run.metrics, run.manifest.data
    found = found[(found["trial"] == record.id) & (found["split"] == "test")]
    chosen = found[(found["slice"] == ALL) & found["metric"].isin(METRICS)]
    rows = [
        f"| {row.metric} | {row.protocol} | {row.value:.4f} | {_interval(row)} | {row.users} |"
        for row in chosen.itertuples()
    ]
    filtered = "left out" if run.study.protocol.filter_seen else "ranked too"
    protocols = [
        _protocol(name, run.study.protocol.negatives) for name in chosen["protocol"].unique()
    ]
    return [
        f"Test users of {_code(data.name)} ({data.users:,} users, {data.items:,} items,"
        f" {data.interactions:,} interactions), {run.study.protocol.split} split; a user's seen"
        f" items are {filtered}. {' '.join(protocols)}",
        "",
        "| metric | protocol | value | 95 % interval over users | users |",
        "|---|---|---:|---|---:|",
        *rows,
    ]


def _protocol(name: str, negatives: str) -> str:
    drawn = {"uniform": "drawn at random", "popularity": "drawn by popularity"}[negatives]
    others = f"{name.removeprefix('sampled-')} others {drawn}"
    ranked = "the whole catalogue" if name == "full" else f"the target among {others}"
    return f"Protocol `{name}` ranks {ranked}."


def _interval(row: Any) -> str:
    return "" if pd.isna(row.ci_low) else f"{row.ci_low:.4f} to {row.ci_high:.4f}"


def _size(record: Record) -> list[str]:
    counts = record.costs.parameters if record.costs else {}
    rows = [f"| {name} | {counts[key]:,} |" for key, name in PARTS.items() if key in counts]
    return ["| part | parameters |", "|---|---:|", *rows]


def _provenance(run: Run, record: Record, source: str) -> list[str]:
    origin, settings = record.provenance, run.study.backbone
    assert origin is not None  # noqa: S101 - every record that is done has one
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    git = origin.git or Git()
    dirty = " with changes" if git.dirty else ""
    facts = {
        "study": f"{_code(run.study.name)}, hash {_code(origin.study)}",
        "data": f"{_code(run.manifest.data.name)}, fingerprint {_code(origin.data)}",
        "backbone": f"{_code(source)}, revision {_code(origin.backbone)}",
        "settings": f"dtype {settings.dtype}, attention {settings.attention},"
        f" quantize {settings.quantize}, tuning {settings.tuning}",
        "trained on": _code(origin.device),
        "versions": _code(versions, 400),
        "code": f"{_code(git.commit)}{dirty}" if git.commit else "not from a checkout",
    }
    return [f"- {name}: {fact}" for name, fact in facts.items()]


def _public_name(source: str) -> str:
    """The source without the folders above it, which are nobody else's business."""
    if source != EMBEDDED and is_folder(source):
        return Path(source).name or source
    return source


def _plain(text: object, longest: int = LONGEST) -> str:
    """One line of printable characters, cut where it is long."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _code(text: object, longest: int = LONGEST) -> str:
    """Text as inline code: fenced by more backticks than it has in a row; no markup in it works."""
    line = _plain(text, longest) or " "
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    # Markdown takes away one blank on either side
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


# Take a trained recommender out of a run, as a Hugging Face checkpoint.

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
    if not record.done:
        raise BadInput("trial", trial, f"a trial that is done (it failed: {record.error})")
    if record.method in names("baseline"):
        allowed = f"a recommender with a backbone; {record.method} has none to export"
        raise BadInput("trial", trial, allowed)
    if record.method in MEASURED_ONLY or not record.kept:
        allowed = f"a model of whole blocks; {record.method} at this depth measures, and is none"
        raise BadInput("trial", trial, allowed)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput("folder", str(folder), "a new or empty folder")
    recorded = run.manifest.backbone
    study = replace(run.study, backbone=pinned(run.study.backbone, recorded.revision))
    context, blocks = Context(run.path, study), recorded.blocks
    what = Trial(trial, record.method, record.kept, record.seed, blocks)
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
        source = full_trial("full", trial.seed, trial.blocks)
    if base_of(trial.method) == "elastic":
        source = full_trial(trial.method, trial.seed, trial.blocks)
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
