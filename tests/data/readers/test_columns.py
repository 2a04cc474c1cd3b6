from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from depthprobe.data.readers.columns import (
    SPELLINGS,
    column_map,
    date_formats,
    find_columns,
    guess_column,
    simple,
)
from depthprobe.errors import BadInput
from depthprobe.study import Columns

SOURCE = Path("log.csv")


def found(header: str, **given: str) -> dict[str, str]:
    names = header.split(",")
    places = find_columns(names, Columns(**given), source=SOURCE)
    return {what: names[place] for what, place in places.items()}


def refusal(header: str, **given: str) -> str:
    with pytest.raises(BadInput) as caught:
        found(header, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("userId,movieId,rating,timestamp", "userId movieId timestamp rating"),
        ("USER ID,Item-Id", "USER ID,Item-Id"),
        (
            "user_id:token,item_id:token,rating:float,timestamp:float",
            "user_id:token item_id:token timestamp:float rating:float",
        ),
        (
            "overall,verified,reviewTime,reviewerID,asin,reviewText,summary,unixReviewTime",
            "reviewerID asin unixReviewTime overall",
        ),
        (  # the title is the review's
            "rating,title,text,images,asin,parent_asin,user_id,timestamp,helpful_vote",
            "user_id parent_asin timestamp rating",
        ),
        (
            "customer_id,product_id,product_title,star_rating,review_body,review_date",
            "customer_id product_id review_date star_rating product_title",
        ),
        ("review_id,user_id,business_id,stars,date,text", "user_id business_id date stars"),
        (",user,item,time,title", "user item time title"),
        ("timestamp,date,uid,iid", "uid iid timestamp"),
    ],
)
def test_public_headers(header: str, expected: str) -> None:
    places = found(header)
    split = expected.split("," if "," in expected else " ")
    assert [places[what] for what in SPELLINGS if what in places] == split


@pytest.mark.parametrize("what", SPELLINGS)
def test_spellings(what: str) -> None:
    for name in (name for standing in SPELLINGS[what] for name in standing):
        spellings = name.upper(), name.replace("_", "-"), name.replace("_", ""), f" {name} "
        for spelled in spellings:
            assert guess_column(["x", spelled, "y"], what, source=SOURCE) == 1
        assert simple(f"{name}:token_seq") == simple(name)
        assert simple(f"{name}:other") != simple(name)


def test_named_columns_come_first() -> None:
    header = "user_id,session,item_id,sku,ts,score"
    assert found(header, user="session", item="sku", time="score") == {
        "user": "session",
        "item": "sku",
        "time": "score",  # which then is not the rating
    }
    assert found("user_id:token,item_id:token", user="user_id")["user"] == "user_id:token"
    assert found("user_id:token,item_id:token", user="user_id:token")["item"] == "item_id:token"


def test_a_missing_column_shows_the_nearest() -> None:
    message = refusal("user_id,item_id,when", time="wehn")
    assert message.startswith("data.columns.time: 'wehn': ")
    assert "did you mean when?" in message
    wide = ",".join(["user_id", "item_id", *(f"x{n}" for n in range(500)), "moment"])
    message = refusal(wide, time="momnt")
    assert "did you mean moment?" in message
    assert len(message) < 400


def test_an_unknown_header_is_listed() -> None:
    message = refusal("Benutzer,Artikel,Zeit")
    assert "Benutzer, Artikel, Zeit" in message
    assert "--user-column" in message
    assert "--item-column" in message
    assert "the item's" in refusal("user,Artikel\nNummer")
    assert len(refusal(",".join("spalte" * 9 + str(n) for n in range(500)))) < 1500


@pytest.mark.parametrize(
    ("header", "flag"),
    [
        ("user_id,track_id,artist_id", "--item-column"),
        ("user_id,userId:token,user", "--user-column"),
        ("user_id,user_id,item", "--user-column"),
        ("user_id,item_id,rating,rating", "--rating-column"),
    ],
)
def test_columns_of_equal_standing(header: str, flag: str) -> None:
    assert flag in refusal(header)


def test_a_column_serves_one_thing() -> None:
    assert "both" in refusal("user_id,item_id", user="item_id")
    assert "both" in refusal("a,b,c", user="a", item="b", time="b")
    assert "more than once" in refusal("a,a,b", user="a", item="b")


@pytest.mark.parametrize(
    ("values", "forms"),
    [
        (["2024-05-31", "2024-06-01T10:00:00Z", "2024-06-01 10:00:00 UTC", "", None], []),
        ([20240531, 20240601], []),
        ([1714500000, 1714500001.5], []),
        (["1714500000123"], []),
        ([date(2024, 5, 31)], []),
        (["31/05/2024", "01/06/2024"], ["%d/%m/%Y"]),
        (["05/06/2024", "01/06/2024"], ["%d/%m/%Y", "%m/%d/%Y"]),  # who could tell?
        (["May 3, 2024 10:05 PM"], ["%b %d, %Y %I:%M %p", "%B %d, %Y %I:%M %p"]),
        (["3-May-2024"], ["%d-%b-%Y"]),
        ([20241331, 20240601], None),  # no month 13
        (["2024-05-31", "soon"], None),
        ([1, 2, 3], None),
        (["4.5", "3.0"], None),
        (["1.2.3", "2.0.1"], None),
        ([2024, 2023], None),
        ([["2024-05-31"]], None),
        ([True], None),
        ([], None),
    ],
)
def test_dates_and_how_they_are_written(values: list[object], forms: list[str] | None) -> None:
    assert date_formats(values) == forms


def test_what_was_read_of_a_table() -> None:
    names = ["shopper:token", "when", "product_code", "day of", "qty"]
    cells = [["a"], ["2024-05-31"], ["x"], ["05/06/2024"], ["2"]]
    places = {"user": 0, "item": 2}
    taken = column_map(names, places, cells.__getitem__)
    assert taken.read == {"user": "shopper", "item": "product_code"}
    day = "--time-column 'day of' --time-format %d/%m/%Y or %m/%d/%Y"
    assert taken.ignored == {"when": "--time-column when", "day of": day, "qty": ""}
    assert [note.partition(" looks")[0] for note in taken.notes()] == [
        "the column when",
        "the column day of",
    ]
    with_time = column_map(names, {**places, "time": 1}, cells.__getitem__)
    assert with_time.notes() == []  # one was chosen; the line of the mapping names the other
    assert str(with_time).endswith(f"time = when, ignored: day of (dates: {day}), qty")
    wide = column_map([f"c{n}" for n in range(25)], {"user": 0, "item": 1}, lambda place: ())
    assert str(wide).endswith("c21, ... (3 more)")
