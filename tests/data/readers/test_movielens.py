from __future__ import annotations

from pathlib import Path

import pytest

from depthprobe.data.readers.formats import is_movielens, read_log, read_movielens
from depthprobe.errors import BadInput
from depthprobe.study import Columns

# as the three generations of MovieLens write the same four ratings
ROWS = [(7, 10, "3.5", 900000200), (7, 2, "4", 900000100), (8, 10, "1", 900000300)]
COLONS = "".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in ROWS)
TABS = "".join(f"{u}\t{i}\t{r[0]}\t{t}\n" for u, i, r, t in ROWS)
HEADER = "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in ROWS)


def write(folder: Path, text: str, name: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def check(folder: Path, *, halves: bool) -> dict[str, str]:
    """Read a folder of these ratings, and give its titles."""
    log = read_log(folder)
    assert [log.users.names[code] for code in log.users.codes] == ["7", "7", "8"]
    assert [log.items.names[code] for code in log.items.codes] == ["10", "2", "10"]
    assert log.ratings is not None
    assert log.ratings.tolist() == [3.5 if halves else 3.0, 4.0, 1.0]
    assert log.times is not None
    assert log.times.dtype == "int64"
    assert log.times.tolist() == [900000200, 900000100, 900000300]
    assert log.name == folder.name
    return log.titles


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1"])
def test_reads_ratings_dat(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, COLONS, "ratings.dat")
    write(
        tmp_path,
        "2::Amélie (2001)::Comedy\n3::No::X\n10::Ran (1985)::War\n",
        "movies.dat",
        encoding,
    )
    write(tmp_path, "7::F::1::10::48067\n", "users.dat")
    assert check(tmp_path, halves=True) == {"2": "Amélie (2001)", "10": "Ran (1985)"}


def test_reads_u_data(tmp_path: Path) -> None:
    write(tmp_path, TABS, "u.data")
    films = "2|Amélie (2001)|01-Jan-2001||http://a|0|1\n10|Ran (1985)|01-Jan-1985||http://b|1|0\n"
    write(tmp_path, films, "u.item", "iso-8859-1")
    write(tmp_path, TABS, "u1.base")
    write(tmp_path, "7|24|M|technician|85711\n", "u.user")
    write(tmp_path, "These are ratings.\n", "README")
    assert check(tmp_path, halves=False) == {"2": "Amélie (2001)", "10": "Ran (1985)"}


def test_reads_ratings_csv(tmp_path: Path) -> None:
    write(tmp_path, HEADER, "ratings.csv")
    films = 'movieId,title,genres\n2,"Amélie, or ""A"" (2001)",Comedy\n10,Ran (1985),War\n'
    write(tmp_path, films, "movies.csv")
    write(tmp_path, "userId,movieId,tag,timestamp\n7,10,x,1\n", "tags.csv")
    write(tmp_path, "movieId,imdbId,tmdbId\n2,3,4\n", "links.csv")
    assert check(tmp_path, halves=True) == {"2": 'Amélie, or "A" (2001)', "10": "Ran (1985)"}


def test_recognises_its_three_files_alone() -> None:
    assert all(map(is_movielens, (COLONS, TABS, HEADER, COLONS.replace("\n", "\r\n"))))
    assert not is_movielens("1\t2\t3\t4\n")  # items of user 1
    assert not is_movielens("2::Toy Story (1995)::Comedy\n")
    assert not is_movielens("user,item,rating,timestamp\n")
    assert not is_movielens("")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (COLONS + "8::11::5\n", "line 4 has 5; expected 7 columns"),
        (COLONS + "8::::5::900000000\n", "line 4 has no item"),
        (COLONS + "8::11::five::900000000\n", "line 4 has the rating 'five'"),
        (TABS + "8\t11\t5\tnever\n", "line 4 has the time 'never'"),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text, "ratings.dat")
    with pytest.raises(BadInput) as caught:
        read_log(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_by_place_take_no_names(tmp_path: Path) -> None:
    path = write(tmp_path, TABS, "u.data")
    with pytest.raises(BadInput, match=r"data\.columns\.user: '2'.*has no header"):
        read_movielens(path, Columns(user="2"))
