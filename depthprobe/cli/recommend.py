"""`recommend`: the next items for each user of a file, from an exported model, batch by batch."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TextIO

import typer

from depthprobe.cli.options import check_output_file, option, path, whole
from depthprobe.cli.terminal import echo
from depthprobe.data.readers.streams import head, split_words
from depthprobe.errors import BadInput, short, visible
from depthprobe.files import complete_file
from depthprobe.formatting import plural
from depthprobe.study import Data

if TYPE_CHECKING:
    from depthprobe.models.export import ExportedRecommender

USERS = 2048  # users in memory at once
HEADER = "user\trank\titem\tscore\ttitle\n"
Items = Sequence[tuple[str, str | None, float]]
Write = Callable[[str, Items], str]
BLANKS = str.maketrans("\t\r\n", "   ")


def recommend(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that export wrote.", parser=path)
    ],
    history: Annotated[
        Path,
        option("FILE", "Lines of user item item ..., oldest first; or a log.", parser=path),
    ],
    top: Annotated[
        int, option("K", "How many items to recommend to each user.", parser=whole)
    ] = 10,
    device: Annotated[str, option("auto|cpu|cuda|mps", "Where to compute.")] = "auto",
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Ignore items outside the catalogue.")
    ] = False,
    output: Annotated[
        Path | None, option("FILE", "Where to write [default: the terminal].", parser=path)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write JSON lines: a user and the items a line.")
    ] = False,
) -> None:
    """Recommend items with an exported model.

    Tab-separated lines: user, rank, item, score, title. The file may be of any length.
    """
    check_output_file(output)

    from transformers.utils.logging import disable_progress_bar

    from depthprobe.models.export import load_recommender

    disable_progress_bar()  # the terminal belongs to the recommendations
    model = load_recommender(folder, device)
    if not 1 <= top <= len(model.item_ids):
        allowed = f"a number from 1 to the {len(model.item_ids):,} items of the catalogue"
        raise BadInput("top", top, allowed)
    with rereadable(history) as file:
        # all items are checked before anything is printed
        items, users, few = count_left(file, history, model, top=top, unknown=skip_unknown)
        with _opened(output) as stream:
            if not as_json:
                stream.write(HEADER)
            write = _object if as_json else _rows
            stream.writelines(recommendations(file, history, model, top=top, write=write))
    if items:
        counts = f"{plural(items, 'item')} outside the catalogue, {plural(users, 'user')}"
        echo(f"left out: {counts} with no other", sys.stderr)
    if few:
        others = "the rest of the catalogue is in their histories"
        echo(f"{plural(few, 'user')} with fewer than {plural(top, 'item')}: {others}", sys.stderr)


@contextmanager
def rereadable(path: Path) -> Iterator[BinaryIO]:
    """The file opened; a pipe, which can be read only once, is copied to the disk first."""
    with ExitStack() as stack:
        try:
            file: BinaryIO = stack.enter_context(path.open("rb"))
            if not file.seekable():
                copy = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(file, copy)
                file = copy
        except OSError as error:
            raise BadInput("history", path, f"a readable text file ({error})") from None
        yield file


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that is complete or absent."""
    if output is None:
        yield sys.stdout
        return
    with complete_file(output) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield stream


def read_histories(
    file: BinaryIO, path: Path, model: ExportedRecommender
) -> Iterator[tuple[str, str, list[str]]]:
    """Place, user and items of each ``user item item ...`` line; empty lines are skipped.

    Where ids of the catalogue hold blanks, tabs alone split a line. A table whose header names the
    columns is read as a log is, each user's items in the order of time.
    """
    if path.is_file() and is_log(path):
        from depthprobe.data.prepared import read_data

        log = read_data(Data(source=str(path), ties="file"))
        for number, user in enumerate(log.user_ids.tolist()):
            yield f"user {short(user, 40)}", user, log.item_ids[log.history(number) - 1].tolist()
        return
    blank = next((item for item in model.item_ids if len(item.split()) > 1), None)
    file.seek(0)
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise BadInput("history", f"{path}, line {number}", "UTF-8 text") from None
        user, *items = split_words(line, tabs=blank is not None) or [""]
        if user and (not items or "" in items):
            allowed = "a user and at least one item"
            if blank is not None:
                allowed += f", with one tab between: ids hold blanks, as {short(blank, 40)} does"
            raise BadInput("history", f"{path}, line {number}", allowed)
        if items:
            yield f"line {number}", user, items


def is_log(path: Path) -> bool:
    """Whether a file is a table that says which of its columns are users and items."""
    from depthprobe.data.readers.tables import names_columns  # pyarrow is slow to import

    start = head(path)
    return start.startswith("PAR1") or names_columns(start)


def count_left(
    file: BinaryIO, path: Path, model: ExportedRecommender, *, top: int, unknown: bool
) -> tuple[int, int, int]:
    """How many items are not in the catalogue, users without another, and users of few others.

    The last have fewer than ``top`` items left that they have not had, where those are left out.

    Raises:
        BadInput: for the first unknown item, unless they are allowed; for a file without a user.
    """
    items = users = few = 0
    place = None
    for place, _, history in read_histories(file, path, model):
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
    file: BinaryIO, path: Path, model: ExportedRecommender, *, top: int, write: Write
) -> Iterator[str]:
    """What is written of each user, in the order of the file; unknown items are left out."""
    lines = read_histories(file, path, model)
    while part := list(islice(lines, USERS)):
        known = [(user, [i for i in items if i in model.numbers]) for _, user, items in part]
        users = [(user, items) for user, items in known if items]
        best = model.recommend([items for _, items in users], top=top)
        for (user, _), items in zip(users, best, strict=True):
            yield write(user, items)


def _object(user: str, items: Items) -> str:
    """A line of JSON, which may hold any id."""
    found = [{"item": item, "title": title, "score": score} for item, title, score in items]
    return json.dumps({"user": user, "items": found}) + "\n"


def _rows(user: str, items: Items) -> str:
    # an id stays as it is, but for what would end its column or line, or drive a terminal
    rows = (
        (user, str(rank), item.translate(BLANKS), f"{score:.4f}", " ".join((title or "").split()))
        for rank, (item, title, score) in enumerate(items, start=1)
    )
    return "".join("\t".join(map(visible, row)) + "\n" for row in rows)
