"""`compare`: test existing results of any recommenders against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthprobe import __version__
from depthprobe.cli.options import (
    AS_JSON,
    VERDICT,
    apply_flags,
    check_output_file,
    option,
    path,
    takes_flags,
)
from depthprobe.cli.terminal import echo, say, show_table
from depthprobe.errors import BadInput, one_of, visible
from depthprobe.formatting import (
    NONE,
    accuracy,
    in_percent,
    p_value,
    percent,
    plain_percent,
    plural,
    rounded,
    with_bounds,
)
from depthprobe.study import Study

if TYPE_CHECKING:
    import numpy as np

    from depthprobe.data.readers.results import Results
    from depthprobe.evaluation.slices import Family
    from depthprobe.report.tables import Table
    from depthprobe.study import Protocol

SCHEMA = 1  # of the JSON
PROMISES = ("non-inferior", "equivalent", "superior")
Content = dict[str, Any]


@takes_flags(VERDICT)
def compare(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...", help="The reference, then others; a0.csv,a1.csv are two seeds of one."
        ),
    ],
    targets: Annotated[
        Path | None, option("FILE", "Each user's target; needed if files hold lists.", parser=path)
    ] = None,
    slices: Annotated[str | None, option("C,C", "Columns that hold users' groups.")] = None,
    common: Annotated[
        bool, typer.Option("--common", help="Compare only the users that all files have.")
    ] = False,
    output: Annotated[Path | None, option("FILE", "Where to write a page.", parser=path)] = None,
    as_json: AS_JSON = False,
    fail_unless: Annotated[
        str | None, option("|".join(PROMISES), "Exit with 1 unless shown for every other file.")
    ] = None,
    **flags: Any,
) -> None:
    """Is B as good as A? Results that exist, paired by user.

    A file holds ranks by user, or top-K lists: CSV, TSV, Parquet, or a TREC run.
    """
    check_output_file(output)
    protocol = apply_flags(Study(), **flags).protocol
    if fail_unless is not None:
        one_of("fail_unless", fail_unless, PROMISES)
    names = [name.strip() for name in (slices or "").split(",") if name.strip()]
    content = compare_files(files, protocol, targets=targets, slices=names, common=common)
    if output is not None:
        write_comparison(content, output)
    if as_json:
        echo(json.dumps(strict(content), indent=1, allow_nan=False))
    else:
        show(content)
        if output is not None:
            echo(f"\n{output}")
    if fail_unless and not all(one["claims"][fail_unless]["shown"] for one in content["others"]):
        raise typer.Exit(1)


def compare_files(
    files: Sequence[str],
    protocol: Protocol,
    *,
    targets: Path | None = None,
    slices: Sequence[str] = (),
    common: bool = False,
) -> Content:
    """The content of the JSON output, with intervals as objects.

    The first file is the reference. ``BadInput`` for files that can't be compared.
    """
    if len(files) < 2:
        raise BadInput("file", files[0], "a second file to compare it with")

    from depthprobe.data.readers.results import read_results, read_targets
    from depthprobe.evaluation import sufficiency
    from depthprobe.evaluation.metrics import METRICS, per_user_metric
    from depthprobe.evaluation.slices import by_label
    from depthprobe.evaluation.statistics import difference_interval, mean_interval, ratio_interval

    asked = None if targets is None else read_targets(targets, slices)
    paths = [_paths(text) for text in files]
    arms = [read_results(each, asked, slices) for each in paths]
    names = _names(files)
    users, ranks = align(arms, names, common=common)
    metric, margin, level = protocol.metric, protocol.margin, protocol.level
    lengths = [arm.longest for arm in arms]
    usable = [name for name in dict.fromkeys([*METRICS, metric]) if _reaches(name, lengths)]
    if metric not in usable:
        longest = ", ".join("all items" if n is None else f"{n:,}" for n in lengths)
        needs = "lists of one length" if metric == "MRR" else "longer lists"
        raise BadInput(
            "metric", metric, f"it needs {needs}: the longest have {longest}", fault=True
        )
    values = {name: [per_user_metric(own, name) for own in ranks] for name in usable}
    base = values[metric][0]
    if not base.any():
        fault = f"its {metric} is 0, and no share of it can be kept"
        raise BadInput("file", files[0], fault, fault=True)
    tests = sufficiency.compare(
        dict(zip(names[1:], values[metric][1:], strict=True)), base, margin=margin, level=level
    )
    labels: dict[str, dict[str, str]] = {}
    for found in (*(arm.labels for arm in reversed(arms)), asked.labels if asked else {}):
        labels |= {name: labels.get(name, {}) | own for name, own in found.items()}
    for name in slices:
        if name not in labels:
            raise BadInput("slices", name, "a column of one of the files")
    groups = [by_label(name, [labels[name].get(user, "") for user in users]) for name in slices]

    def arm(place: int) -> Content:
        return {
            "name": names[place],
            "files": [str(each) for each in paths[place]],
            "seeds": arms[place].ranks.shape[1],
            "longest_list": arms[place].longest,
            "targets_missed": arms[place].missed,
            "users_without_target": arms[place].left_out,
            "users_left_out": len(arms[place].ranks) - len(users),
            "means": {name: mean_interval(own[place], level=level) for name, own in values.items()},
        }

    others = []
    for place, (name, test) in enumerate(tests.items(), start=1):
        both = {name: (own[place], own[0]) for name, own in values.items()}
        others.append(
            arm(place)
            | {
                "verdict": test.verdict,
                "users_that_differ": int((both[metric][0] != base).any(axis=0).sum()),
                "difference": test.difference,
                "share": test.share,
                "share_at_least": test.lower,
                "tested_at": test.tested_at,
                "claims": {
                    claim: {"shown": test.shows(claim), "p_value": p}
                    for claim, p in test.p_values.items()
                },
                "users_to_decide": list(test.users),
                "seeds_to_decide": list(test.seeds),
                "metrics": {
                    name: {
                        "difference": difference_interval(*pair, level=level),
                        "share": ratio_interval(*pair, level=level) if pair[1].any() else None,
                    }
                    for name, pair in both.items()
                },
                "slices": list(_slices(groups, *both[metric], level=level)),
            }
        )
    return {
        "schema": SCHEMA, "depthprobe": __version__, "metric": metric, "margin": margin,
        "level": level, "users": len(users), "seeds": len(base), "reference": arm(0),
        "others": others,
    }  # fmt: skip


def align(
    arms: Sequence[Results], names: Sequence[str], *, common: bool
) -> tuple[list[str], list[np.ndarray]]:
    """The users that all arms share, and each arm's ranks (S, U); a single seed is repeated.

    ``BadInput`` if users differ and ``common`` was not asked for, or if seeds differ.
    """
    import numpy as np

    whole = [arm.ranks.dropna().index for arm in arms]  # users in every seed
    everybody, shared = arms[0].ranks.index, whole[0]
    for arm, own in zip(arms[1:], whole[1:], strict=True):
        everybody, shared = everybody.union(arm.ranks.index), shared.intersection(own)
    if len(shared) < len(everybody) and (not common or shared.empty):
        counts = ", ".join(f"{len(own):,}" for own in whole)
        hint = "" if shared.empty else "; --common compares these"
        fault = f"expected the same users in every seed of each; they have {counts}"
        fault = f"{fault} ({len(shared):,} in common{hint})"
        raise BadInput("file", ", ".join(names), fault, fault=True)
    several = [arm.ranks for arm in arms if arm.ranks.shape[1] > 1]
    seeds = sorted((several or [arms[0].ranks])[0].columns)
    ranks = []
    for name, arm in zip(names, arms, strict=True):
        table = arm.ranks.loc[shared]
        labels = sorted(table.columns)
        if len(labels) > 1 and labels != seeds:
            allowed = f"the seeds {', '.join(seeds)}, or one; it has {', '.join(labels)}"
            raise BadInput("file", name, f"expected {allowed}", fault=True)
        table = table[seeds] if len(labels) > 1 else table
        ranks.append(np.broadcast_to(table.to_numpy().T, (len(seeds), len(shared))))
    return shared.tolist(), ranks


def _paths(text: str) -> list[Path]:
    """A file, or one file per seed, separated by commas."""
    parts = [text] if Path(text).exists() else text.split(",")
    return [path(part) for part in parts]


def _names(files: Sequence[str]) -> list[str]:
    """The names of the arms: their first files' or, if names repeat, the whole arguments."""
    names = [visible(_paths(text)[0].name) for text in files]
    names = names if len(set(names)) == len(names) else list(files)
    for place, name in enumerate(names):
        if name in names[:place]:
            raise BadInput("file", name, "each file once")
    return names


def _reaches(metric: str, lengths: Sequence[int | None]) -> bool:
    """Whether top lists of these lengths suffice for a metric; None: all items are ranked."""
    if metric == "MRR":
        return len(set(lengths)) == 1
    return all(length is None or int(metric.partition("@")[2]) <= length for length in lengths)


def _slices(
    groups: Sequence[Family], one: np.ndarray, other: np.ndarray, *, level: float
) -> Iterator[Content]:
    """Means and difference in each group; the interval is infinite for few users or equal ranks."""
    from depthprobe.evaluation.slices import FEWEST
    from depthprobe.evaluation.statistics import Interval, difference_interval

    for family in groups:
        for code, name in enumerate(family.slices):
            x, r = one[:, family.codes == code], other[:, family.codes == code]  # (S, users)
            found = difference_interval(x, r, level=level)
            if x.shape[1] < FEWEST or (x == r).all():
                found = Interval(found.value, -math.inf, math.inf)
            yield {
                "slice": name, "users": x.shape[1], "reference": float(r.mean()),
                "value": float(x.mean()), "difference": found,
            }  # fmt: skip


def strict(content: Any) -> Any:
    """The content for JSON: an interval becomes three numbers, infinite ones null."""
    if hasattr(content, "low"):
        return strict({"value": content.value, "low": content.low, "high": content.high})
    if isinstance(content, dict):
        return {key: strict(value) for key, value in content.items()}
    if isinstance(content, list):
        return [strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


# The text for the reader, the same on the terminal and on the page.


def headline(content: Content, one: Content) -> str:
    """A sentence with the verdict on one arm against the reference."""
    name, other = one["name"], content["reference"]["name"]
    margin, metric = plain_percent(content["margin"]), content["metric"]
    loses = f"{margin} of {metric}"
    return {
        "superior": f"{name} is better than {other}.",
        "equivalent": f"{name} is as good as {other}: its {metric} is within {margin} of it.",
        "non-inferior": f"{name} is nearly as good as {other}: it loses at most {loses}.",
        "inferior": f"{name} is worse than {other}: it loses more than {loses}.",
    }.get(
        one["verdict"],
        f"Undecided: {name} may lose less than {margin} of {other}'s {metric}, or more.",
    )


def details(content: Content, one: Content) -> str:
    """How certain the verdict is, and how many users would settle it."""
    from depthprobe.report.answer import needed_words

    words = f"It has {in_percent(one['share'])} of the reference's {content['metric']}"
    if math.isfinite(one["share_at_least"]) and one["verdict"] != "inferior":
        words += f", at least {percent(max(0.0, one['share_at_least']), 2)} by the test"
    words += "."
    if one["verdict"] == "undecided" and one["users_to_decide"]:
        needed = needed_words(
            tuple(one["users_to_decide"]), tuple(one["seeds_to_decide"]),
            users=content["users"], seeds=content["seeds"],
        )  # fmt: skip
        words += f" {needed[0].upper()}{needed[1:]}, if the means stay as they are."
    return words


def remarks(content: Content) -> list[str]:
    """What was measured, and what was left out."""
    from depthprobe.evaluation.sufficiency import DIFFERING

    arms = [content["reference"], *content["others"]]
    fixed = [arm["name"] for arm in arms if arm["seeds"] == 1]
    found = []
    if len(fixed) == len(arms):
        found.append(
            "One seed each: this is about these very models, for users like these. "
            "Another training of either may differ."
        )
    else:
        seeds = content["seeds"]
        found.append(f"{seeds} seeds: this is about such trainings, for users like these.")
        found += [f"{name} has one seed: it stands for itself alone." for name in fixed]
    for arm in arms:
        for key, noun, rest in (
            ("targets_missed", "list", "without the target: a miss in every metric"),
            ("users_without_target", "user", "without a target, left out"),
            ("users_left_out", "user", "whom not all files have, left out"),
        ):
            if arm[key]:
                found.append(f"{arm['name']}: {plural(arm[key], noun)} {rest}.")
    length = arms[0]["longest_list"]
    if length and "MRR" in arms[0]["means"]:
        found.append(f"The lists have up to {length:,} items: MRR is of these alone.")
    for one in content["others"]:
        if one["users_that_differ"] < DIFFERING:
            words = f"differs from the reference for {plural(one['users_that_differ'], 'user')}"
            found.append(f"{one['name']} {words}; the tests count one more, who loses a usual hit.")
    if len(content["others"]) > 1:
        found.append(f"{len(content['others'])} comparisons share the level equally.")
    return found


CLAIMS = {
    "non-inferior": "it loses less than {margin}",
    "equivalent": "it is within {margin} either way",
    "superior": "it is better",
    "inferior": "it loses more than {margin}",
}


def tables(content: Content, one: Content) -> list[Table]:
    """The tables for one arm, B, against the reference, A."""
    import pandas as pd

    from depthprobe.report.tables import Table

    margin, means = plain_percent(content["margin"]), content["reference"]["means"]
    claims = [
        (
            claim, "shown" if one["claims"][claim]["shown"] else "not shown",
            words.format(margin=margin),
            p_value(one["claims"][claim]["p_value"]),
        )
        for claim, words in CLAIMS.items()
    ]  # fmt: skip
    metrics = [
        (
            name, accuracy(means[name].value), accuracy(one["means"][name].value),
            with_bounds(row["difference"], sign=True),
            in_percent(row["share"]) if row["share"] else NONE,
        )
        for name, row in one["metrics"].items()
    ]  # fmt: skip
    slices = [
        (
            visible(row["slice"]), f"{row['users']:,}", accuracy(row["reference"]),
            accuracy(row["value"]), with_bounds(row["difference"], sign=True),
        )
        for row in one["slices"]
    ]  # fmt: skip
    at, level = rounded(100 * one["tested_at"]), plain_percent(content["level"])
    made = (
        (f"Tests, each at {at} %", ("claim", "verdict", "in words", "p"), 3, claims),
        (f"Metrics, {level} intervals", ("metric", "A", "B", "B - A", "share of A"), 1, metrics),
        (f"{content['metric']} by slice", ("slice", "users", "A", "B", "B - A"), 1, slices),
    )
    return [
        Table(title, header, words, tuple(rows), ("",) * len(rows), pd.DataFrame())
        for title, header, words, found in made
        # an interval is printed below its estimate
        if (rows := [tuple(cell.replace(" [", "\n[") for cell in row) for row in found])
    ]


def show(content: Content) -> None:
    """Print the verdicts, their tables, and what was measured."""
    for one in content["others"]:
        say(headline(content, one))
        say(details(content, one))
        say(f"A is {content['reference']['name']}, B is {one['name']}.")
        for table in tables(content, one):
            head = table.columns
            rows = [[cell.replace("\n", " ") for cell in row] for row in table.rows]
            show_table(head, rows, words=head[: table.words], title=table.name)
        echo("")
    say(conditions(content))
    for remark in remarks(content):
        say(remark)


def conditions(content: Content) -> str:
    """The conditions of the comparison."""
    parts = (
        content["metric"], f"margin {plain_percent(content['margin'])}",
        f"confidence {plain_percent(content['level'])}", plural(content["users"], "user"),
        plural(content["seeds"], "seed"),
    )  # fmt: skip
    return ", ".join(parts)


def write_comparison(content: Content, output: Path) -> None:
    """Write the HTML page."""
    from depthprobe.report.page import environment, write_page

    others = [
        {
            "name": one["name"],
            "verdict": one["verdict"],
            "headline": headline(content, one),
            "details": details(content, one),
            "tables": tables(content, one),
        }
        for one in content["others"]
    ]
    page = environment().get_template("compare.html.j2").render(
        reference=content["reference"]["name"], others=others, conditions=conditions(content),
        remarks=remarks(content), shown=PROMISES,
    )  # fmt: skip
    write_page(page, output)
