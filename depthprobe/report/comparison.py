"""Several runs on one page: the answer of each, on one relative scale, and how they differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from depthprobe import formatting
from depthprobe.errors import BadInput, check_writable
from depthprobe.methods import method_info
from depthprobe.report import drawing
from depthprobe.report.answer import Answer, build_answer
from depthprobe.report.figures import FIGURES, curves, kept_limits, kept_side_by_side
from depthprobe.report.numbers import FULL, SASREC, Source, Summary, as_summary
from depthprobe.report.page import base_name, environment, folder_of, inline_svg, write_page
from depthprobe.report.tables import NOTHING, Column, Table, Values, make_table, plain, save_table
from depthprobe.study import Protocol

# if one of these differs, the question differs
QUESTION = ("metric", "margin", "confidence", "split", "seen items")


class Compared(NamedTuple):
    """One of the runs: its name on the page, its numbers, its answer."""

    name: str
    summary: Summary
    answer: Answer


def build_comparison(runs: Sequence[Source], output: str | Path | None = None) -> Path:
    """Write a page that sets the answers of several runs side by side.

    Each run is compared with its own teacher; no run is tested against another. Beside the page, a
    folder of its name holds the figure and the table. Returns the path of the page: ``output``, or
    comparison.html in the folder that holds all runs.

    Raises:
        BadInput: if a path is no run, there are fewer than two, one is given twice, or fewer than
            two have an accuracy to compare with their teacher's.
    """
    compared = _named([as_summary(run) for run in runs])
    drawn = [one for one in compared if curves(one.summary, one.summary.headline, kept=True)]
    if len(drawn) < 2:
        without = ", ".join(one.name for one in compared if one not in drawn)
        allowed = "two runs or more with a finished teacher and a shallower model"
        raise BadInput("run", without or compared[0].name, allowed)
    paths = [one.summary.run.path for one in compared]
    target = Path(default_output(paths) if output is None else output)
    check_writable("output", target.parent)
    folder, limits = folder_of(target), kept_limits(*(one.summary for one in drawn))
    table = answers_table(compared)
    if folder:
        if table:
            save_table(table, folder)
        panels = kept_side_by_side([one.summary for one in drawn])
        drawing.save_figure(panels[0], folder / "kept_side_by_side")
    figures = []
    for place, one in enumerate(drawn):  # one panel per run, all on one scale
        ax, caption = FIGURES["kept_vs_depth"].drawn(one.summary, limits=limits, title=one.name)
        caption = f"{one.name}. {caption}"
        svg = inline_svg(drawing.rendered(ax, "svg").decode(), f"run{place}", label=caption)
        figures.append({"svg": svg, "caption": caption})
    differing = differences([one.summary for one in compared])
    page = environment().get_template("comparison.html.j2").render(
        runs=compared, reports=[_report(path, target) for path in paths], differences=differing,
        shown=[one for one in compared if one.answer.verdict == "shown"],
        question=[word for word in QUESTION if word in differing], figures=figures,
        table_of_answers=table, folder=folder,
        command="depthprobe report " + " ".join(map(str, paths)),
    )  # fmt: skip
    return write_page(page, target)


def default_output(folders: Sequence[Path]) -> Path:
    """comparison.html in the folder that holds all runs; a relative path if theirs are."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    absolute = any(folder.is_absolute() for folder in folders)
    return Path(common if absolute else os.path.relpath(common)) / "comparison.html"


def _named(summaries: Sequence[Summary]) -> list[Compared]:
    """Name runs by their folders, with enough of the path to be distinct."""
    folders = [summary.run.path.resolve() for summary in summaries]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise BadInput("run", str(summaries[place].run.path), "each run once")
    parts, names = 1, [folder.name for folder in folders]
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
    pairs = zip(names, summaries, strict=True)
    return [Compared(name, summary, build_answer(summary)) for name, summary in pairs]


DIFFERENCES: dict[str, Callable[[Summary], str]] = {  # the protocol first
    "metric": lambda s: s.headline,
    "margin": lambda s: formatting.plain_percent(s.margin),
    "confidence": lambda s: formatting.plain_percent(s.level),
    "split": lambda s: _split(s.run.study.protocol),
    "seen items": lambda s: s.run.seen_items,
    "data": lambda s: f"{s.run.manifest.data.name} ({s.run.manifest.data.fingerprint[:8]})",
    "backbone": lambda s: base_name(s.run.manifest.backbone.source),
    "item embeddings": lambda s: s.run.manifest.item_table.source,
    "epochs": lambda s: str(s.run.study.recipe.epochs),
    "seeds": lambda s: str(len(s.seeds_compared)),
    "machine": lambda s: s.run.manifest.machine.name,
    "version": lambda s: s.run.manifest.versions.get("depthprobe", formatting.NONE),
}


def _split(protocol: Protocol) -> str:
    at = f" at {' and '.join(protocol.split_at)}" if protocol.split == "temporal" else ""
    return f"{protocol.split}{at}"


def differences(summaries: Sequence[Summary]) -> dict[str, str]:
    """What differs between the runs: a label, and the values in the runs' order."""
    found = {word: [value(one) for one in summaries] for word, value in DIFFERENCES.items()}
    return {word: ", ".join(values) for word, values in found.items() if len(set(values)) > 1}


def answers_table(compared: Sequence[Compared]) -> Table | None:
    """Each run's sufficient depth and what it saves, or its best candidate, marked as such."""
    rows: list[Values] = []
    for name, summary, answer in compared:
        manifest = summary.run.manifest
        ratios = [point.ratio.get((FULL, summary.headline)) for point in summary.of(SASREC)]
        rows.append({
            "run": name, "data": manifest.data.name,
            "backbone": base_name(manifest.backbone.source), "verdict": answer.verdict,
            "depth": answer.depth, "blocks": answer.blocks, "method": answer.method,
            "margin": answer.margin, "parameters": answer.parameters,
            "kept": answer.kept or NOTHING, "inference": answer.inference or NOTHING,
            "training": answer.training or NOTHING, "sasrec": next(iter(ratios), None) or NOTHING,
            "users": answer.users, "seeds": len(summary.seeds_compared),
        })  # fmt: skip

    def depth(row: Values) -> str:
        found = f"{row['depth']} of {row['blocks']}" if row["depth"] else ""
        best = f"\nbest candidate: {found}" if found else ""
        return found if row["verdict"] == "shown" else row["verdict"] + best

    columns: list[Column] = [
        ("run", lambda row: f"{row['run']}\n{row['data']}, {row['backbone']}", plain),
        ("sufficient depth", depth, plain),
        ("reached by", "method", lambda method: method_info(method).label),
        ("accuracy kept", "kept", formatting.in_percent),
        ("parameters", "parameters", lambda share: formatting.percent(share, 0)),
        ("to serve", "inference", formatting.times_faster),
        ("to train", "training", formatting.times_faster),
        ("SASRec of teacher's", "sasrec", formatting.in_percent),
        ("test users", "users", plain), ("seeds", "seeds", plain),
    ]  # fmt: skip
    return make_table("answers", rows, columns, words=3)


def _report(folder: Path, target: Path) -> str:
    """The path from the page to the run's own report; empty if there is none yet."""
    report = folder / "report.html"
    if not report.is_file():
        return ""
    return Path(os.path.relpath(report.resolve(), target.parent.resolve())).as_posix()
