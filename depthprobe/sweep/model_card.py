"""The model card of an exported trial: what it is, how good, where from, under which terms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from depthprobe.evaluation.slices import ALL
from depthprobe.models.sources import EMBEDDED, is_folder
from depthprobe.study import ranges
from depthprobe.sweep.measured import METRICS
from depthprobe.sweep.store import Run

LONGEST = 120
TAGS = ("depthprobe", "recommender-system", "sequential-recommendation", "layer-pruning")
PARTS = {
    "blocks": "blocks",
    "token_embeddings": "token embeddings",
    "adapters": "adapters",
    "item_table": "item table",
    "total": "all",
}


def model_card(run: Run, record: dict[str, Any]) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads.

    Whatever comes from data or models is shortened and quoted: a name can't break the page.
    """
    backbone, kept = run.manifest["backbone"], record["kept"]
    source = _public_name(backbone["source"])
    return "\n".join(
        [
            *_front_matter(run),
            f"# {_code(record['id'])}",
            "",
            f"A sequential recommender of depth {record['depth']}: blocks {ranges(kept)} of the"
            f" {backbone['blocks']} of {_code(source)} (numbered from 0), method"
            f" {_code(record['method'])}, seed {record['seed']}. Made with depthprobe.",
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
    source = str(run.manifest["backbone"]["source"])
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


def _accuracy(run: Run, record: dict[str, Any]) -> list[str]:
    found, data = run.metrics, run.manifest["data"]
    found = found[(found["trial"] == record["id"]) & (found["split"] == "test")]
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
        f"Test users of {_code(data['name'])} ({data['users']:,} users, {data['items']:,} items,"
        f" {data['interactions']:,} interactions), {run.study.protocol.split} split; a user's seen"
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


def _size(record: dict[str, Any]) -> list[str]:
    counts = record["costs"]["parameters"]
    rows = [f"| {name} | {counts[key]:,} |" for key, name in PARTS.items() if key in counts]
    return ["| part | parameters |", "|---|---:|", *rows]


def _provenance(run: Run, record: dict[str, Any], source: str) -> list[str]:
    origin, settings = record["provenance"], run.study.backbone
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    git = origin.get("git") or {}
    dirty = " with changes" if git.get("dirty") else ""
    facts = {
        "study": f"{_code(run.study.name)}, hash {_code(origin['study'])}",
        "data": f"{_code(run.manifest['data']['name'])}, fingerprint {_code(origin['data'])}",
        "backbone": f"{_code(source)}, revision {_code(origin['backbone'])}",
        "settings": f"dtype {settings.dtype}, attention {settings.attention},"
        f" quantize {settings.quantize}, tuning {settings.tuning}",
        "trained on": _code(origin["device"]),
        "versions": _code(versions, 400),
        "code": f"{_code(git['commit'])}{dirty}" if git.get("commit") else "not from a checkout",
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
