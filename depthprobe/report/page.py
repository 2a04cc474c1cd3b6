"""The HTML page of a run: one file that carries its figures, and needs no network or script."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from depthprobe.files import complete_file
from depthprobe.methods import METHODS, base_of
from depthprobe.report.answer import build_answer
from depthprobe.report.facts import conditions, how_measured, negatives_of
from depthprobe.report.figures import FIGURES
from depthprobe.report.numbers import Source, Summary, as_summary
from depthprobe.report.reliance import reliance_table
from depthprobe.report.style import FORMATS, save_figure
from depthprobe.report.tables import all_tables, save_table

# In the order of reading: id, title, tables. A section without a figure or table is left out.
SECTIONS = (
    ("depth", "Accuracy against depth", ()),
    ("pareto", "Accuracy against cost", ()),
    ("blocks", "Block by block", ("left_out",)),
    ("maps", "Spans of blocks", ()),
    ("reliance", "How far cheap scores can be trusted", ("reliance",)),
    ("hurt", "Who loses", ("slices", "lists")),
    ("ablation", "Ways to a shallow model", ("ablation",)),
    ("cost", "What a depth costs", ("cost",)),
    ("methods", "All methods", ("methods", "methods_sampled")),
    ("trials", "All trials", ("trials",)),
    ("measured", "How it was measured", None),
)


def build_report(run: Source, output: str | Path | None = None) -> Path:
    """Write a run's report: the page, RUN/figures/ (SVG, PNG, PDF) and RUN/tables/.

    Returns the path of the page: ``output``, or RUN/report.html.

    Raises:
        BadInput: if the path is no run.
    """
    summary = as_summary(run)
    folder, manifest = summary.run.path, summary.run.manifest
    tables = all_tables(summary)
    if reliance := reliance_table(summary):
        tables["reliance"] = reliance
    for table in tables.values():
        save_table(table, folder / "tables")
    figures = _figures(summary, folder / "figures")
    methods = {base_of(point.method) for point in summary.points}
    page = environment().get_template("report.html.j2").render(
        study=summary.run.study.name,
        answer=build_answer(summary),
        conditions=conditions(summary),
        sections=[
            (name, title)
            for name, title, needed in SECTIONS
            if needed is None or name in figures or any(table in tables for table in needed)
        ],
        figures=figures, tables=tables,
        facts=how_measured(summary), negatives=negatives_of(summary.run.study),
        command=manifest.command or "", created=manifest.created[:10],
        methods=[method for name, method in METHODS.items() if name in methods],
    )  # fmt: skip
    target = Path(output) if output is not None else folder / "report.html"
    with complete_file(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def environment() -> Environment:
    """The templates of the pages; everything that is put into them is escaped."""
    # autoescape=True and not select_autoescape: that one ignores the names of templates like ours
    made = Environment(
        autoescape=True, loader=PackageLoader("depthprobe.report"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["unbroken"] = _unbroken
    return made


def _figures(summary: Summary, folder: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Draw and save what there is data for; by section, the SVG and its caption."""
    sections: dict[str, list[Mapping[str, Any]]] = {}
    for entry in FIGURES:
        reading = entry.reading(summary, **entry.chosen)
        if not reading:
            for suffix in FORMATS:  # an older report of this run may have left them
                (folder / f"{entry.name}.{suffix}").unlink(missing_ok=True)
            continue
        svg = save_figure(entry.draw(summary, **entry.chosen), folder / entry.name)
        picture = inline_svg(svg, entry.name, label=reading)
        sections.setdefault(entry.section, []).append({"svg": picture, "caption": reading})
    return sections


def inline_svg(svg: str, name: str, *, label: str) -> Markup:
    """An SVG file as part of a page: no prolog, its ids its own, spoken as one picture.

    Ids get the figure's name in front, for matplotlib numbers them alike in every file.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    opening, rest = body.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', opening)
    if box is None:
        raise ValueError(f"figure {name}: an SVG without a viewBox")
    head = (
        f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(head + rest)  # noqa: S704  (made by matplotlib, which escapes its texts)


def _unbroken(text: str) -> str:
    """Keeps a number and its unit on one line, and an interval in one piece; minus signs."""
    text = re.sub(r"(?<![\w.-])-(?=\d)", "\u2212", text)
    text = re.sub(r"(?<=\d) (?=(%|ms|s|k|M|B)\b|%)", "\u00a0", text)
    return re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", "\u00a0"), text)
