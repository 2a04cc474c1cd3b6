"""Several runs on one page: the answer of each, on one relative scale, and what differs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from depthprobe.errors import BadInput
from depthprobe.files import complete_file
from depthprobe.report import style
from depthprobe.report.answer import Answer, build_answer
from depthprobe.report.facts import base_name, conditions
from depthprobe.report.figures import kept_limits, kept_reading, kept_side_by_side, kept_vs_depth
from depthprobe.report.numbers import FULL, SASREC, Source, Summary, as_summary
from depthprobe.report.page import environment, inline_svg
from depthprobe.report.tables import (
    NOTHING,
    Cell,
    Column,
    Table,
    make_table,
    plain,
    save_table,
    share,
)

QUESTION = ("margin", "split", "seen items")  # with another of these, the question is another


class Compared(NamedTuple):
    """One of the runs: what it is called on the page, its numbers, its answer."""

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
    drawn = [one for one in compared if kept_reading(one.summary)]
    if len(drawn) < 2:
        without = ", ".join(one.name for one in compared if one not in drawn)
        allowed = "two runs or more with a finished teacher and a shallower model"
        raise BadInput("run", without or compared[0].name, allowed)
    paths = [one.summary.run.path for one in compared]
    target = Path(default_output(paths) if output is None else output)
    folder = target.parent / target.stem
    table = answers_table(compared)
    save_table(table, folder)
    panels = kept_side_by_side([one.summary for one in drawn])
    style.save_figure(panels[0], folder / "kept_side_by_side")
    differing = differences([one.summary for one in compared])
    limits, figures = kept_limits(*(one.summary for one in drawn)), []
    for place, one in enumerate(drawn):  # a panel a run, all on one scale
        ax = kept_vs_depth(one.summary, limits=limits, title=one.name)
        reading = f"{one.name}. {kept_reading(one.summary)}"
        svg = inline_svg(style.rendered(ax, "svg").decode(), f"run{place}", label=reading)
        figures.append({"svg": svg, "caption": reading})
    page = environment().get_template("comparison.html.j2").render(
        headline=headline(compared),
        runs=[
            {
                "name": one.name, "answer": one.answer, "conditions": conditions(one.summary),
                "report": _report(path, target), "path": path,
            }
            for one, path in zip(compared, paths, strict=True)
        ],
        differences=differing,
        question=[word for word in QUESTION if word in differing],
        figures=figures,
        table_of_answers=table,
        folder=folder.name,
        command="depthprobe report " + " ".join(map(str, paths)),
    )  # fmt: skip
    with complete_file(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def default_output(folders: Sequence[Path]) -> Path:
    """comparison.html in the folder that holds all of the runs; relative where they are."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    absolute = any(folder.is_absolute() for folder in folders)
    return Path(common if absolute else os.path.relpath(common)) / "comparison.html"


def _named(summaries: Sequence[Summary]) -> list[Compared]:
    """Called by their folders, with as much of the path as tells them apart."""
    folders = [summary.run.path.resolve() for summary in summaries]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise BadInput("run", str(summaries[place].run.path), "each run once")
    parts, names = 1, [folder.name for folder in folders]
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
    return [
        Compared(name, summary, build_answer(summary))
        for name, summary in zip(names, summaries, strict=True)
    ]


def headline(compared: Sequence[Compared]) -> str:
    """How many runs show a sufficient depth, and which."""
    shown = [c for c in compared if c.answer.verdict == "shown"]
    if not shown:
        return f"None of the {len(compared)} runs shows that fewer blocks suffice."
    names = ", ".join(f"{c.name} {c.answer.depth} of {c.answer.blocks}" for c in shown)
    whose = "All" if len(shown) == len(compared) else f"{len(shown)} of"
    verb = "shows" if len(shown) == 1 else "show"
    return f"{whose} {len(compared)} runs {verb} that fewer blocks suffice: {names}."


def differences(summaries: Sequence[Summary]) -> dict[str, str]:
    """What the runs do not share, the protocol first: a word and the values, in their order."""
    named: dict[str, Callable[[Summary], str]] = {
        "margin": lambda s: f"{100 * s.margin:g} %",
        "split": lambda s: _split(s.run.study.protocol),
        "seen items": lambda s: "left out" if s.run.study.protocol.filter_seen else "ranked too",
        "data": lambda s: f"{s.run.manifest.data.name} ({s.run.manifest.data.fingerprint[:8]})",
        "backbone": lambda s: base_name(s.run.manifest.backbone.source),
        "item embeddings": lambda s: s.run.manifest.item_table.source,
        "epochs": lambda s: str(s.run.study.recipe.epochs),
        "seeds": lambda s: str(len(s.seeds_compared)),
        "machine": lambda s: s.run.manifest.machine.name,
        "version": lambda s: s.run.manifest.versions.get("depthprobe", style.NONE),
    }
    found = {word: [value(summary) for summary in summaries] for word, value in named.items()}
    return {word: ", ".join(values) for word, values in found.items() if len(set(values)) > 1}


def _split(protocol: Any) -> str:
    at = f" at {' and '.join(protocol.split_at)}" if protocol.split == "temporal" else ""
    return f"{protocol.split}{at}"


def answers_table(compared: Sequence[Compared]) -> Table:
    """The sufficient depth of each run and what it saves; else its best candidate, said so."""
    rows = []
    for name, summary, answer in compared:
        manifest = summary.run.manifest
        data = f"{manifest.data.name}, {base_name(manifest.backbone.source)}"
        depth = f"{answer.depth} of {answer.blocks}" if answer.depth else ""
        best = f"best candidate: {depth}" if depth else ""
        shown = Cell(depth) if answer.verdict == "shown" else Cell(answer.verdict, best)
        small = answer.parameters
        row: dict[str, Any] = {
            "run": name, "verdict": answer.verdict, "depth": answer.depth,
            "blocks": answer.blocks, "method": answer.method, "margin": answer.margin,
            "parameters": small, "_run": Cell(name, data), "_depth": shown,
            "_method": style.method_info(answer.method).label if answer.method else None,
            "_parameters": None if small is None else style.percent(small, 0),
            "kept": answer.kept or NOTHING,
        }  # fmt: skip
        for kind, ratio in (("inference", answer.inference), ("training", answer.training)):
            row[kind] = ratio or NOTHING
            number, interval, word = style.times_faster(ratio) if ratio else (style.NONE, "", "")
            row[f"_{kind}"] = Cell(f"{number} {word}".strip(), interval)
        ratios = [
            point.ratio.get((FULL, summary.headline), NOTHING) for point in summary.of(SASREC)
        ]
        row |= {"sasrec": ratios[0] if ratios else NOTHING, "users": answer.users}
        rows.append(row | {"seeds": len(summary.seeds_compared)})
    columns: list[Column] = [
        ("run", "_run", plain), ("sufficient depth", "_depth", plain),
        ("reached by", "_method", plain), ("accuracy kept", "kept", share),
        ("parameters", "_parameters", plain), ("to serve", "_inference", plain),
        ("to train", "_training", plain), ("SASRec of teacher's", "sasrec", share),
        ("test users", "users", plain), ("seeds", "seeds", plain),
    ]  # fmt: skip
    return make_table("answers", rows, columns, words=3)


def _report(folder: Path, target: Path) -> str:
    """The way from the page to the run's own report; empty where there is none yet."""
    report = folder / "report.html"
    if not report.is_file():
        return ""
    return Path(os.path.relpath(report.resolve(), target.parent.resolve())).as_posix()
