"""The HTML page of a run: one file with its figures, without network or scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from depthprobe import formatting
from depthprobe.errors import check_writable, shell_line
from depthprobe.files import complete_file
from depthprobe.methods import METHODS, base_of
from depthprobe.report.answer import build_answer
from depthprobe.report.budgets import budget_table
from depthprobe.report.controls import order_table, order_words, selection_table, untouched_table
from depthprobe.report.drawing import FORMATS, NoData, rendered, save_figure
from depthprobe.report.figures import FIGURES
from depthprobe.report.front import front_table, interaction_table, interaction_words
from depthprobe.report.numbers import Source, Summary, as_summary
from depthprobe.report.reliance import reliance_table
from depthprobe.report.result import make_result, write_result
from depthprobe.report.search import search_table, search_words
from depthprobe.report.tables import Table, all_tables, save_table
from depthprobe.runs.records import check_places

# In reading order: id, title, link text, tables. Sections without figure or table are left out.
SECTIONS = (
    ("search", "The search for the depth", "Search", ("search",)),
    ("depth", "Accuracy against depth", "Depth", ("order", "prompt_only_sampled")),
    ("pareto", "Accuracy against cost: which lever first?", "Cost", ("front", "interaction")),
    ("blocks", "Block by block", "Blocks", ("left_out", "selections")),
    ("maps", "Spans of blocks", "Spans", ()),
    ("budgets", "What is left of each block under a budget", "Budgets", ("budgets",)),
    ("reliance", "How far cheap scores can be trusted", "Cheap scores", ("reliance",)),
    ("hurt", "Who loses", "Who loses", ("slices", "lists")),
    ("ablation", "Ways to a shallow model", "Ways to train", ("ablation",)),
    ("titles", "At which block to read titles", "Titles", ()),
    ("cost", "What a depth costs", "Savings", ("cost",)),
    ("methods", "All methods", "Methods", ("methods", "methods_sampled")),
    ("trials", "All trials", "Trials", ("trials",)),
    ("measured", "How it was measured", "How measured", None),
)


def build_report(run: Source, output: str | Path | None = None) -> Path:
    """Write a run's report: the page, result.json, figures/ (SVG, PNG, PDF) and tables/.

    They are in the run's folder; with an ``output``, all but the page are in its :func:`folder_of`.
    Returns the path of the page: ``output``, or RUN/report.html.

    Raises:
        BadInput: if the path is no run, the page can't be written, or links lead out of the run.
    """
    summary = as_summary(run)
    target = summary.run.path / "report.html" if output is None else Path(output)
    folder = summary.run.path if output is None else folder_of(target)
    check_writable("output", target.parent)
    if output is None:
        check_places(summary.run.path)
    answer, tables = build_answer(summary), tables_of(summary)
    if folder is not None:
        write_result(make_result(summary, answer, tables), folder)
        for table in tables.values():
            save_table(table, folder / "tables")
    figures = _figures(summary, folder / "figures" if folder else None)
    sections = [
        (name, title, short)
        for name, title, short, needed in SECTIONS
        if needed is None or name in figures or any(table in tables for table in needed)
    ]
    page = environment().get_template("report.html.j2").render(
        summary=summary, answer=answer, sections=sections, figures=figures,
        tables=tables, order=order_words(summary)[0], searched=search_words(summary),
        joint=interaction_words(summary),
        folder=folder, own=output is None,
        methods={base_of(point.method) for point in summary.points},
        reproduce=shell_line(["depthprobe", "sweep", str(summary.run.path / "study.toml")]),
    )  # fmt: skip
    return write_page(page, target)


def folder_of(target: Path) -> Path | None:
    """The folder for a page's figures and tables, beside it; None if the page is no file."""
    if target.exists() and not target.is_file():
        return None  # a device, or a pipe
    return target.with_suffix("") if target.suffix else target.with_name(f"{target.name}-files")


def tables_of(summary: Summary) -> dict[str, Table]:
    """The tables of a page that the run has data for, by name."""
    makers = (
        front_table,
        interaction_table,
        reliance_table,
        order_table,
        untouched_table,
        selection_table,
        search_table,
        budget_table,
    )
    others = (make(summary) for make in makers)
    return all_tables(summary) | {table.name: table for table in others if table is not None}


def report_words(run: Source, output: str | Path | None = None) -> str:
    """Write the report; returns the words for a terminal: the first screen, and the path."""
    summary = as_summary(run)
    answer, page = build_answer(summary), build_report(summary, output)
    commands = answer.command, answer.quantized.command if answer.quantized else ""
    return "\n".join(filter(None, (*answer.lines, search_words(summary), *commands, str(page))))


def write_page(page: str, target: Path) -> Path:
    """Write a page, complete or not at all; returns its path."""
    with complete_file(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def environment() -> Environment:
    """The templates of the pages; every value that is put into them is escaped."""
    # autoescape=True, since select_autoescape ignores template names like ours
    made = Environment(
        autoescape=True, loader=PackageLoader("depthprobe.report"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.globals["METHODS"] = METHODS
    made.filters |= {
        "unbroken": _unbroken, "number": _number, "count": formatting.count, "duration": _duration,
        "percent": formatting.plain_percent, "rounded": formatting.rounded, "base_name": base_name,
    }  # fmt: skip
    return made


def base_name(source: str) -> str:
    """A backbone's short name: a folder's last part, or the whole of another source."""
    path = PurePath(source)
    return path.name if path.is_absolute() else source


def _figures(summary: Summary, folder: Path | None) -> dict[str, list[Mapping[str, Any]]]:
    """Draw and save the figures that have data; returns each SVG and its caption by section."""
    sections: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in FIGURES.items():
        try:
            ax, caption = entry.drawn(summary)
        except NoData:
            if folder is not None:  # left by an older report of this run
                for suffix in FORMATS:
                    (folder / f"{name}.{suffix}").unlink(missing_ok=True)
            continue
        svg = save_figure(ax, folder / name) if folder else rendered(ax, "svg").decode()
        picture = inline_svg(svg, name, label=caption)
        sections.setdefault(entry.section, []).append({"svg": picture, "caption": caption})
    return sections


def inline_svg(svg: str, name: str, *, label: str) -> Markup:
    """Turn an SVG file into part of a page: no prolog, unique ids, read aloud as one picture.

    Ids get the figure's name as prefix, since matplotlib uses the same ids in every file. Dropping
    unused ids, blanks, and decimals after the second saves a third of the file.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' * (m[1] in used), body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body)
    body = re.sub(r' (?:d|x|y|transform)="[^"]*"', _shortened, body)
    body = re.sub(r">\s+<", "><", body)
    opening, rest = body.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', opening)
    if box is None:
        raise ValueError(f"figure {name}: an SVG without a viewBox")
    head = (
        f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(head + rest)  # noqa: S704  (made by matplotlib, which escapes its texts)


def _shortened(attribute: re.Match[str]) -> str:
    """An SVG attribute with its numbers rounded to two decimals, hundredths of a point."""
    text = re.sub(
        r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), attribute[0]
    )
    return text.replace("\n", "")


def _unbroken(text: str) -> str:
    """Keep a number and its unit, or an interval, on one line; use true minus signs."""
    broken = str(text)
    broken = re.sub(r"(?<![\w.-])-(?=\d)", "\u2212", broken)
    broken = re.sub(r"(?<=\d) (?=(%|ms|s|k|M|B)\b|%)", "\u00a0", broken)
    return type(text)(re.sub(r"\[[^\]]*\]", lambda m: m[0].replace(" ", "\u00a0"), broken))


def _number(value: object) -> str:
    """Format numbers for a reader."""
    if isinstance(value, float):
        return formatting.significant(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest if not hours else 0, "s"))
    return " ".join(f"{value} {unit}" for value, unit in parts if value)
