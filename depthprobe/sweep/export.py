"""Take a trained recommender out of a run, as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from depthprobe.files import complete_folder
from depthprobe.models.backbones import load_backbone, load_tokenizer
from depthprobe.models.blocks import keep_blocks
from depthprobe.models.build import merge_lora
from depthprobe.models.exported import write_recommender
from depthprobe.study import BadInput
from depthprobe.sweep.context import MODEL, Context
from depthprobe.sweep.plan import Trial
from depthprobe.sweep.store import Run, open_run

WITHOUT_MODEL = ("popularity", "sasrec", "early-exit", "skip")


def export_trial(run_path: str | Path, trial: str, folder: str | Path) -> Path:
    """Write a trial's model to ``folder``: the cut backbone, LoRA merged, and the recommender.

    Raises:
        BadInput: if the run has no such trial, the trial has no model of its own or failed, or
            the folder is not empty.
    """
    disable_progress_bar()
    run = open_run(run_path)
    record = run.record(trial)
    target = Path(folder)
    if record["status"] != "done":
        raise BadInput("trial", trial, f"a trial that is done (it failed: {record['error']})")
    if record["method"] in WITHOUT_MODEL:
        allowed = f"a trained recommender; {record['method']} leaves none to export"
        raise BadInput("trial", trial, allowed)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput("folder", str(folder), "a new or empty folder")
    blocks = int(run.manifest["backbone"]["blocks"])
    what = Trial(record["method"], tuple(record["kept"]), int(record["seed"]), blocks)
    context = Context(run.path, run.study)
    if not (context.trial_folder(what) / MODEL).is_dir():
        raise BadInput("trial", trial, "a trial whose model is still in the run's folder")
    model = context.trained(what)
    merge_lora(model)
    settings = run.study.backbone
    whole = load_backbone(
        settings.source,
        revision=settings.revision,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    keep_blocks(whole, what.kept)
    whole.base_model.load_state_dict(model.backbone.state_dict())
    sequences = context.sequences
    with complete_folder(target) as temporary:
        write_recommender(
            temporary,
            model.cpu(),
            whole,
            item_ids=[str(raw) for raw in sequences.item_ids],
            titles=None if sequences.titles is None else [str(t) for t in sequences.titles],
            max_history=run.study.data.max_history,
            filter_seen=run.study.protocol.filter_seen,
        )
        load_tokenizer(settings.source, revision=settings.revision).save_pretrained(temporary)
        (temporary / "README.md").write_text(_card(run, record), encoding="utf-8")
    return target


def _card(run: Run, record: dict[str, object]) -> str:
    """The model card: what it is, how good, where from."""
    found = run.metrics
    chosen = found[(found["trial"] == record["id"]) & (found["split"] == "test")]
    lines = [
        f"- {row.metric} ({row.protocol}): {row.value:.4f} [{row.ci_low:.4f}, {row.ci_high:.4f}]"
        for row in chosen.itertuples()
    ]
    data, backbone = run.manifest["data"], run.manifest["backbone"]
    kept = f"blocks {record['kept']} of {backbone['blocks']}"
    return "\n".join(
        [
            f"# {record['id']}",
            "",
            f"A sequential recommender: {kept} of `{backbone['source']}`"
            f" ({backbone['revision']}), method `{record['method']}`, seed {record['seed']}.",
            "",
            f"Test users of {data['name']} ({data['users']} users, {data['items']} items),"
            " value and 95 % interval over users:",
            "",
            *lines,
            "",
            "Read it with `depthprobe.load_recommender(folder)`; the backbone alone with"
            " `AutoModelForCausalLM.from_pretrained(folder)`.",
            "",
        ]
    )
