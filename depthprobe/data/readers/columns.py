"""Which columns of a table hold users, items, times, ratings and titles."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

from depthprobe.data.log import SHOWN, ColumnMap
from depthprobe.data.readers.streams import FIELD
from depthprobe.errors import BadInput, shell_line, short
from depthprobe.study import Columns

# Common spellings by content. Those between two bars are equal, and preferred to later ones: a
# review of a variant (asin) is about its product (parent_asin), but a listening log may be about
# its tracks or its artists.
_SPELLINGS = {
    "user": "user_id | user uid reviewer_id customer_id visitor_id | user_name",
    "item": "item_id | item iid | parent_asin | asin | product_id movie_id book_id business_id "
    "track_id song_id artist_id game_id app_id article_id news_id video_id anime_id recipe_id "
    "venue_id beer_id isbn sku",
    "time": "timestamp | unix_review_time unix_time unix_timestamp | time ts event_time "
    "| date_time created_at | date review_date event_date",
    "rating": "rating | overall stars star_rating ratings review_rating | score",
    "title": "item_title product_title movie_title book_title | title "
    "| item_name product_name movie_name",
}
SPELLINGS = {
    what: [standing.split() for standing in text.split("|")] for what, text in _SPELLINGS.items()
}
REQUIRED = ("user", "item")
LABELS = {"label", "click", "isclick", "clicked"}  # a 0 in these means no interaction
Wanted = Collection[str]
WANTED: Wanted = tuple(SPELLINGS)
# with one of these, `title` is the review's, not the item's (Amazon 2023)
_OF_A_REVIEW = {"text", "reviewtext", "reviewbody", "summary", "helpfulvote"}

_TYPE = re.compile(r":(token|token_seq|float|float_seq)$")  # types in RecBole's headers


def find_columns(
    names: Sequence[str], columns: Columns, *, source: Path, wanted: Wanted = WANTED
) -> dict[str, int]:
    """Indices in ``names`` of the ``wanted`` columns that exist; a log needs users and items.

    Columns named by ``columns`` are used; the others are guessed from :data:`SPELLINGS`. Refused: a
    name that is missing or there twice, a header without user or item, two equally likely columns,
    and one column for two purposes. The title may be in the items' file instead.
    """
    places: dict[str, int] = {}
    for what, name in columns.given().items():
        place = place_of(names, name)
        if place is None and what == "title":
            continue
        if place is None:
            raise BadInput(f"data.columns.{what}", name, missing(names, name, source), fault=True)
        if list(names).count(name) > 1:
            raise BadInput(
                f"data.columns.{what}", name, f"{source} has it more than once", fault=True
            )
        places[what] = place
    for what in [what for what in wanted if what not in columns.given()]:
        place = guess_column(names, what, source=source)
        if place is None and what in REQUIRED:
            allowed = (
                f"its columns are {listed(names)}, and none is known as the {what}'s; say "
                "--user-column and --item-column (numbers from 1 where there is no header)"
            )
            raise BadInput(FIELD, source, allowed, fault=True)
        # a column named for one purpose is not guessed for another
        if place is not None and (place not in places.values() or what in REQUIRED):
            places[what] = place
    for what, place in places.items():
        other = next(name for name, first in places.items() if first == place)
        if other != what:
            allowed = f"column {short(names[place], 40)} can't be both {other} and {what}"
            raise BadInput(
                FIELD, source, f"{allowed}; say --{other}-column and --{what}-column", fault=True
            )
    if columns.time_format is not None and "time" not in places:
        allowed = f"--time-column beside it, one of {listed(names)}"
        raise BadInput("data.columns.time_format", columns.time_format, allowed)
    return {what: place for what, place in places.items() if what in wanted}


# Formats of dates other than ISO: the orders and separators in logs, optionally with times.
_DAYS = (
    *("%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%d.%m.%Y", "%Y.%m.%d", "%d-%m-%Y", "%m-%d-%Y"),
    *("%d/%m/%y", "%m/%d/%y", "%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", " %H:%M:%S.%f")
DATED = 100  # cells to look at
_PLAIN = re.compile(r"\d{4}-\d\d-\d\d([T ].*)?|(19[7-9]|2[01]\d)\d{5}(\d{6})?")
_SECONDS = re.compile(r"1\d{9}(\d{3})?(\.\d*)?")  # since 1970, or milliseconds: 2001 to 2033


def date_formats(values: Iterable[object]) -> list[str] | None:
    """The date formats that fit all of some cells; None if they are no dates.

    An empty list means dates that need no format: ISO, numbers such as 20240531, seconds since 1970
    in this century, and Python's dates.
    """
    cells = [value for value in values if value is not None and str(value).strip()][:DATED]
    if cells and all(isinstance(value, date) for value in cells):
        return []
    texts = list(dict.fromkeys(" ".join(str(value).split()) for value in cells))
    if not texts or all(_SECONDS.fullmatch(text) for text in texts):
        return [] if texts else None
    if all(_PLAIN.fullmatch(text) for text in texts):
        return [] if all(_read(text, None) for text in texts) else None
    if not all(re.search(r"\d.*[/. -].*\d", text) for text in texts):
        return None
    every = [day + clock for clock in _CLOCKS for day in _DAYS]
    return [form for form in every if all(_read(text, form) for text in texts)] or None


def _read(text: str, form: str | None) -> bool:
    """Whether a text is a time of this format, or ISO, in plausible years."""
    try:
        if form is not None:
            return 1970 <= datetime.strptime(text, form).year < 2200
        return 1970 <= datetime.fromisoformat(re.sub(r"\s*(UTC|GMT|z)$", "Z", text)).year < 2200
    except ValueError:
        return False


def column_map(
    names: Sequence[str], places: Mapping[str, int], cells: Callable[[int], Iterable[object]]
) -> ColumnMap:
    """The columns that were read, and which of the others hold dates.

    ``places`` is the result of :func:`find_columns`, ``cells`` gives some values of a column.
    """
    ignored = {}
    for place, name in enumerate(names):
        if place in places.values():
            continue
        forms = date_formats(cells(place))
        flags = "" if forms is None else f"--time-column {shell_line([untyped(name)])}"
        if forms:
            flags += f" --time-format {' or '.join(shell_line([form]) for form in forms)}"
        ignored[" ".join(short(untyped(name), 40)[1:-1].split())] = flags
    read = {what: untyped(names[place]) for what, place in places.items()}
    return ColumnMap(read, ignored)


def label_notes(names: Sequence[str], columns: Columns) -> list[str]:
    """A note about unnamed columns that may say which rows are interactions."""
    plain = {untyped(name) for name in names if simple(name) in LABELS}
    return [
        f"the column {name} is not read: if its 0 marks what is no interaction, say "
        f"--rating-column {name} --min-rating 1"
        for name in sorted(plain - {untyped(name) for name in columns.given().values()})
    ]


def guess_column(
    names: Sequence[str],
    what: str,
    *,
    source: Path,
    spellings: Mapping[str, Sequence[Sequence[str]]] = SPELLINGS,
    advice: str = "say --{}-column",
) -> int | None:
    """The index of the column for ``what`` in a header of common spellings, or None."""
    spelled = [simple(name) for name in names]
    for standing in spellings[what]:
        known = {simple(name) for name in standing}
        if "title" in known and _OF_A_REVIEW & set(spelled):
            continue
        places = [place for place, name in enumerate(spelled) if name in known]
        if len(places) > 1:
            likely = listed([names[place] for place in places])
            allowed = f"any of its columns {likely} may be the {what}'s; {advice.format(what)}"
            raise BadInput(FIELD, source, allowed, fault=True)
        if places:
            return places[0]
    return None


def place_of(names: Sequence[str], name: str) -> int | None:
    """The index of a column, named as in the header or without RecBole's type."""
    for spelled in (list(names), [untyped(one) for one in names]):
        if name in spelled:
            return spelled.index(name)
    return None


def refuse_columns(columns: Columns, why: str) -> None:
    """Refuse named columns (except the title's) and a format for a log without columns."""
    if columns.time_format is not None:
        raise BadInput("data.columns.time_format", columns.time_format, f"none for {why}")
    for what, name in replace(columns, title=None).given().items():
        raise BadInput(f"data.columns.{what}", name, f"none for {why}")


def missing(names: Sequence[str], name: str, source: Path) -> str:
    """The allowed column names, the one that was probably meant first."""
    close = difflib.get_close_matches(name, [untyped(one) for one in names], n=1)
    hint = f"did you mean {listed(close)}? " if close else ""
    return f"{hint}{source} has no such column; its columns are {listed(names)}"


def simple(name: str) -> str:
    """A column's name for comparisons: without case, ``_``, ``-``, blanks and RecBole's type."""
    return re.sub(r"[_\-\s]", "", untyped(name).lower())


def untyped(name: str) -> str:
    """A column's name without blanks around and without RecBole's type, as in ``age:token``."""
    return _TYPE.sub("", name.strip())


def listed(names: Iterable[str]) -> str:
    """The names in one line, shortened if they are long or many."""
    texts = [" ".join(short(name, 40)[1:-1].split()) for name in names]
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
