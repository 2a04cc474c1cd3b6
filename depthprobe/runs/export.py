"""Take a trial out of a run: a Hugging Face checkpoint, the recommender beside it, a model card."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCardData, RepoUrl, get_token
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from depthprobe.cost.timing import Action, machine, measure, summarize, times_faster
from depthprobe.data.statistics import popularity
from depthprobe.errors import BadInput, one_line, shell_line
from depthprobe.evaluation.metrics import METRICS, per_user_metric
from depthprobe.evaluation.slices import ALL
from depthprobe.evaluation.statistics import ratio_interval
from depthprobe.files import complete_folder
from depthprobe.formatting import percent, plain_percent
from depthprobe.methods import Trial, base_of, method_of
from depthprobe.models.backbones import (
    EMBEDDED,
    is_folder,
    pretrained,
    pretrained_tokenizer,
)
from depthprobe.models.build import Shape, around, load_trained, merge_lora, reshape
from depthprobe.models.cutting import keep_blocks, unshare_blocks
from depthprobe.models.export import (
    ExportedRecommender,
    OwnShape,
    Served,
    load_recommender,
    write_exit,
    write_own,
    write_recommender,
    write_sasrec,
)
from depthprobe.models.onnx import (
    BATCH,
    FILE,
    TOP,
    TopItems,
    check_installed,
    compare_answers,
    open_session,
    padded,
    write_onnx,
)
from depthprobe.models.own import OwnRecommender
from depthprobe.models.quantize import quantize
from depthprobe.models.recommender import Recommender
from depthprobe.probing.exits import calibrate
from depthprobe.probing.replace import fold_map, load_replacement
from depthprobe.runs.context import Context
from depthprobe.runs.plan import SASREC, TEACHER, full_trial, holder_of
from depthprobe.runs.quantize import source_of
from depthprobe.runs.records import FULL, Costs, Git, Record
from depthprobe.runs.store import Run, open_run
from depthprobe.study import ranges, settings_of


def export_trial(
    run_path: str | Path,
    trial: str,
    folder: str | Path,
    *,
    exit_margin: float | None = None,
    onnx: bool = False,
) -> Path:
    """Write a trial's model to ``folder``: the cut backbone, LoRA merged, and the recommender.

    With ``exit_margin`` early exit is calibrated on the validation users, to lose so much of the
    model's own accuracy at most; if that can't be shown of any rule, none is in the export.

    A variant in fewer bits, ``distill-d04-s0:int8``, is written in them, and is read in them.
    A trial without weights of its own is cut out of the teacher; a linear map in place of a span is
    folded into the block before it. Weights that the training held in fewer bits become ordinary
    ones of the same values. Of
    SASRec, which has no backbone, the recommender is all. With ``onnx`` the whole recommender is
    written as one ONNX file too, and compared with ours on all test users.

    Raises:
        BadInput: if the run has no such trial, the trial failed or its method makes no model, its
            model is not in the run any more, or the folder is not empty; if there can be no ONNX
            file, or its answers are others.
    """
    disable_progress_bar()
    if onnx:
        check_installed()
    run = open_run(run_path)
    record, target = run.record(trial), Path(folder)
    method = method_of(record.method)
    refused = ""
    if not record.done:
        refused = f"a trial that is done (it failed: {record.error})"
    elif method.role == "baseline" and record.method != SASREC:
        refused = f"a model that can be exported ({record.method} has none)"
    elif record.method != SASREC and (method.exportable is None or not record.kept):
        refused = f"a model of whole blocks ({record.method} at this depth measures, and is none)"
    if refused:
        raise BadInput("trial", trial, refused)
    short = record.method == SASREC or len(record.kept) < 3
    if exit_margin is not None and (short or run.study.backbone.own):
        raise BadInput("exit", trial, "a model of ours, of three blocks or more")
    if onnx and method.lever:
        raise BadInput("onnx", trial, "a trial whose weights are not quantised")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput("folder", str(folder), "a new or empty folder")
    context = Context(run.path, run.study.with_precision(run.manifest.backbone.precision))
    settings = context.backbone
    with complete_folder(target) as temporary:
        if record.method == SASREC:
            _check_model(context.model_folder(full_trial(SASREC, record.seed, 0)), trial)
            write_sasrec(temporary, context.sasrec(record.seed), **_served(context, SASREC))
        else:
            blocks = run.manifest.backbone.blocks
            what = Trial(trial, record.method, record.kept, record.seed, blocks, of=record.of)
            _write_backbone(context, what, temporary)
        code = settings.trust_remote_code
        own = settings.source if settings.own and record.method != SASREC else None
        loaded = load_recommender(temporary, trust_remote_code=code, recommender=own)
        if exit_margin is not None:
            rule = calibrate(
                loaded, context.validation, metric=run.study.protocol.metric, margin=exit_margin,
                level=run.study.protocol.level,
            )  # fmt: skip
            if rule is not None:
                write_exit(temporary, rule)
        told = add_onnx(temporary, context, own) if onnx else ""
        card = model_card(run, record, example=example(loaded, context), onnx=told)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return target


def _served(context: Context, method: str) -> Served:
    """What an export says of items and histories, and in which precision it computes."""
    sequences, precision = context.sequences, settings_of(context.study, method).recipe.precision
    return {
        "item_ids": [str(raw) for raw in sequences.item_ids],
        "titles": None if sequences.titles is None else [str(t) for t in sequences.titles],
        "max_history": context.study.data.max_history,
        "filter_seen": context.split.filter_seen,
        "precision": "bfloat16" if precision == "bfloat16" else "float32",
    }


def _write_backbone(context: Context, trial: Trial, folder: Path) -> None:
    """Write a trial that has a backbone, and its tokenizer."""
    study, settings = context.study, context.backbone
    (model, whole), served = _rebuild(context, trial), _served(context, trial.method)
    if isinstance(model, OwnRecommender):
        write_own(folder, model, OwnShape(settings.source, list(trial.kept)), **served)
        return
    write_recommender(folder, model, whole, attention=settings.attention, **served)
    try:
        pretrained_tokenizer(settings).save_pretrained(folder)
    except BadInput:  # there is none: so nothing was read with it
        if study.backbone.prompt or study.backbone.suffix or study.backbone.reads_titles:
            raise


# --- the same recommender in ONNX, beside ours ------------------------------------------------

ONNX_FACTS = "onnx.json"
SECONDS, WARMUP, ROUNDS = 20.0, 3, 50  # of the latencies


def add_onnx(folder: Path, context: Context, own: str | None) -> str:
    """Write the ONNX file of an exported folder and what was measured of it; a line for the card.

    Raises:
        BadInput: if the file can't be written, or its answers on the test users are others.
    """
    code = context.backbone.trust_remote_code
    loaded = load_recommender(folder, trust_remote_code=code, recommender=own, float32=True)
    write_onnx(loaded, folder / FILE)
    session, split = open_session(folder / FILE), context.split
    histories = [split.history("test", place) for place in range(len(split.test.users))]
    longest = max(histories, key=len)[: loaded.max_history + 1]
    compare_answers(session, loaded, [longest[:length] for length in range(1, len(longest) + 1)])
    agreement = compare_answers(session, loaded, histories)
    places = np.linspace(0, len(histories) - 1, min(BATCH, len(histories))).astype(int)
    spread = [sorted(histories, key=len)[place] for place in places]  # of all lengths
    latencies = _latencies(loaded, session, {1: [spread[len(spread) // 2]], len(spread): spread})
    conditions = machine(torch.device("cpu")) | {"onnxruntime": version("onnxruntime")}
    facts = {
        "schema": 1,
        "precision": "float32",
        "test_users": agreement.users,
        "test_users_in_another_order": agreement.reordered,
        "largest_difference": agreement.largest_difference,
        "latencies": latencies,
        "machine": conditions,
    }
    (folder / ONNX_FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    times = "; ".join(
        f"{one['users']} at once: {1000 * one['onnxruntime']:.3g} ms in onnxruntime,"
        f" {1000 * one['torch']:.3g} ms in PyTorch"
        for one in latencies
    )
    return (
        f"\n\n`{FILE}` is the whole recommender in ONNX, in float32: rows of items in, the best"
        f" rows and their scores out. Its ten best items are those of this model for all"
        f" {agreement.users:,} test users; scores differ by rounding. Users {times} (medians,"
        f" {_plain(conditions['device_name'])}, threads: {conditions['threads']})."
    )


def _latencies(
    loaded: ExportedRecommender, session: Any, batches: dict[int, list[np.ndarray]]
) -> list[dict[str, Any]]:
    """Median seconds from rows of items to the best ten, in turns, with equal threads.

    Both have the prompt's keys and values from before, and read the same padded rows.
    """
    graph = TopItems(loaded).eval()
    calls: dict[str, Action] = {}
    for users, histories in batches.items():
        rows = padded(histories)
        given = {"histories": rows, "top": np.array([min(TOP, len(loaded.item_ids))])}
        ours = partial(torch.inference_mode()(graph), torch.from_numpy(rows))
        calls[f"torch:{users}"] = Action(ours)
        calls[f"onnxruntime:{users}"] = Action(partial(session.run, None, given))
    cpu = torch.device("cpu")
    timing = measure(
        lambda _: calls, batch=1, seconds=SECONDS, warmup=WARMUP, rounds=ROUNDS, device=cpu
    )
    found = []
    for users in batches:
        pair = {name: timing.seconds[f"{name}:{users}"] for name in ("torch", "onnxruntime")}
        medians = {name: summarize(seconds).p50 for name, seconds in pair.items()}
        faster = times_faster(pair["torch"], pair["onnxruntime"])
        found.append(
            {"users": users, **medians, "times_faster": faster.p50, "rounds": timing.rounds}
        )
    return found


def example(loaded: ExportedRecommender, context: Context) -> str:
    """Python that recommends to somebody who had the most popular items, and what it prints.

    No user's own history is taken: a model card may be published.
    """
    counts = popularity(context.sequences)
    popular = (np.argsort(-counts, kind="stable")[:LIKED] + 1).tolist()
    had = [loaded.item_ids[item - 1] for item in popular]
    top = min(LIKED, len(loaded.item_ids) - LIKED * loaded.filter_seen)
    if top < 1:
        return ""
    (found,) = loaded.recommend([had], top=top)
    titled = loaded.titles is not None
    own = isinstance(loaded.model, OwnRecommender)
    by = f", recommender={json.dumps(context.backbone.source)}" if own else ""
    code = f"""\
model = dp.load_recommender("FOLDER"{by})
for item, title, score in model.recommend([{json.dumps(had)}], top={top})[0]:
    print({"item, title, " if titled else "item, "}f"{{score:.3f}}")"""
    rows = [f"{item} {title} " if titled else f"{item} " for item, title, _ in found]
    said = [f"# {_plain(f'{row}{one.score:.3f}')}" for row, one in zip(rows, found, strict=True)]
    return "\n".join([code, *said])


def _rebuild(context: Context, trial: Trial) -> tuple[Recommender, PreTrainedModel]:
    """The trial's recommender, and the causal language model whose blocks it uses."""
    settings, method = context.backbone, method_of(trial.method)
    if trial.of:
        model, whole = _rebuild(context, source_of(context, trial)[1])
        half = settings_of(context.study, trial.method).recipe.precision == "bfloat16"
        quantize(model, base_of(trial.method), bfloat16=half)
        return model, whole
    own = context.model_folder(trial)
    source = full_trial(TEACHER, trial.seed, trial.blocks)
    if method.exportable == "own":
        source = holder_of(context.study, trial)
    weights = context.model_folder(source)
    if settings.own:
        return _rebuild_own(context, trial, source)
    for needed in {weights, own} if method.exportable == "folded" else {weights}:
        _check_model(needed, trial.id)
    # where nothing was pretrained, the head is fresh too: it is not the pretrained model's
    shape = settings_of(context.study, trial.method)
    fresh = trial.seed if shape.fresh else None
    backbone = pretrained(settings, random_init=fresh, plain=True)
    keep_blocks(backbone, source.kept)
    reshape(backbone, Shape(shape.width, shape.loops))
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
    if trial.kept != source.kept:
        keep_blocks(backbone, [source.kept.index(block) for block in trial.kept])
    unshare_blocks(backbone)
    return model.eval(), backbone


def _rebuild_own(
    context: Context, trial: Trial, source: Trial
) -> tuple[Recommender, PreTrainedModel]:
    """The same of a recommender of the user's own; its teacher has no weights in the run."""
    if source.method != TEACHER:
        _check_model(context.model_folder(source), trial.id)
    model = context.trained(source)
    merge_lora(model)
    if method_of(trial.method).exportable == "folded":
        _check_model(context.model_folder(trial), trial.id)
        fold_map(model, load_replacement(context.model_folder(trial)))
    keep_blocks(model.backbone, [source.kept.index(block) for block in trial.kept])
    return model, model.backbone


def _check_model(folder: Path, trial: str) -> None:
    if not folder.is_dir():
        allowed = f"a trial whose model is still in the run's folder ({folder} is not)"
        raise BadInput("trial", trial, allowed)


# --- the Hugging Face Hub ---------------------------------------------------------------------

HUB = "--push-to-hub"


def check_hub(name: str) -> None:
    """Refuse a name that the Hub can't have, and where there is no token to push with."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(HUB, name, f"a name such as me/small ({one_line(error)})") from None
    if get_token() is None:
        fault = "no token for the Hub; run hf auth login, or set HF_TOKEN"
        raise BadInput(HUB, name, fault, fault=True)


def push_to_hub(folder: Path, name: str) -> RepoUrl:
    """Upload an exported folder to a model repository; one that is new is private.

    Raises:
        BadInput: if the Hub can't be reached or refuses; the folder stays as it is.
    """
    hub = HfApi()
    try:
        url = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Export of depthprobe"
        )
    except (HTTPError, OSError) as error:
        again = shell_line(["hf", "upload", name, str(folder)])
        fault = f"not pushed ({one_line(error)}); {folder} is complete: {again}"
        raise BadInput(HUB, name, fault, fault=True) from None
    return url


# --- the model card: what it is, how good, where from, under which terms -------------------------

LONGEST = 120
LIKED = 3  # items of the history of the example, and of its answer
TAGS = ["depthprobe", "recommender-system", "sequential-recommendation", "layer-pruning"]
CARD = """---
{front}
---

# {trial}

{what} Made with depthprobe.

## Use

```python
import depthprobe as dp

{example}
```

`depthprobe recommend FOLDER --history FILE` recommends items to each user of a file.{more}

## Accuracy

{accuracy}

## Size

{size}

## Provenance

{provenance}

## Licence

{licence}
"""
BACKBONE = (
    ' The backbone alone is `AutoModelForCausalLM.from_pretrained("FOLDER")`; its language-model'
    " head was not trained along: don't write text with it."
)
FEWER_BITS = (
    " Its weights are in fewer bits (method {method}), and reading them needs torchao:"
    " `pip install 'depthprobe[quantize]'`."
)
OWN_ITSELF = " Add `--recommender` with the function that builds it, which must be importable."
WITHOUT_EXAMPLE = 'dp.load_recommender("FOLDER").recommend([["item", "item"]], top=10)'
LICENCE = "depthprobe grants nothing beyond them."


def model_card(run: Run, record: Record, *, example: str = "", onnx: str = "") -> str:
    """Markdown with the front matter that the Hugging Face Hub reads.

    Whatever comes from data or models is shortened and quoted: a name can't break the page.
    """
    backbone = run.manifest.backbone
    theirs = run.study.backbone.own  # the user's, and no backbone of ours
    local = not theirs and is_folder(backbone.source)
    # the folders above a folder are nobody else's business
    source = _code((Path(backbone.source).name if local else "") or backbone.source)
    own = record.method != SASREC
    on_hub = own and backbone.source != EMBEDDED and not local and not theirs
    front = ModelCardData(
        library_name="transformers" if own else "depthprobe",
        license="other",
        license_name="licence-of-the-backbone" if own else "terms-of-the-data",
        base_model=_plain(backbone.source) if on_hub else None,
        tags=TAGS if own else TAGS[:-1],
    )
    method = f"method {_code(record.method)}, seed {record.seed}."
    what = f"SASRec, a sequential recommender without a language model: {method}"
    bits = FEWER_BITS.format(method=_code(base_of(record.method))) if record.of else ""
    licence = "The terms of the data that it was trained on may apply to this model."
    if own:
        blocks = f"blocks {ranges(record.kept)} of the {backbone.blocks} of {source}"
        what = f"A sequential recommender of depth {record.depth}: {blocks}"
        what += f" (numbered from 0), {method}{_shape(run, record)}"
        licence = f"The weights derive from {source}: its own licence applies to this model, and"
        licence += " the terms of the data that it was trained on may apply as well."
    return CARD.format(
        front=front.to_yaml(),
        trial=_code(record.id),
        what=what,
        example=example or WITHOUT_EXAMPLE,
        more=f"{(OWN_ITSELF if theirs else BACKBONE) if own else ''}{bits}{onnx}",
        accuracy=f"{retained(run, record)}{_accuracy(run, record)}",
        size=_size(record),
        provenance=_provenance(run, record, source if own else ""),
        licence=f"{licence} {LICENCE}",
    )


def _shape(run: Run, record: Record) -> str:
    """What its blocks are that the backbone's are not."""
    own, told = settings_of(run.study, record.method), ""
    if own.width < 1:
        told += f" Its blocks have about {plain_percent(own.width)} of the backbone's MLP channels"
        told += " and attention heads."
    if own.loops > 1:
        told += f" The blocks are applied {own.loops} times in turn, with the same weights: the"
        told += f" checkpoint holds them as {own.loops * record.depth} blocks with equal weights."
    return told


def retained(run: Run, record: Record) -> str:
    """What the trial keeps of its teacher's accuracy, in a paragraph; empty without a teacher."""
    protocol = run.study.protocol
    teacher = full_trial(TEACHER, record.seed, run.manifest.backbone.blocks).id
    ranks = run.users[run.users["protocol"] == FULL].pivot(
        index="user", columns="trial", values="rank"
    )
    if record.id == teacher or not {teacher, record.id} <= {*ranks.columns}:
        return ""
    both = ranks[[record.id, teacher]].dropna()
    own, full = (per_user_metric(both[trial].to_numpy(), protocol.metric) for trial in both.columns)
    if not full.any():
        return ""
    share, level = ratio_interval(own, full, level=protocol.level), plain_percent(protocol.level)
    ends = ""
    if math.isfinite(share.high - share.low):
        ends = f" ({level} interval over users: {percent(share.low)} to {percent(share.high)})"
    return (
        f"It keeps {percent(share.value)}{ends} of the {protocol.metric} of the teacher of its seed"
        f" ({_code(teacher)}, all blocks), over {len(both):,} test users. That is one training; the"
        " report of the run compares all seeds.\n\n"
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
    costs = record.costs or Costs()
    rows = []
    for name, count in costs.parameters.items():
        held = f"{costs.bytes[name]:,}" if name in costs.bytes else ""
        rows.append(f"| {name.replace('_', ' ')} | {count:,} | {held} |")
    return "\n".join(["| part | parameters | bytes as served |", "|---|---:|---:|", *rows])


def _provenance(run: Run, record: Record, source: str) -> str:
    settings, origin = run.study.backbone, record.provenance
    facts = {
        "study": _code(run.study.name),
        "data": _code(run.manifest.data.name),
    }
    if source:
        facts["backbone"] = source
        facts["settings"] = (
            f"dtype {settings.dtype}, attention {settings.attention},"
            f" quantize {settings.quantize}, tuning {settings.tuning}"
        )
    if origin is not None:
        git = origin.git or Git()
        commit = f"{_code(git.commit)}{' with changes' if git.dirty else ''}"
        versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
        facts["study"] += f", hash {_code(origin.study)}"
        facts["data"] += f", fingerprint {_code(origin.data)}"
        if source:
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
