"""`recommend`: the next items for each user of a file, from an exported model, batch by batch."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TextIO

import typer

from depthprobe.cli.options import (
    check_at_least,
    check_output_file,
    check_settings,
    option,
    whole,
)
from depthprobe.errors import BadInput
from depthprobe.files import complete_file

if TYPE_CHECKING:
    from depthprobe.models.export import ExportedRecommender

USERS = 2048  # users in memory at once
HEADER = "user\trank\titem\tscore\ttitle\n"


def recommend(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that export wrote.")],
    history: Annotated[Path, option("FILE", "A line a user: user item item ..., oldest first.")],
    top: Annotated[int, option("K", "How many items a user.", parser=whole)] = 10,
    device: Annotated[str, option("auto|cpu|cuda|mps", "Where to compute.")] = "auto",
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out items outside the catalogue.")
    ] = False,
    output: Annotated[
        Path | None, option("FILE", "Where to write [default: the terminal].")
    ] = None,
) -> None:
    """Top-K items from an exported model.

    Tab-separated lines: user, rank, item, score, title. The file may be of any length.
    """
    check_at_least("top", top, 1)
    check_settings(device=device)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise BadInput("dir", folder, "a folder that export wrote")
    check_output_file(output)
    with rereadable(history) as file:
        # the whole file before the model, and all its items before the first answer
        if not sum(1 for _ in read_histories(file, history)):
            raise BadInput("history", history, "at least one line: user item item ...")

        from transformers.utils.logging import disable_progress_bar

        from depthprobe.models.export import load_recommender

        disable_progress_bar()  # the terminal belongs to the answers
        model = load_recommender(folder, device)
        if top > len(model.item_ids):
            raise BadInput("top", top, f"at most the {len(model.item_ids)} items of the catalogue")
        items, users = count_unknown(file, history, model, allowed=skip_unknown)
        with ExitStack() as stack:
            stream: TextIO = sys.stdout
            if output is not None:
                temporary = stack.enter_context(complete_file(output))
                stream = stack.enter_context(temporary.open("w", encoding="utf-8"))
            stream.write(HEADER)
            for lines in answers(file, history, model, top=top):
                stream.write(lines)
    if items:
        counts = f"{_count(items, 'item')} outside the catalogue, {_count(users, 'user')}"
        print(f"left out: {counts} with no other", file=sys.stderr)


@contextmanager
def rereadable(path: Path) -> Iterator[BinaryIO]:
    """The file opened; what can be read only once, as a pipe, is copied to the disk first.

    Raises:
        BadInput: if it can't be read.
    """
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


def read_histories(file: BinaryIO, path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Line number, user and items of each ``user item item ...`` line; empty lines are skipped.

    Raises:
        BadInput: for a line that is not UTF-8, or has a user alone.
    """
    file.seek(0)
    for number, line in enumerate(file, start=1):
        try:
            words = line.decode("utf-8-sig" if number == 1 else "utf-8").split()
        except UnicodeDecodeError:
            raise BadInput("history", f"{path}, line {number}", "UTF-8 text") from None
        if len(words) == 1:
            raise BadInput("history", f"{path}, line {number}", "a user and at least one item")
        if words:
            yield number, words[0], words[1:]


def count_unknown(
    file: BinaryIO, path: Path, model: ExportedRecommender, *, allowed: bool
) -> tuple[int, int]:
    """How many items the catalogue does not hold, and how many users have no other.

    Raises:
        BadInput: for the first of them, unless they are allowed.
    """
    items = users = 0
    for number, _, history in read_histories(file, path):
        unknown = [item for item in history if item not in model.numbers]
        if unknown and not allowed:
            where = f"in the catalogue, in {path}, line {number}"
            known = f"an item of the {len(model.item_ids):,} {where}"
            raise BadInput("history", unknown[0], f"{known} (--skip-unknown leaves such items out)")
        items += len(unknown)
        users += len(unknown) == len(history)
    return items, users


def answers(file: BinaryIO, path: Path, model: ExportedRecommender, *, top: int) -> Iterator[str]:
    """The lines of some users at a time, in the order of the file; unknown items are left out."""
    lines = read_histories(file, path)
    while part := list(islice(lines, USERS)):
        known = [(user, [i for i in items if i in model.numbers]) for _, user, items in part]
        users = [(user, items) for user, items in known if items]
        best = model.recommend([items for _, items in users], top=top)
        yield "".join(_rows(user, items) for (user, _), items in zip(users, best, strict=True))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rows(user: str, answer: Sequence[tuple[str, str | None, float]]) -> str:
    # an id stays as it is, but for what would end its column or line
    blanks = {ord(character): " " for character in "\t\r\n"}
    rows = (
        (user, str(rank), item.translate(blanks), f"{score:.4f}", " ".join((title or "").split()))
        for rank, (item, title, score) in enumerate(answer, start=1)
    )
    return "".join("\t".join(row) + "\n" for row in rows)
