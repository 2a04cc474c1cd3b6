"""Public sets: the table, and fetching one from a server on loopback or from what lies there."""

from __future__ import annotations

import hashlib
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest

from depthprobe.data import public
from depthprobe.data.public import PublicSet, cache_folder, fetch, is_public, public_set
from depthprobe.errors import BadInput

RATINGS, MOVIES = b"1::10::5::978300760\n", b"10::Toy Story (1995)::Comedy\n"
READ = {"ratings.dat": RATINGS, "movies.dat": MOVIES}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEPTHPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(public, "RETRIES", 0)
    return tmp_path / "cache" / "datasets"


class Server(SimpleHTTPRequestHandler):
    """Serves a folder, keeps the names that were requested, cuts the first ``cuts`` answers."""

    requested: list[str] = []
    cuts = 0

    def do_GET(self) -> None:
        type(self).requested.append(self.path.lstrip("/"))
        if type(self).cuts:
            type(self).cuts -= 1
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"too few")
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


Serve = Callable[[str, dict[str, bytes]], PublicSet]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Point a set's entry at a server that has these files."""
    folder = tmp_path / "server"
    folder.mkdir()
    Server.requested, Server.cuts = [], 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=folder)) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def point(name: str, files: dict[str, bytes]) -> PublicSet:
            for file, content in files.items():
                (folder / file).write_bytes(content)
            there = []
            for file in public.SETS[name].files:
                sha256 = f"sha256:{hashlib.sha256(files.get(file.name, b'')).hexdigest()}"
                url = f"http://127.0.0.1:{http.server_address[1]}/{file.name}"
                there.append(replace(file, url=url, checksum=file.checksum and sha256))
            moved = replace(public.SETS[name], files=tuple(there))
            monkeypatch.setitem(public.SETS, name, moved)
            return moved

        yield point
        http.shutdown()
        thread.join()


def archive(folder: Path, members: dict[str, bytes]) -> bytes:
    with ZipFile(folder / "made.zip", "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return (folder / "made.zip").read_bytes()


def movielens(folder: Path, **more: bytes) -> bytes:
    members = {"ml-1m/ratings.dat": RATINGS, "ml-1m/movies.dat": MOVIES, "ml-1m/README": b"read"}
    return archive(folder, members | more)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(name: str) -> str:
    with pytest.raises(BadInput) as caught:
        fetch(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_zip_gives_its_named_members(
    serve: Serve, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serve("ml-1m", {"ml-1m.zip": movielens(tmp_path)})
    folder = fetch("ml-1m")
    assert folder == cache / "ml-1m"
    assert content(folder) == READ
    terms, fetching = caplog.messages
    assert "for research" in terms
    assert re.match(r"fetching http://\S+/ml-1m\.zip to ", fetching)
    assert fetch("ml-1m") == folder  # neither fetched nor logged again
    assert (Server.requested, len(caplog.messages)) == (["ml-1m.zip"], 2)


def test_only_missing_files_are_fetched(
    serve: Serve, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"Video_Games.csv.gz": b"ratings", "meta_Video_Games.jsonl.gz": b"titles"}
    serve("amazon-2023:Video_Games", files)
    folder = cache / "amazon-2023" / "Video_Games"
    folder.mkdir(parents=True)
    (folder / "Video_Games.csv.gz").write_bytes(b"by hand")  # no checksum is published
    (folder / ".tmp-killed").touch()
    assert fetch("amazon-2023:Video_Games") == folder
    assert content(folder) == files | {"Video_Games.csv.gz": b"by hand"}
    assert Server.requested == ["meta_Video_Games.jsonl.gz"]
    assert capsys.readouterr().out == ""


def test_an_archive_put_there_by_hand_is_verified_and_used(
    serve: Serve, cache: Path, tmp_path: Path
) -> None:
    published = movielens(tmp_path)
    serve("ml-1m", {"ml-1m.zip": published})
    (tmp_path / "server" / "ml-1m.zip").unlink()
    message = refusal("ml-1m")
    assert "404" in message
    place = re.search(r"download it by hand to (\S+) and run again", message)
    assert place is not None
    Path(place[1]).write_bytes(published[:-1])
    assert f"{place[1]} is not the published file" in refusal("ml-1m")
    assert Path(place[1]).read_bytes() == published[:-1]  # it is not thrown away
    requests = len(Server.requested)
    Path(place[1]).write_bytes(published)
    assert content(fetch("ml-1m")) == READ
    assert len(Server.requested) == requests


def test_another_file_than_the_published_one_is_refused(
    serve: Serve, cache: Path, tmp_path: Path
) -> None:
    serve("ml-1m", {"ml-1m.zip": movielens(tmp_path)})
    (tmp_path / "server" / "ml-1m.zip").write_bytes(b"<html>sign in</html>")
    assert "does not match the known hash" in refusal("ml-1m")
    assert sorted(content(cache)) == ["ml-1m.lock"]


@pytest.mark.parametrize("retries", [0, 1])
def test_a_cut_download_is_tried_again_and_never_read_in_part(
    serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    """Also where no checksum is published, as for Amazon's files."""
    monkeypatch.setattr(public, "RETRIES", retries)
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)
    files = {"reviews_Beauty_5.json.gz": b"reviews" * 99, "meta_Beauty.json.gz": b"titles"}
    serve("amazon-2014:Beauty", files)
    Server.cuts = 1
    if retries:
        assert content(fetch("amazon-2014:Beauty")) == files
    else:
        assert "reviews_Beauty_5.json.gz could not be fetched" in refusal("amazon-2014:Beauty")
        assert sorted(content(cache)) == ["amazon-2014/Beauty.lock"]


def test_a_full_disk(serve: Serve, cache: Path) -> None:
    files = {"reviews_Beauty_5.json.gz": b"reviews" * 9999, "meta_Beauty.json.gz": b"titles"}
    serve("amazon-2014:Beauty", files)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a quota, whatever the disk
    try:
        assert "could not be fetched ([Errno 27] File too large" in refusal("amazon-2014:Beauty")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(fetch("amazon-2014:Beauty")) == files


def test_member_names_with_dots_go_nowhere(serve: Serve, tmp_path: Path) -> None:
    evil = ("../evil", "/tmp/evil", "ml-1m/../../ratings.dat", "ratings.dat")  # noqa: S108
    serve("ml-1m", {"ml-1m.zip": movielens(tmp_path, **dict.fromkeys(evil, b"x"))})
    before = content(tmp_path)
    folder = fetch("ml-1m")
    assert content(folder) == READ
    datasets = folder.parent.relative_to(tmp_path)
    lie = ("ml-1m.lock", "ml-1m.zip", "ml-1m/movies.dat", "ml-1m/ratings.dat")
    assert set(content(tmp_path)) - set(before) == {str(datasets / name) for name in lie}


@pytest.mark.parametrize("what", ["a member is missing", "no zip", "a member is damaged"])
def test_an_archive_that_can_not_be_unpacked(serve: Serve, tmp_path: Path, what: str) -> None:
    served = {
        "a member is missing": archive(tmp_path, {"ml-1m/ratings.dat": RATINGS}),
        "no zip": b"<html>sign in</html>",
        "a member is damaged": movielens(tmp_path).replace(RATINGS, RATINGS[::-1]),
    }[what]
    serve("ml-1m", {"ml-1m.zip": served})
    assert "a zip with ml-1m/ratings.dat, ml-1m/movies.dat (" in refusal("ml-1m")


def test_two_at_once_fetch_once(serve: Serve, tmp_path: Path) -> None:
    serve("ml-1m", {"ml-1m.zip": movielens(tmp_path)})
    start, got = threading.Barrier(4), []

    def run() -> None:
        start.wait()
        got.append(content(fetch("ml-1m")))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [READ] * 4
    assert Server.requested == ["ml-1m.zip"]


def test_a_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEPTHPROBE_CACHE", str(tmp_path / "file"))
    assert re.match("DEPTHPROBE_CACHE: .* a folder that can be written", refusal("ml-1m"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("DEPTHPROBE_CACHE", "")
    assert cache_folder() == tmp_path / "xdg" / "depthprobe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "depthprobe"
    monkeypatch.setenv("DEPTHPROBE_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "home" / "elsewhere"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("amazon-2014:Beuty", "(did you mean amazon-2014:Beauty?)"),
        (
            "amazon-2018:Video Games",
            "(did you mean amazon-2018:Video_Games?)",
        ),
        ("amazon-2023", "(did you mean amazon-2023:All_Beauty?)"),
        ("ml-2m", "one of ml-100k, ml-1m, ml-10m, ml-20m, ml-25m, ml-32m, amazon-2014:CATEGORY,"),
        ("ml-1m:x", "(did you mean ml-1m?)"),
    ],
)
def test_a_wrong_name(name: str, message: str) -> None:
    assert refusal(name).startswith("data.source: expected one of ")
    assert refusal(name).endswith(f", got {name!r}")
    assert message in refusal(name)


def test_names_and_paths_are_told_apart() -> None:
    names = ["ml-100k", "ml-32m", "amazon-2014:Beauty", "amazon-2018", "amazon-2023:Misspelt"]
    paths = ["embedded", "ml-1m/ratings.dat", "./ml-1m", "amazon-beauty", "C:/data", "ml-1m.zip"]
    assert [is_public(name) for name in names + paths] == [True] * 5 + [False] * 6


def test_the_table() -> None:
    digest = re.compile(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}")
    for entry in public.SETS.values():
        assert public_set(entry.name) is entry
        assert entry.about
        assert entry.terms
        names = [name for file in entry.files for name in file.contents]
        assert len(set(names)) == len(names) == 2  # the interactions, and the items' titles
        for file in entry.files:
            end = r"\.(zip|json\.gz|jsonl\.gz|csv\.gz)"
            assert re.fullmatch(rf"https://[\w.]+/[\w./-]+{end}", file.url)
            assert bool(file.members) == (file.name == f"{entry.name}.zip")
            # an archive has its checksum pinned; nothing is published of the other files
            assert bool(file.members) == bool(digest.fullmatch(file.checksum or ""))
            assert bool(file.members) == (file.size is not None)
    families = [entry.family for entry in public.SETS.values()]
    count = {family: families.count(family) for family in families if "amazon" in family}
    assert count == {"amazon-2014": 24, "amazon-2018": 29, "amazon-2023": 28}


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = "{'numpy', 'pandas', 'pooch', 'pyarrow', 'requests', 'torch'}"
    code = f"import sys, depthprobe.data.public; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
