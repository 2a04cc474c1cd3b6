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

# Common spellings by what they hold. Those between two bars are of equal standing, and preferred to
# the later ones: a review of a variant (asin) is meant for its product (parent_asin), but nothing
# says whether a listening log is about its tracks or its artists.
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
LABELS = {"label", "click", "isclick", "clicked"}  # 0 in these is no interaction
Wanted = Collection[str]
WANTED: Wanted = tuple(SPELLINGS)
# beside one of these, `title` is the review's and not the item's (Amazon 2023)
_OF_A_REVIEW = {"text", "reviewtext", "reviewbody", "summary", "helpfulvote"}

_TYPE = re.compile(r":(token|token_seq|float|float_seq)$")  # of RecBole's headers


def find_columns(
    names: Sequence[str], columns: Columns, *, source: Path, wanted: Wanted = WANTED
) -> dict[str, int]:
    """Places in ``names`` of what is ``wanted``, where it is there; a log needs users and items.

    Columns that ``columns`` names are taken, the others guessed from :data:`SPELLINGS`. Refused is
    a name that isn't there or is there twice, a header without user or item, two columns that are
    as likely, and one that would serve for two things. A title's may be in the items' file instead.
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
        # what was named for one thing isn't guessed for another
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


# How dates are written, but for ISO's way: the orders and marks that logs have, and times behind.
_DAYS = (
    *("%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%d.%m.%Y", "%Y.%m.%d", "%d-%m-%Y", "%m-%d-%Y"),
    *("%d/%m/%y", "%m/%d/%y", "%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", " %H:%M:%S.%f")
DATED = 100  # cells that are looked at
_PLAIN = re.compile(r"\d{4}-\d\d-\d\d([T ].*)?|(19[7-9]|2[01]\d)\d{5}(\d{6})?")
_SECONDS = re.compile(r"1\d{9}(\d{3})?(\.\d*)?")  # since 1970, or milliseconds: 2001 to 2033


def date_formats(values: Iterable[object]) -> list[str] | None:
    """How the dates of some cells are written: formats that all of them have, None for no dates.

    An empty list stands for dates that are read as they are: ISO's, numbers such as 20240531,
    seconds since 1970 in this century, and dates of Python's.
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
    """Whether a text is a time of that form, or of ISO's, in a log's years."""
    try:
        if form is not None:
            return 1970 <= datetime.strptime(text, form).year < 2200
        return 1970 <= datetime.fromisoformat(re.sub(r"\s*(UTC|GMT|z)$", "Z", text)).year < 2200
    except ValueError:
        return False


def column_map(
    names: Sequence[str], places: Mapping[str, int], cells: Callable[[int], Iterable[object]]
) -> ColumnMap:
    """What was read of a table with these columns, and which of the others hold dates.

    ``places`` are what :func:`find_columns` found, ``cells`` some values of a column by its place.
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
    """What tells of columns that may say which rows are interactions, unless they are named."""
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
    """The place of the column that a header of common spellings has for ``what``, or None."""
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
    """Where a column lies that is named as the header does, or without RecBole's type."""
    for spelled in (list(names), [untyped(one) for one in names]):
        if name in spelled:
            return spelled.index(name)
    return None


def refuse_columns(columns: Columns, why: str) -> None:
    """Refuse named columns, but for the title's, and a format, for a log that has none to name."""
    if columns.time_format is not None:
        raise BadInput("data.columns.time_format", columns.time_format, f"none for {why}")
    for what, name in replace(columns, title=None).given().items():
        raise BadInput(f"data.columns.{what}", name, f"none for {why}")


def missing(names: Sequence[str], name: str, source: Path) -> str:
    """What is allowed in place of a column's name, the one that was probably meant first."""
    close = difflib.get_close_matches(name, [untyped(one) for one in names], n=1)
    hint = f"did you mean {listed(close)}? " if close else ""
    return f"{hint}{source} has no such column; its columns are {listed(names)}"


def simple(name: str) -> str:
    """A column's name without case, ``_``, ``-``, blanks and RecBole's type: for comparisons."""
    return re.sub(r"[_\-\s]", "", untyped(name).lower())


def untyped(name: str) -> str:
    """A column's name without blanks around and without RecBole's type, as in ``age:token``."""
    return _TYPE.sub("", name.strip())


def listed(names: Iterable[str]) -> str:
    """The names in one line, cut where they are long or many."""
    texts = [" ".join(short(name, 40)[1:-1].split()) for name in names]
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
