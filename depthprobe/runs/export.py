"""Export a trial: a Hugging Face checkpoint, the recommender's parts, a model card."""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, RepoUrl, get_token
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from depthprobe.cost.timing import Action, machine, measure, summarize, times_faster
from depthprobe.data.statistics import popularity
from depthprobe.errors import BadInput, one_line, shell_line
from depthprobe.files import complete_folder, write_json
from depthprobe.methods import Trial, base_of, method_of
from depthprobe.models.backbones import pretrained, pretrained_tokenizer
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
from depthprobe.runs.card import model_card, plain
from depthprobe.runs.context import Context
from depthprobe.runs.plan import SASREC, TEACHER, full_trial, holder_of
from depthprobe.runs.quantize import source_of
from depthprobe.runs.store import open_run
from depthprobe.study import settings_of


def export_trial(
    run_path: str | Path,
    trial: str,
    folder: str | Path,
    *,
    exit_margin: float | None = None,
    onnx: bool = False,
) -> Path:
    """Write a trial's model to ``folder``: the cut backbone, LoRA merged, and the recommender.

    With ``exit_margin`` early exit is calibrated on the validation users, to lose at most that
    share of the model's own accuracy. If no rule is shown to do so, the export has none.

    A variant in fewer bits, ``distill-d04-s0:int8``, is stored in these bits. A trial without
    weights of its own is cut out of the teacher, and a linear map that replaces a span is folded
    into the block before it. Weights that the training held in fewer bits become ordinary ones of
    the same values. SASRec has no backbone, so only the recommender is written. With ``onnx`` the
    whole recommender is also written as one ONNX file, and compared with ours on all test users.

    Raises:
        BadInput: if the run has no such trial, the trial failed, its method makes no model, its
            model is no longer in the run, or the folder is not empty; if no ONNX file can be made,
            or its answers differ.
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
        refused = f"a model of whole blocks ({record.method} at this depth only measures)"
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
        facts = add_onnx(temporary, context, own) if onnx else None
        card = model_card(run, record, example=example(loaded, context), onnx=facts)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return target


def _served(context: Context, method: str) -> Served:
    """What an export records of items, histories and the precision that it computes in."""
    sequences, precision = context.sequences, settings_of(context.study, method).recipe.precision
    return {
        "item_ids": [str(raw) for raw in sequences.item_ids],
        "titles": None if sequences.titles is None else [str(t) for t in sequences.titles],
        "max_history": context.study.data.max_history,
        "filter_seen": context.split.filter_seen,
        "precision": "bfloat16" if precision == "bfloat16" else "float32",
    }


def _write_backbone(context: Context, trial: Trial, folder: Path) -> None:
    """Write the backbone of a trial, and its tokenizer."""
    study, settings = context.study, context.backbone
    (model, whole), served = _rebuild(context, trial), _served(context, trial.method)
    if isinstance(model, OwnRecommender):
        write_own(folder, model, OwnShape(settings.source, list(trial.kept)), **served)
        return
    write_recommender(folder, model, whole, attention=settings.attention, **served)
    try:
        pretrained_tokenizer(settings).save_pretrained(folder)
    except BadInput:  # the backbone has no tokenizer, so the training used none
        if study.backbone.prompt or study.backbone.suffix or study.backbone.reads_titles:
            raise


# --- the same recommender in ONNX, beside ours ------------------------------------------------

ONNX_FACTS = "onnx.json"
SECONDS, WARMUP, ROUNDS = 20.0, 3, 50  # of the latencies
LIKED = 3  # items in the example's history, and in its answer


def add_onnx(folder: Path, context: Context, own: str | None) -> dict[str, Any]:
    """Write the ONNX file of an exported folder, and its measurements; returns these.

    ``BadInput`` if it can't be written, or its answers on the test users differ.
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
    batches = {1: [spread[len(spread) // 2]], len(spread): spread}
    facts = {
        "schema": 1,
        "precision": "float32",
        "test_users": agreement.users,
        "test_users_in_another_order": agreement.reordered,
        "largest_difference": agreement.largest_difference,
        "latencies": _latencies(loaded, session, batches),
        "machine": machine(torch.device("cpu")) | {"onnxruntime": version("onnxruntime")},
    }
    write_json(folder / ONNX_FACTS, facts)
    return facts


def _latencies(
    loaded: ExportedRecommender, session: Any, batches: dict[int, list[np.ndarray]]
) -> list[dict[str, Any]]:
    """Median seconds from rows of items to the best ten, ours and ONNX in turn, with equal threads.

    Both start from the prompt's cached keys and values, and read the same padded rows.
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
    """Python that recommends to a user who had the most popular items, and what it prints.

    No real user's history is used, since a model card may be published.
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
    said = [f"# {plain(f'{row}{one.score:.3f}')}" for row, one in zip(rows, found, strict=True)]
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
    # with random weights the head is random too, not the pretrained one
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
    """The same for a user's own recommender, whose teacher has no weights in the run."""
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
    """Refuse a name that the Hub does not allow, or a push without a token."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(HUB, name, f"a name such as me/small ({one_line(error)})") from None
    if get_token() is None:
        fault = "no token for the Hub; run hf auth login, or set HF_TOKEN"
        raise BadInput(HUB, name, fault, fault=True)


def push_to_hub(folder: Path, name: str) -> RepoUrl:
    """Upload an exported folder to a model repository; a new one is private.

    ``BadInput`` if the Hub can't be reached or refuses; the folder stays as it is.
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
