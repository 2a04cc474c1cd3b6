"""`recommend`: the next items for each user of a file, from an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from depthprobe.cli.options import check_at_least, whole
from depthprobe.study import BadInput


def recommend(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that export wrote.")],
    history: Annotated[
        Path, typer.Option(metavar="FILE", help="A line a user: user item item ..., oldest first.")
    ],
    top: Annotated[
        int, typer.Option(metavar="K", parser=whole, help="How many items a user.")
    ] = 10,
) -> None:
    """Top-K items from an exported model.

    Tab-separated lines on standard output: user, rank, item, score, title.
    """
    check_at_least("top", top, 1)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise BadInput("dir", folder, "a folder that export wrote")
    users, histories = read_histories(history)

    from depthprobe.models.exported import load_recommender

    answers = load_recommender(folder).recommend(histories, top=top)
    print("user\trank\titem\tscore\ttitle")
    for user, items in zip(users, answers, strict=True):
        for rank, (item, title, score) in enumerate(items, start=1):
            print(f"{user}\t{rank}\t{item}\t{score:.4f}\t{' '.join((title or '').split())}")


def read_histories(path: Path) -> tuple[list[str], list[list[str]]]:
    """Users and their items from a file of ``user item item ...`` lines.

    Raises:
        BadInput: for a file that can't be read, is empty, or has a line with a user alone.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("history", path, f"a readable text file ({error})") from None
    users: list[str] = []
    histories: list[list[str]] = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        if len(words) == 1:
            raise BadInput("history", f"{path}, line {number}", "a user and at least one item")
        users.append(words[0])
        histories.append(words[1:])
    if not users:
        raise BadInput("history", path, "at least one line: user item item ...")
    return users, histories
