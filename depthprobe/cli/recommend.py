"""`recommend`: the next items for each user of a file, from an exported model, batch by batch."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TextIO

import typer

from depthprobe.cli.options import check_at_least, check_settings, whole
from depthprobe.errors import BadInput, check_writable
from depthprobe.files import complete_file

if TYPE_CHECKING:
    from depthprobe.models.export import ExportedRecommender

USERS = 2048  # users in memory at once
HEADER = "user\trank\titem\tscore\ttitle\n"


@dataclass
class Skipped:
    """What ``--skip-unknown`` left out."""

    items: int = 0
    users: int = 0  # of whose items none was known


def recommend(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that export wrote.")],
    history: Annotated[
        Path, typer.Option(metavar="FILE", help="A line a user: user item item ..., oldest first.")
    ],
    top: Annotated[
        int, typer.Option(metavar="K", parser=whole, help="How many items a user.")
    ] = 10,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where to compute.")
    ] = "auto",
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out items outside the catalogue.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write [default: the terminal].")
    ] = None,
) -> None:
    """Top-K items from an exported model.

    Tab-separated lines: user, rank, item, score, title. The file may be of any length.
    """
    check_at_least("top", top, 1)
    check_settings(device=device)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise BadInput("dir", folder, "a folder that export wrote")
    if output is not None:
        if output.is_dir():
            raise BadInput("output", output, "a file, not a folder")
        check_writable("output", output.absolute().parent)
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
        if not skip_unknown:
            _check_known(file, history, model)
        skipped = Skipped()
        with ExitStack() as stack:
            stream: TextIO = sys.stdout
            if output is not None:
                temporary = stack.enter_context(complete_file(output))
                stream = stack.enter_context(temporary.open("w", encoding="utf-8"))
            stream.write(HEADER)
            for lines in answers(file, history, model, top=top, skipped=skipped):
                stream.write(lines)
    if skipped.items:
        items, users = _count(skipped.items, "item"), _count(skipped.users, "user")
        print(f"left out: {items} outside the catalogue, {users} with no other", file=sys.stderr)


@contextmanager
def rereadable(path: Path) -> Iterator[BinaryIO]:
    """The file opened; what can be read once alone, as a pipe, is copied to the disk first.

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
        if not words:
            continue
        if len(words) == 1:
            raise BadInput("history", f"{path}, line {number}", "a user and at least one item")
        yield number, words[0], words[1:]


def _check_known(file: BinaryIO, path: Path, model: ExportedRecommender) -> None:
    for number, _, items in read_histories(file, path):
        for item in items:
            if item not in model.numbers:
                allowed = (
                    f"an item of the {len(model.item_ids):,} in the catalogue, in"
                    f" {path}, line {number} (--skip-unknown leaves such items out)"
                )
                raise BadInput("history", item, allowed)


def answers(
    file: BinaryIO, path: Path, model: ExportedRecommender, *, top: int, skipped: Skipped
) -> Iterator[str]:
    """The lines of some users at a time, in the order of the file.

    Args:
        skipped: counts the items that the catalogue doesn't hold, and users with no other.
    """
    lines = read_histories(file, path)
    while part := list(islice(lines, USERS)):
        known = [[item for item in items if item in model.numbers] for _, _, items in part]
        skipped.items += sum(len(p[2]) - len(k) for p, k in zip(part, known, strict=True))
        skipped.users += sum(not items for items in known)
        asked = [place for place, items in enumerate(known) if items]
        found = model.recommend([known[place] for place in asked], top=top)
        yield "".join(
            _rows(part[place][1], answer) for place, answer in zip(asked, found, strict=True)
        )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rows(user: str, answer: Sequence[tuple[str, str | None, float]]) -> str:
    return "".join(
        f"{user}\t{rank}\t{_cell(item)}\t{score:.4f}\t{' '.join((title or '').split())}\n"
        for rank, (item, title, score) in enumerate(answer, start=1)
    )


def _cell(item: str) -> str:
    """An id as it is, but for what would end its column or line."""
    return item.translate({ord(c): " " for c in "\t\r\n"})
