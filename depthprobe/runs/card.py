"""The model card of an exported trial: what it is, its accuracy, its origin, its licence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from depthprobe.evaluation.metrics import METRICS, per_user_metric
from depthprobe.evaluation.slices import ALL
from depthprobe.evaluation.statistics import Interval, ratio_interval
from depthprobe.formatting import percent, plain_percent
from depthprobe.methods import base_of
from depthprobe.models.embedded import EMBEDDED
from depthprobe.models.sources import is_folder
from depthprobe.runs.plan import SASREC, TEACHER, full_trial
from depthprobe.runs.records import FULL, Costs, Record
from depthprobe.runs.store import Run
from depthprobe.study import ranges, settings_of

LONGEST = 120
TAGS = ["depthprobe", "recommender-system", "sequential-recommendation", "layer-pruning"]


def model_card(
    run: Run, record: Record, *, example: str = "", onnx: Mapping[str, Any] | None = None
) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads.

    Text from data or models is shortened and quoted, so that a name can't break the page.
    ``onnx`` has the measurements of an ONNX file, if there is one.
    """
    backbone, chosen, protocol = run.manifest.backbone, run.study.backbone, run.study.protocol
    sasrec, theirs = record.method == SASREC, chosen.own  # it has no backbone of ours
    local = not theirs and is_folder(backbone.source)
    on_hub = not (sasrec or backbone.source == EMBEDDED or local or theirs)
    front = ModelCardData(
        library_name="depthprobe" if sasrec else "transformers",
        license="other",
        license_name="terms-of-the-data" if sasrec else "licence-of-the-backbone",
        base_model=plain(backbone.source) if on_hub else None,
        tags=TAGS[:-1] if sasrec else TAGS,
    )
    table = run.metrics[(run.metrics["trial"] == record.id) & (run.metrics["split"] == "test")]
    table = table[(table["slice"] == ALL) & table["metric"].isin(METRICS)]
    teacher = full_trial(TEACHER, record.seed, backbone.blocks).id
    kept, users = retained(run, record.id, teacher)
    versions = record.provenance.versions if record.provenance else {}
    made = Environment(  # noqa: S701 - of Markdown, where `code` is what makes a name harmless
        loader=PackageLoader("depthprobe.runs"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {
        "code": code, "plain": plain, "ranges": ranges, "percent": percent,
        "plain_percent": plain_percent,
    }  # fmt: skip
    return made.get_template("card.md.j2").render(
        run=run, record=record, front=front.to_yaml(), example=example, onnx=onnx,
        backbone=backbone, chosen=chosen, data=run.manifest.data, protocol=protocol,
        settings=settings_of(run.study, record.method), costs=record.costs or Costs(),
        sasrec=sasrec, theirs=theirs, lever=base_of(record.method), teacher=teacher,
        # a card must not show the folders above a local one
        source=code((Path(backbone.source).name if local else "") or backbone.source),
        level=plain_percent(protocol.level), kept=kept, users=users, inf=math.inf,
        rows=table.to_dict(orient="records"), protocols=table["protocol"].unique(),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )  # fmt: skip


def retained(run: Run, trial: str, teacher: str) -> tuple[Interval | None, int]:
    """A trial's share of its teacher's accuracy, and the users; None without a teacher."""
    protocol = run.study.protocol
    ranks: pd.DataFrame = run.users[run.users["protocol"] == FULL].pivot(
        index="user", columns="trial", values="rank"
    )
    if trial == teacher or not {teacher, trial} <= {*ranks.columns}:
        return None, 0
    both = ranks[[trial, teacher]].dropna()
    own, full = (per_user_metric(both[name].to_numpy(), protocol.metric) for name in both.columns)
    return ratio_interval(own, full, level=protocol.level) if full.any() else None, len(both)


def plain(text: object, longest: int = LONGEST) -> str:
    """One line of printable characters, shortened if it is long."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    return line if len(line) <= longest else line[: longest - 3] + "..."


def code(text: object, longest: int = LONGEST) -> str:
    """Text as inline code, fenced by more backticks than it holds in a row."""
    line = plain(text, longest) or " "
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    # Markdown removes one blank on either side
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"
