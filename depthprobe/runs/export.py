"""Take a trial out of a run: a Hugging Face checkpoint, the recommender beside it, a model card."""

from __future__ import annotations

import math
import re
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from depthprobe.errors import BadInput
from depthprobe.evaluation.metrics import METRICS
from depthprobe.evaluation.slices import ALL
from depthprobe.files import complete_folder
from depthprobe.formatting import plain_percent
from depthprobe.methods import Trial, method_of
from depthprobe.models.backbones import (
    EMBEDDED,
    is_folder,
    pretrained,
    pretrained_tokenizer,
)
from depthprobe.models.build import around, load_trained, merge_lora
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.export import write_recommender
from depthprobe.models.recommender import Recommender
from depthprobe.probing.replace import fold_map, load_replacement
from depthprobe.runs.context import Context
from depthprobe.runs.plan import TEACHER, full_trial, plan
from depthprobe.runs.records import FULL, Git, Record
from depthprobe.runs.store import Run, open_run
from depthprobe.study import ranges, settings_of


def export_trial(run_path: str | Path, trial: str, folder: str | Path) -> Path:
    """Write a trial's model to ``folder``: the cut backbone, LoRA merged, and the recommender.

    A trial without weights of its own is cut out of the teacher; a linear map in place of a span is
    folded into the block before it. Quantised weights become ordinary ones of the same values.

    Raises:
        BadInput: if the run has no such trial, the trial failed or its method makes no model, its
            model is not in the run any more, or the folder is not empty.
    """
    disable_progress_bar()
    run = open_run(run_path)
    record, target = run.record(trial), Path(folder)
    method = method_of(record.method)
    refused = ""
    if not record.done:
        refused = f"a trial that is done (it failed: {record.error})"
    elif method.role == "baseline":
        refused = f"a recommender with a backbone ({record.method} has none to export)"
    elif method.exportable is None or not record.kept:
        refused = f"a model of whole blocks ({record.method} at this depth measures, and is none)"
    if refused:
        raise BadInput("trial", trial, refused)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput("folder", str(folder), "a new or empty folder")
    study = run.study.with_precision(run.manifest.backbone.precision)
    precision = settings_of(study, record.method).recipe.precision
    context = Context(run.path, study)
    settings = context.backbone
    what = Trial(trial, record.method, record.kept, record.seed, run.manifest.backbone.blocks)
    model, whole = _rebuild(context, what)
    sequences = context.sequences
    with complete_folder(target) as temporary:
        write_recommender(
            temporary,
            model,
            whole,
            item_ids=[str(raw) for raw in sequences.item_ids],
            titles=None if sequences.titles is None else [str(t) for t in sequences.titles],
            max_history=study.data.max_history,
            filter_seen=context.split.filter_seen,
            attention=study.backbone.attention,
            precision="bfloat16" if precision == "bfloat16" else "float32",
        )
        try:
            pretrained_tokenizer(settings).save_pretrained(temporary)
        except BadInput:  # there is none: so nothing was read with it
            if study.backbone.prompt or study.backbone.suffix or study.backbone.reads_titles:
                raise
        (temporary / "README.md").write_text(model_card(run, record), encoding="utf-8")
    return target


def _rebuild(context: Context, trial: Trial) -> tuple[Recommender, PreTrainedModel]:
    """The trial's recommender, and the causal language model whose blocks it uses."""
    settings, method = context.backbone, method_of(trial.method)
    own = context.model_folder(trial)
    source = full_trial(TEACHER, trial.seed, trial.blocks)
    if method.exportable == "own":
        # trials of one training share the weights of its deepest one
        tasks = plan(context.study, trial.blocks)
        deepest = next(task.trials[-1] for task in tasks if trial.id in task.names)
        source = trial if deepest.id == trial.id else deepest
    weights = context.model_folder(source)
    for needed in {weights, own} if method.exportable == "folded" else {weights}:
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
        tokens=context.item_tokens,
    )
    load_trained(model, weights)
    merge_lora(model)
    if method.exportable == "folded":
        fold_map(model, load_replacement(own))
    keep_blocks(backbone, [source.kept.index(block) for block in trial.kept])
    return model.eval(), backbone


# --- the model card: what it is, how good, where from, under which terms -------------------------

LONGEST = 120
TAGS = ["depthprobe", "recommender-system", "sequential-recommendation", "layer-pruning"]
CARD = """---
{front}
---

# {trial}

A sequential recommender of depth {depth}: blocks {kept} of the {blocks} of {source} (numbered \
from 0), method {method}, seed {seed}. Made with depthprobe.

## Use

```python
import depthprobe as dp

dp.load_recommender("FOLDER").recommend([["item", "item"]], top=10)
```

`depthprobe recommend FOLDER --history FILE` recommends items to each user of a file. The \
backbone alone is `AutoModelForCausalLM.from_pretrained("FOLDER")`; its language-model head was \
not trained along: don't write text with it.

## Accuracy

{accuracy}

## Size

{size}

## Provenance

{provenance}

## Licence

The weights derive from {source}: its own licence applies to this model, and the terms of the data \
that it was trained on may apply as well. depthprobe grants nothing beyond them.
"""


def model_card(run: Run, record: Record) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads.

    Whatever comes from data or models is shortened and quoted: a name can't break the page.
    """
    backbone = run.manifest.backbone
    local = is_folder(backbone.source)
    # the folders above a folder are nobody else's business
    source = _code((Path(backbone.source).name if local else "") or backbone.source)
    on_hub = backbone.source != EMBEDDED and not local
    front = ModelCardData(
        library_name="transformers",
        license="other",
        license_name="licence-of-the-backbone",
        base_model=_plain(backbone.source) if on_hub else None,
        tags=TAGS,
    )
    return CARD.format(
        front=front.to_yaml(),
        trial=_code(record.id),
        depth=record.depth,
        kept=ranges(record.kept),
        blocks=backbone.blocks,
        source=source,
        method=_code(record.method),
        seed=record.seed,
        accuracy=_accuracy(run, record),
        size=_size(record),
        provenance=_provenance(run, record, source),
    )


def _accuracy(run: Run, record: Record) -> str:
    table, data, protocol = run.metrics, run.manifest.data, run.study.protocol
    table = table[(table["trial"] == record.id) & (table["split"] == "test")]
    chosen = table[(table["slice"] == ALL) & table["metric"].isin(METRICS)]
    drawn = {"uniform": "drawn at random", "popularity": "drawn by popularity"}[protocol.negatives]
    lines = [
        f"Test users of {_code(data.name)} ({data.users:,} users, {data.items:,} items,"
        f" {data.interactions:,} interactions), {protocol.split} split; a user's seen"
        f" items are {run.seen_items}."
    ]
    for name in chosen["protocol"].unique():
        others = f"the target among {name.removeprefix('sampled-')} others {drawn}"
        lines[0] += f" Protocol `{name}` ranks {'the whole catalogue' if name == FULL else others}."
    level = plain_percent(protocol.level)
    lines += ["", f"| metric | protocol | value | {level} interval over users | users |"]
    lines += ["|---|---|---:|---|---:|"]
    for _, row in chosen.iterrows():
        low, high = row["ci_low"], row["ci_high"]
        interval = f"{low:.4f} to {high:.4f}" if math.isfinite(high - low) else ""
        cells = row["metric"], row["protocol"], f"{row['value']:.4f}", interval, row["users"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _size(record: Record) -> str:
    counts = record.costs.parameters if record.costs else {}
    rows = [f"| {name.replace('_', ' ')} | {count:,} |" for name, count in counts.items()]
    return "\n".join(["| part | parameters |", "|---|---:|", *rows])


def _provenance(run: Run, record: Record, source: str) -> str:
    settings, origin = run.study.backbone, record.provenance
    facts = {
        "study": _code(run.study.name),
        "data": _code(run.manifest.data.name),
        "backbone": source,
        "settings": f"dtype {settings.dtype}, attention {settings.attention},"
        f" quantize {settings.quantize}, tuning {settings.tuning}",
    }
    if origin is not None:
        git = origin.git or Git()
        commit = f"{_code(git.commit)}{' with changes' if git.dirty else ''}"
        versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
        facts["study"] += f", hash {_code(origin.study)}"
        facts["data"] += f", fingerprint {_code(origin.data)}"
        facts["backbone"] += f", revision {_code(origin.backbone)}"
        facts["trained on"] = _code(origin.device)
        facts["versions"] = _code(versions, 400)
        facts["code"] = commit if git.commit else "not from a checkout"
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


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
