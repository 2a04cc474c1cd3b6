"""Public sets: the table, and obtaining one from a server on loopback or from what lies there."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from zipfile import ZipFile

import pytest

from depthprobe.data import public
from depthprobe.data import public as download
from depthprobe.data.public import PublicSet, cache_folder, is_public, obtain, public_set
from depthprobe.errors import BadInput

RATINGS, MOVIES = b"1::10::5::978300760\n", b"10::Toy Story (1995)::Comedy\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEPTHPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSE", 0)
    return tmp_path / "cache" / "datasets"


@pytest.fixture
def asked() -> list[str]:
    """The requests that reached the server."""
    return []


@pytest.fixture
def serve(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, dict[str, bytes]], PublicSet]]:
    """Point a set's entry at a server that has these files."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_: object) -> None:
            asked.append(self.path.lstrip("/"))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def point(name: str, files: dict[str, bytes]) -> PublicSet:
            for file, content in files.items():
                (folder / file).write_bytes(content)
            entry = public.SETS[name]
            port = http.server_address[1]
            there = []
            for file in entry.files:
                content = files.get(file.name, b"")
                sha256 = f"sha256:{hashlib.sha256(content).hexdigest()}"
                known = {"size": len(content), "checksum": sha256} if file.checksum else {}
                there.append(replace(file, url=f"http://127.0.0.1:{port}/{file.name}", **known))
            moved = replace(entry, files=tuple(there))
            monkeypatch.setitem(public.SETS, name, moved)
            return moved

        yield point
        http.shutdown()
        thread.join()


def archive(folder: Path, members: dict[str, bytes]) -> bytes:
    path = folder / "made.zip"
    with ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path.read_bytes()


def movielens(folder: Path, **more: bytes) -> bytes:
    members = {"ml-1m/ratings.dat": RATINGS, "ml-1m/movies.dat": MOVIES, "ml-1m/README": b"read"}
    return archive(folder, members | more)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


Serve = Callable[[str, dict[str, bytes]], PublicSet]


def test_a_zip_gives_its_named_members(
    serve: Serve, cache: Path, tmp_path: Path, asked: list[str]
) -> None:
    serve("ml-1m", {"ml-1m.zip": movielens(tmp_path)})
    said: list[str] = []
    folder = obtain("ml-1m", say=said.append)
    assert folder == cache / "ml-1m"
    assert content(folder) == {"ratings.dat": RATINGS, "movies.dat": MOVIES}
    assert "for research" in said[0]
    assert re.fullmatch(r"fetching http://\S+/ml-1m\.zip, 0\.0 MB", said[1])
    assert len(said) == 2
    assert obtain("ml-1m", say=said.append) == folder
    assert (asked, len(said)) == (["ml-1m.zip"], 2)  # neither fetched nor said again


def test_reviews_and_metadata_lie_side_by_side(
    serve: Serve, cache: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"reviews_Beauty_5.json.gz": b"reviews", "meta_Beauty.json.gz": b"titles"}
    serve("amazon-2014:Beauty", files)
    folder = obtain("amazon-2014:Beauty")
    assert folder == cache / "amazon-2014" / "Beauty"
    assert content(folder) == files
    assert asked == list(files)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("amazon-2014:Beauty: no licence is given;")


def test_what_lacks_is_fetched_and_no_more(serve: Serve, cache: Path, asked: list[str]) -> None:
    files = {"Video_Games.csv.gz": b"ratings", "meta_Video_Games.jsonl.gz": b"titles"}
    serve("amazon-2023:Video_Games", files)
    folder = cache / "amazon-2023" / "Video_Games"
    folder.mkdir(parents=True)
    (folder / "Video_Games.csv.gz").write_bytes(b"by hand")  # no checksum is published
    (folder / ".tmp-killed").touch()
    obtain("amazon-2023:Video_Games", say=lambda _: None)
    assert content(folder) == files | {"Video_Games.csv.gz": b"by hand"}
    assert asked == ["meta_Video_Games.jsonl.gz"]


def test_an_archive_put_there_by_hand_is_taken(
    serve: Serve, cache: Path, tmp_path: Path, asked: list[str]
) -> None:
    published = movielens(tmp_path)
    serve("ml-1m", {"ml-1m.zip": published})
    (tmp_path / "server" / "ml-1m.zip").unlink()
    with pytest.raises(BadInput, match="HTTP 404 File not found") as caught:
        obtain("ml-1m", say=lambda _: None)
    told = re.search(r"download it by hand to (\S+) and run again", str(caught.value))
    assert told is not None
    assert asked == ["ml-1m.zip"]
    Path(told[1]).write_bytes(published[:-1])
    with pytest.raises(BadInput, match="are published; delete"):
        obtain("ml-1m", say=lambda _: None)
    Path(told[1]).write_bytes(published)
    assert content(obtain("ml-1m", say=lambda _: None)) == {
        "ratings.dat": RATINGS,
        "movies.dat": MOVIES,
    }
    assert asked == ["ml-1m.zip"]


def test_evil_member_names_go_nowhere(serve: Serve, tmp_path: Path) -> None:
    evil = {
        "../evil": b"x",
        "/tmp/evil": b"x",  # noqa: S108
        "ml-1m/../../ratings.dat": b"x",
        "ratings.dat": b"x",
        "ml-1m/ratings.dat/../../evil": b"x",
    }
    serve("ml-1m", {"ml-1m.zip": movielens(tmp_path, **evil)})
    before = content(tmp_path)
    folder = obtain("ml-1m", say=lambda _: None)
    assert content(folder) == {"ratings.dat": RATINGS, "movies.dat": MOVIES}
    new = set(content(tmp_path)) - set(before)
    datasets = folder.parent.relative_to(tmp_path)
    lie = ("ml-1m.lock", "ml-1m.zip", "ml-1m/movies.dat", "ml-1m/ratings.dat")
    assert new == {str(datasets / name) for name in lie}


@pytest.mark.parametrize("what", ["a member lacks", "no zip", "a member is damaged"])
def test_an_archive_that_can_not_be_used(serve: Serve, tmp_path: Path, what: str) -> None:
    whole = movielens(tmp_path)
    served = {
        "a member lacks": archive(tmp_path, {"ml-1m/ratings.dat": RATINGS}),
        "no zip": b"<html>sign in</html>",
        "a member is damaged": whole.replace(RATINGS, RATINGS[::-1]),
    }[what]
    serve("ml-1m", {"ml-1m.zip": served})
    with pytest.raises(BadInput, match=r"a zip with ml-1m/ratings\.dat, ml-1m/movies\.dat \("):
        obtain("ml-1m", say=lambda _: None)


def test_two_at_once_fetch_once(serve: Serve, tmp_path: Path, asked: list[str]) -> None:
    serve("ml-1m", {"ml-1m.zip": movielens(tmp_path)})
    start, got, said = threading.Barrier(4), [], []

    def run() -> None:
        start.wait()
        got.append(content(obtain("ml-1m", say=said.append)))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [{"ratings.dat": RATINGS, "movies.dat": MOVIES}] * 4
    assert asked == ["ml-1m.zip"]
    assert len([line for line in said if line.startswith("ml-1m: ")]) == 1


def test_who_waits_is_told(cache: Path, serve: Serve, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    serve("ml-1m", {"ml-1m.zip": movielens(tmp_path)})
    cache.mkdir(parents=True)
    with (cache / "ml-1m.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        told = threading.Event()
        thread = threading.Thread(
            target=obtain, args=("ml-1m",), kwargs={"say": lambda _: told.set()}
        )
        thread.start()
        assert told.wait(5)
        assert not (cache / "ml-1m.zip").exists()
    thread.join()
    assert (cache / "ml-1m" / "ratings.dat").exists()


def test_a_terminal_sees_every_tenth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    said: list[str] = []
    report = public._progress("https://x/y", said.append)
    for done in (0, 50_000, 150_000, 160_000, 120_000, 550_000, 1_000_000):  # once cut, begun again
        report(done, 1_000_000)
    assert said == ["fetching https://x/y, 1.0 MB", "  10 %", "  50 %", "  100 %"]


def test_what_is_there_already_is_said() -> None:
    said: list[str] = []
    report = public._progress("https://x/y", said.append)
    report(300_000, None)
    report(900_000, None)
    assert said == ["fetching https://x/y, 0.3 MB are here"]


def test_a_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEPTHPROBE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="^DEPTHPROBE_CACHE: .* a folder that can be written"):
        obtain("ml-1m", say=lambda _: None)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEPTHPROBE_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("DEPTHPROBE_CACHE", "")
    assert cache_folder() == tmp_path / "xdg" / "depthprobe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "depthprobe"
    monkeypatch.setenv("DEPTHPROBE_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "home" / "elsewhere"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "amazon-2014:Beuty",
            "for the category, did you mean Beauty? one of Amazon_Instant_Video,",
        ),
        ("amazon-2018:Video Games", "for the category, did you mean Video_Games? one of AMAZON_"),
        ("amazon-2023:Gift_Crads", "for the category, did you mean Gift_Cards? one of All_Beauty,"),
        ("amazon-2023", "for the category, one of All_Beauty,"),
        ("ml-2m", "one of ml-100k, ml-1m, ml-10m, ml-20m, ml-25m, ml-32m, amazon-2014:CATEGORY,"),
        ("ml-1m:x", "did you mean ml-1m? one of"),
    ],
)
def test_a_name_that_is_wrong(name: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        public_set(name)
    assert str(caught.value).startswith(f"data.source: {name!r} is not usable; ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_and_paths_are_told_apart() -> None:
    names = ["ml-100k", "ml-32m", "amazon-2014:Beauty", "amazon-2018", "amazon-2023:Misspelt"]
    paths = ["embedded", "ml-1m/ratings.dat", "./ml-1m", "amazon-beauty", "C:/data", "ml-1m.zip"]
    assert [is_public(name) for name in names + paths] == [True] * 5 + [False] * 6


@pytest.mark.parametrize("entry", public.public_sets(), ids=lambda entry: entry.name)
def test_an_entry_of_the_table_is_well_formed(entry: PublicSet) -> None:
    assert public_set(entry.name) is entry
    assert entry.about
    assert entry.terms
    assert urlsplit(entry.citation).scheme == "https"
    gives = [name for file in entry.files for name in file.gives]
    assert len(set(gives)) == len(gives) == 2  # the interactions, and the items' titles
    for file in entry.files:
        assert re.fullmatch(r"https://[\w.]+/[\w./-]+\.(zip|json\.gz|jsonl\.gz|csv\.gz)", file.url)
        assert bool(file.members) == (file.name == f"{entry.name}.zip")
        # an archive has its size and checksum pinned; nothing is published of the other files
        digest = re.compile(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}")
        assert bool(file.members) == bool(digest.fullmatch(file.checksum or ""))
        assert bool(file.members) == (file.size is not None)


def test_the_table_has_what_is_published() -> None:
    families = [entry.family for entry in public.public_sets()]
    count = {family: families.count(family) for family in families if "amazon" in family}
    assert count == {"amazon-2014": 24, "amazon-2018": 29, "amazon-2023": 28}


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, depthprobe.data.public; "
        "print({'numpy', 'pandas', 'pyarrow', 'torch'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
