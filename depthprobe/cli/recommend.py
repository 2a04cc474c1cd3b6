"""`recommend`: recommend items to the users in a file, with an exported model."""

from __future__ import annotations

import csv
import json
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from depthprobe.cli.options import (
    LOG,
    apply_flags,
    check_output_file,
    function,
    option,
    path,
    takes_flags,
    whole,
)
from depthprobe.cli.terminal import echo
from depthprobe.data.readers.streams import FIELD, head, split_words
from depthprobe.errors import BadInput, one_line, short, visible
from depthprobe.files import complete_file
from depthprobe.formatting import plural
from depthprobe.study import Columns, Data, Study

if TYPE_CHECKING:
    import numpy as np

    from depthprobe.models.export import ExportedRecommender

USERS = 2048  # users in memory at once
COLUMNS = ("user", "rank", "item", "score", "title")
NAMES = ("item", "title", "score")  # an item's keys in JSON
TABLES = (".csv", ".jsonl", ".json", ".parquet")  # files that are tables, whatever they contain
Items = Sequence[tuple[str, str | None, float]]
Answers = Iterable[tuple[str, Items]]
History = tuple[str, str, Sequence[str]]  # place in the file, user, items
Read = Callable[[], Iterator[History]]
Write = Callable[[Answers], object]
BLANKS = str.maketrans("\t\r\n", "   ")
READ = ("format", "user_column", "item_column", "time_column", "time_format")


@takes_flags({name: LOG[name] for name in READ})
def recommend(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that export wrote.", parser=path)
    ],
    history: Annotated[
        Path,
        option("FILE", "Lines of user item item ..., oldest first; or a log.", parser=path),
    ],
    recommender: Annotated[
        str | None,
        option(
            "MODULE:FUNCTION",
            "The function that builds your own, as in the sweep.",
            parser=function,
        ),
    ] = None,
    top: Annotated[
        int, option("K", "How many items to recommend to each user.", parser=whole)
    ] = 10,
    device: Annotated[str, option("auto|cpu|cuda|mps", "Where to compute.")] = "auto",
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Ignore items outside the catalogue.")
    ] = False,
    exit: Annotated[
        bool, typer.Option("--exit", help="Stop at the block where a user's answer has settled.")
    ] = False,
    output: Annotated[
        Path | None,
        option("FILE", "A .tsv, .csv, .jsonl or .parquet [default: the terminal].", parser=path),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write JSON lines, one per user.")
    ] = False,
    **flags: Any,
) -> None:
    """Recommend items with an exported model.

    Tab-separated lines: user, rank, item, score, title. The file may be of any length.
    """
    form = form_of(output, as_json)
    settings = apply_flags(Study(), data=str(history), **flags).data

    from transformers.utils.logging import disable_progress_bar

    from depthprobe.models.export import load_recommender

    disable_progress_bar()  # they would mix with the recommendations
    model = load_recommender(folder, device, recommender=recommender)
    if not 1 <= top <= len(model.item_ids):
        allowed = f"a number from 1 to the {len(model.item_ids):,} items of the catalogue"
        raise BadInput("top", top, allowed)
    if exit:
        model.exit_rule()
    with rereadable(history) as file:
        read = histories(file, history, settings, model)
        # check all items before printing anything
        items, users, few = count_left(read, history, model, top=top, unknown=skip_unknown)
        with writer(output, form) as write:
            for part in recommendations(read, model, top=top, exit=exit):
                write(part)
    if model.depths:
        mean = sum(depth * n for depth, n in model.depths.items()) / model.depths.total()
        echo(f"early exit: after {mean:.1f} blocks on average", sys.stderr)
    if items:
        counts = f"{plural(items, 'item')} outside the catalogue, {plural(users, 'user')}"
        echo(f"left out: {counts} with no other", sys.stderr)
    if few:
        others = "the rest of the catalogue is in their histories"
        echo(f"{plural(few, 'user')} with fewer than {plural(top, 'item')}: {others}", sys.stderr)


# Reading: a file of any length, line by line; or a log, by the readers of `data`.


@contextmanager
def rereadable(path: Path) -> Iterator[Path]:
    """The file; a pipe can be read only once, so it is first copied to disk."""
    with ExitStack() as stack:
        try:
            if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
                copy = stack.enter_context(tempfile.NamedTemporaryFile())
                with path.open("rb") as pipe:
                    shutil.copyfileobj(pipe, copy)
                copy.flush()
                path = Path(copy.name)
        except OSError as error:
            raise BadInput("history", path, f"a readable text file ({error})") from None
        yield path


def histories(file: Path, shown: Path, settings: Data, model: ExportedRecommender) -> Read:
    """A function that reads the histories from the start: from a log in memory, or line by line.

    A file is a log if it names its columns, or the options do; ``BadInput`` if it can't be read.
    """
    try:
        if settings.format or settings.columns != Columns() or is_log(file, shown):
            return partial(log_histories, *read_users(replace(settings, source=str(file))))
    except BadInput as error:
        if error.field != FIELD:
            raise
        value = shown if str(error.value) == str(file) else error.value
        raise BadInput("history", value, error.allowed, fault=error.fault) from None
    blank = next((item for item in model.item_ids if len(item.split()) > 1), None)
    return partial(line_histories, file, shown, blank)


def is_log(file: Path, shown: Path) -> bool:
    """Whether a file is a table, by its name or because it names its columns."""
    from depthprobe.data.readers.tables import names_columns  # pyarrow is slow to import

    if file.is_dir() or shown.suffix.lower() in TABLES:
        return True
    start = head(file)
    return start.startswith("PAR1") or start.lstrip().startswith("{") or names_columns(start)


def read_users(settings: Data) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """User ids, item ids, all users' items in a row (N,), and where each user's items end (U,).

    Users are in the natural order of their ids. Items are indices into the item ids; those with
    equal times stay in the order of the file.
    """
    import numpy as np

    from depthprobe.data.log import number_ids
    from depthprobe.data.readers.formats import read_log

    log = read_log(settings.source, format=settings.format, columns=settings.columns, ratings=False)
    for note in log.notes:
        echo(f"warning: {one_line(note)}", sys.stderr)
    users, user_ids = number_ids(log.users, "user")
    items, item_ids = number_ids(log.items, "item")
    order = np.lexsort([key for key in (log.times, log.parts, users) if key is not None])
    return user_ids, item_ids, items[order], np.cumsum(np.bincount(users))


def log_histories(
    users: list[str], names: list[str], items: np.ndarray, ends: np.ndarray
) -> Iterator[History]:
    """The histories of a log."""
    for user, start, end in zip(users, [0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        yield f"user {short(user, 40)}", user, [names[item] for item in items[start:end].tolist()]


def line_histories(file: Path, shown: Path, blank: str | None) -> Iterator[History]:
    """The histories of a file of ``user item item ...`` lines; empty lines are skipped.

    If the catalogue has an id with a blank, ``blank``, only tabs split a line.
    """
    seen = set[int]()  # hashes: names would take several times the memory
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            place = f"{shown}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise BadInput("history", place, "UTF-8 text") from None
            user, *items = split_words(line, tabs=blank is not None) or [""]
            if not user:
                continue
            if not items or "" in items:
                allowed = "a user and at least one item"
                if blank is not None:
                    allowed += (
                        f", with one tab between: ids hold blanks, as {short(blank, 40)} does"
                    )
                raise BadInput("history", place, allowed)
            if hash(user) in seen:
                raise BadInput("history", user, f"each user once (again in {place})")
            seen.add(hash(user))
            yield f"line {number}", user, items


def count_left(
    read: Read, path: Path, model: ExportedRecommender, *, top: int, unknown: bool
) -> tuple[int, int, int]:
    """Count unknown items, users with no known item, and users with too few items left.

    Too few are fewer than ``top`` unseen ones, if the model leaves out items that a user has had.
    ``BadInput`` for the first unknown item, unless they are allowed, and for a file without users.
    """
    items = users = few = 0
    place = None
    for place, _, history in read():
        strange = [item for item in history if item not in model.numbers]
        if strange and not unknown:
            where = f"in the catalogue, in {path}, {place}"
            known = f"an item of the {len(model.item_ids):,} {where}"
            raise BadInput("history", strange[0], f"{known} (--skip-unknown leaves such items out)")
        items += len(strange)
        users += len(strange) == len(history)
        had = len(set(history).difference(strange))
        few += model.filter_seen and had > len(model.item_ids) - top and had > 0
    if place is None:
        raise BadInput("history", path, "at least one line: user item item ...")
    return items, users, few


def recommendations(
    read: Read, model: ExportedRecommender, *, top: int, exit: bool = False
) -> Iterator[Answers]:
    """The best items for each user, in order, some users at a time; unknown items are ignored."""
    lines = read()
    while part := list(islice(lines, USERS)):
        known = [(user, [i for i in items if i in model.numbers]) for _, user, items in part]
        users = [(user, items) for user, items in known if items]
        best = model.recommend([items for _, items in users], top=top, exit=exit)
        yield [(user, items) for (user, _), items in zip(users, best, strict=True)]


# Writing: functions that take the answers for some users.


def form_of(output: Path | None, as_json: bool) -> str:
    """The output format, by the file's suffix; a terminal, pipe or device gets text."""
    check_output_file(output)
    if output is None or (output.exists() and not output.is_file()):
        return ".jsonl" if as_json else ".tsv"
    suffixes = [".jsonl"] if as_json else [*FORMS, ".parquet"]
    if output.suffix.lower() not in suffixes:
        beside = " (beside --json)" if as_json else ""
        raise BadInput("output", output, f"a file ending in {', '.join(suffixes)}{beside}")
    return output.suffix.lower()


@contextmanager
def writer(output: Path | None, form: str) -> Iterator[Write]:
    """A function that writes answers to the terminal, or to a file written whole or not at all."""
    with ExitStack() as stack:
        if output is None:
            yield FORMS[form](sys.stdout)
            return
        temporary = stack.enter_context(complete_file(output))
        if form != ".parquet":
            stream = temporary.open("w", encoding="utf-8", newline="")
            yield FORMS[form](stack.enter_context(stream))
            return
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        kinds = [pa.string(), pa.int32(), pa.string(), pa.float32(), pa.string()]
        schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
        table = stack.enter_context(ParquetWriter(temporary, schema))
        yield lambda part: table.write_table(
            pa.table([*map(list, zip(*_cells(part), strict=True))] or [[]] * 5, schema=schema)
        )


def _cells(part: Answers) -> Iterator[tuple[str, int, str, float, str | None]]:
    for user, items in part:
        for rank, (item, title, score) in enumerate(items, start=1):
            yield user, rank, item, score, title


def _tsv(stream: TextIO) -> Write:
    stream.write("\t".join(COLUMNS) + "\n")
    return lambda part: stream.writelines(map(_row, _cells(part)))


def _row(cells: tuple[str, int, str, float, str | None]) -> str:
    # replace what would end the column or line, or control a terminal
    user, rank, item, score, title = cells
    texts = user, str(rank), item.translate(BLANKS), f"{score:.4f}", " ".join((title or "").split())
    return "\t".join(map(visible, texts)) + "\n"


def _csv(stream: TextIO) -> Write:
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(COLUMNS)
    return lambda part: rows.writerows(
        (user, rank, item, f"{score:.4f}", title) for user, rank, item, score, title in _cells(part)
    )


def _json(stream: TextIO) -> Write:
    """One line of JSON per user, which can hold any id."""
    return lambda part: stream.writelines(
        json.dumps({"user": user, "items": [dict(zip(NAMES, item, strict=True)) for item in items]})
        + "\n"
        for user, items in part
    )


FORMS: dict[str, Callable[[TextIO], Write]] = {".tsv": _tsv, ".csv": _csv, ".jsonl": _json}
