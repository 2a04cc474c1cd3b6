"""A file from an http address: resumed where it was cut, verified, whole or not there."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from zipfile import BadZipFile, ZipFile

from depthprobe import __version__
from depthprobe.errors import BadInput, nearest
from depthprobe.files import complete_file, remove_leftovers

ATTEMPTS = 5  # in one call, for a connection that is cut or a server that is busy
PAUSE = 1.0  # seconds before the second attempt, twice as long before each further one
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20  # bytes

_SPAN = re.compile(r"bytes (\d+)-\d+/(\d+)")


class _RefusedError(Exception):
    """The address gives nothing usable; trying again is of no use."""


class _CutError(Exception):
    """The server can't go on at present; another attempt may succeed."""


def download(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    checksum: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Fetch an address to ``path``; a file that is already there is verified and kept.

    What has come lies in ``<name>.part`` until it is complete and verified; the next call goes on
    from there, if the server still has the same file. One process at a time: the caller sees to it.

    Args:
        size: bytes, where published.
        checksum: ``sha256:...`` or ``md5:...``, where published.
        progress: called with the bytes there and the bytes in all (None: the server doesn't say),
            once before the first byte of an attempt and then about every megabyte.

    Raises:
        BadInput: if the address can't be fetched, the file is not as published, or can't be
            written; the message names the address, the reason and the path.
    """
    if not url.startswith(("https://", "http://")):
        raise BadInput("download", url, "an https or http address")
    part = path.with_name(f"{path.name}.part")
    try:
        if path.exists():
            if wrong := _difference(path, size, checksum):
                raise BadInput("download", path.name, f"{wrong}; delete {path} and run again")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        report = progress or (lambda *_: None)
        _persist(lambda: _append(url, part, size=size, checksum=checksum, progress=report))
        if wrong := _difference(part, size, checksum):
            _discard(part)
            raise _RefusedError(wrong)
        _validator(part).unlink(missing_ok=True)
        part.replace(path)
    except _RefusedError as error:
        why = f"{url} could not be fetched: {error}"
        allowed = f"{why}; download it by hand to {path} and run again"
        raise BadInput("download", path.name, allowed) from error
    except OSError as error:  # of the disk: those of the network are caught where they arise
        allowed = f"{path} can't be written: {_reason(error)}"
        raise BadInput("download", path.name, allowed) from error
    return path


def _persist(attempt: Callable[[], None]) -> None:
    """Try again, after longer and longer pauses, what was cut off."""
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except _CutError as error:
            if number == ATTEMPTS - 1:
                raise _RefusedError(str(error)) from error
            time.sleep(PAUSE * 2**number)


def _append(
    url: str,
    part: Path,
    *,
    size: int | None,
    checksum: str | None,
    progress: Callable[[int, int | None], None],
) -> None:
    """Ask for what the part lacks; start again where the server can't give only that."""
    there = part.stat().st_size if part.exists() else 0
    if there and there == size:
        return
    known = _validator(part).read_text(encoding="utf-8") if _validator(part).exists() else ""
    headers = {"User-Agent": f"depthprobe/{__version__}", "Accept-Encoding": "identity"}
    if there and (known or checksum):  # else nothing would tell two versions spliced together
        headers["Range"] = f"bytes={there}-"
        if known:
            headers["If-Range"] = known
    with _open(Request(url, headers=headers), part) as response:  # noqa: S310 - http, see above
        done, total = _span(response, part, there)
        if size is not None and total not in {None, size}:
            raise _RefusedError(f"it offers {total} bytes, {size} are published")
        with part.open("ab" if done else "wb") as file:
            if not done:
                _validator(part).write_text(_version(response), encoding="utf-8")
            progress(done, total)
            while chunk := _read(response):
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise _CutError(f"the connection was cut after {done} of {total} bytes")


def _open(request: Request, part: Path) -> HTTPResponse:
    try:
        response: HTTPResponse = urlopen(request, timeout=TIMEOUT)  # noqa: S310 - http, see above
    except HTTPError as error:
        error.close()
        if error.code == 416:  # the part is longer than the file is by now
            _discard(part)
        again = error.code in {416, 429} or error.code >= 500
        raise (_CutError if again else _RefusedError)(
            f"HTTP {error.code} {error.reason}"
        ) from error
    except (OSError, HTTPException) as error:
        raise _RefusedError(_reason(error)) from error
    return response


def _span(response: HTTPResponse, part: Path, there: int) -> tuple[int, int | None]:
    """Where the response's bytes begin, and the size of the file if the server says it."""
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    span = _SPAN.fullmatch(response.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != there:
        _discard(part)
        raise _CutError("the server gave other bytes than were asked for")
    return there, int(span[2])


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise _CutError(f"the connection was cut ({_reason(error)})") from error


def _version(response: HTTPResponse) -> str:
    """What tells this version of the file from another: a strong ETag, else the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _validator(part: Path) -> Path:
    """Where the version that a part belongs to is kept."""
    return part.with_name(f"{part.name}.version")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _difference(path: Path, size: int | None, checksum: str | None) -> str:
    """How a file differs from what is published; empty if it does not."""
    there = path.stat().st_size
    if size is not None and there != size:
        return f"it has {there} bytes, {size} are published"
    if checksum is None:
        return ""
    algorithm, _, published = checksum.partition(":")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    return "" if digest == published else f"its {algorithm} is {digest}, {published} is published"


def _reason(error: Exception) -> str:
    """Why, in one line."""
    reason = error.reason if isinstance(error, URLError) else error
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return " ".join(text.split()) or type(error).__name__


# Public logs by name, fetched once from their official addresses into a cache.
#
# ``ml-1m`` is MovieLens 1M, ``amazon-2014:Beauty`` the 5-core of a category of the Amazon reviews.
# Addresses and checksums lie in one table, :data:`SETS`. Imports nothing heavy: the command line
# asks here whether a source is a name or a path.

try:
    import fcntl
except ImportError:  # Windows: two processes at once are then the user's care
    fcntl = None  # type: ignore[assignment]

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
MCAULEY = "https://mcauleylab.ucsd.edu/public_datasets/data"


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file as published; of a zip, ``members`` are what is taken out of it.

    ``size`` in bytes and ``checksum`` (``sha256:...`` or ``md5:...``) where they are published.
    """

    url: str
    size: int | None = None
    checksum: str | None = None
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.url.rpartition("/")[2]

    @property
    def gives(self) -> tuple[str, ...]:
        """The names of the files that a reader finds in the end."""
        return tuple(member.rpartition("/")[2] for member in self.members) or (self.name,)


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A public log: the files to fetch, what it is, and what its owners ask for."""

    name: str
    about: str
    files: tuple[PublicFile, ...]
    terms: str
    citation: str

    @property
    def family(self) -> str:
        """``amazon-2014`` of ``amazon-2014:Beauty``; a set without categories is its own."""
        return self.name.partition(":")[0]


# Sizes and SHA-256: tensorflow/datasets, url_checksums/movielens.txt. It lacks 10M and 32M: their
# MD5 is what GroupLens publishes beside them, in ml-10m.zip.md5 and ml-32m.zip.md5.
_MOVIELENS = (
    ("ml-100k", "100,000 ratings of 1,682 films by 943 users", "ml-100k/u.data ml-100k/u.item",
     4_924_029, "sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),
    ("ml-1m", "1,000,209 ratings of about 3,900 films by 6,040 users",
     "ml-1m/ratings.dat ml-1m/movies.dat",
     5_917_549, "sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
    ("ml-10m", "10,000,054 ratings of 10,681 films by 71,567 users",
     "ml-10M100K/ratings.dat ml-10M100K/movies.dat",
     65_566_137, "md5:ce571fd55effeba0271552578f2648bd"),
    ("ml-20m", "20,000,263 ratings of 27,278 films by 138,493 users",
     "ml-20m/ratings.csv ml-20m/movies.csv",
     198_702_078, "sha256:96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3"),
    ("ml-25m", "25,000,095 ratings of 62,423 films by 162,541 users",
     "ml-25m/ratings.csv ml-25m/movies.csv",
     261_978_986, "sha256:8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa"),
    ("ml-32m", "32,000,204 ratings of 87,585 films by 200,948 users",
     "ml-32m/ratings.csv ml-32m/movies.csv",
     238_950_008, "md5:d472be332d4daa821edc399621853b57"),
)  # fmt: skip

# A year, its reviews, their metadata, the page that links them, the paper, the categories there.
# In 2023 five more categories exist; nothing is left of them in the 5-core.
_AMAZON = (
    (
        2014,
        f"{SNAP}/reviews_{{}}_5.json.gz",
        f"{SNAP}/meta_{{}}.json.gz",
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
        "https://doi.org/10.1145/2766462.2767755",
        "Amazon_Instant_Video Apps_for_Android Automotive Baby Beauty Books CDs_and_Vinyl "
        "Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics "
        "Grocery_and_Gourmet_Food Health_and_Personal_Care Home_and_Kitchen Kindle_Store "
        "Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies "
        "Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games",
    ),
    (
        2018,
        f"{MCAULEY}/amazon_v2/categoryFilesSmall/{{}}_5.json.gz",
        f"{MCAULEY}/amazon_v2/metaFiles2/meta_{{}}.json.gz",
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
        "https://aclanthology.org/D19-1018/",
        "AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Automotive Books "
        "CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music "
        "Electronics Gift_Cards Grocery_and_Gourmet_Food Home_and_Kitchen "
        "Industrial_and_Scientific Kindle_Store Luxury_Beauty Magazine_Subscriptions "
        "Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies "
        "Prime_Pantry Software Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games "
        "Video_Games",
    ),
    (
        2023,
        f"{MCAULEY}/amazon_2023/benchmark/5core/rating_only/{{}}.csv.gz",
        f"{MCAULEY}/amazon_2023/raw/meta_categories/meta_{{}}.jsonl.gz",
        "https://amazon-reviews-2023.github.io/data_processing/5core.html",
        "https://arxiv.org/abs/2403.03952",
        "All_Beauty Arts_Crafts_and_Sewing Automotive Baby_Products Beauty_and_Personal_Care "
        "Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Electronics "
        "Gift_Cards Grocery_and_Gourmet_Food Health_and_Household Home_and_Kitchen "
        "Industrial_and_Scientific Kindle_Store Magazine_Subscriptions Movies_and_TV "
        "Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies Software "
        "Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Unknown Video_Games",
    ),
)


def _table() -> Iterator[PublicSet]:
    for name, about, members, size, checksum in _MOVIELENS:
        readme = f"{name}-README.{'txt' if name in {'ml-100k', 'ml-1m'} else 'html'}"
        url = f"{GROUPLENS}/{name}.zip"
        yield PublicSet(
            name=name,
            about=f"MovieLens, {about}",
            files=(
                PublicFile(url=url, size=size, checksum=checksum, members=tuple(members.split())),
            ),
            terms="for research, not for commercial use without GroupLens's permission, to be "
            f"acknowledged in publications; all conditions: {GROUPLENS}/{readme}",
            citation="https://doi.org/10.1145/2827872",
        )
    for year, reviews, metadata, page, citation, categories in _AMAZON:
        for name in categories.split():
            yield PublicSet(
                name=f"amazon-{year}:{name}",
                about=f"Amazon reviews to {year}, 5-core of {name.replace('_', ' ')}",
                files=(
                    PublicFile(url=reviews.format(name)),
                    PublicFile(url=metadata.format(name)),
                ),
                terms="no licence is given; collected from amazon.com by J. McAuley's group, "
                f"for research, to be cited: {page}",
                citation=citation,
            )


SETS: dict[str, PublicSet] = {one.name: one for one in _table()}


def public_sets() -> list[PublicSet]:
    """All sets, MovieLens first, then Amazon by year and category."""
    return list(SETS.values())


def is_public(name: str) -> bool:
    """Whether this names a public set and not a path; its category may still be misspelt."""
    return name.partition(":")[0] in {one.family for one in SETS.values()}


def public_set(name: str) -> PublicSet:
    """The entry of the table.

    Raises:
        BadInput: if there is none; the message has the nearest name.
    """
    if name in SETS:
        return SETS[name]
    family, _, category = name.partition(":")
    categories = [one.name.partition(":")[2] for one in SETS.values() if one.family == family]
    if any(categories):
        raise BadInput("data.source", name, f"for the category, {nearest(category, categories)}")
    known = dict.fromkeys(re.sub(":.*", ":CATEGORY", one) for one in SETS)
    raise BadInput("data.source", name, nearest(name, known))


def cache_folder() -> Path:
    """``$DEPTHPROBE_CACHE``, else ``$XDG_CACHE_HOME/depthprobe``, else ``~/.cache/depthprobe``."""
    if named := os.environ.get("DEPTHPROBE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "depthprobe"


def obtain(name: str, *, say: Callable[[str], None] | None = None) -> Path:
    """The folder in the cache with the raw files of a public set, fetched if they lack.

    What is said goes to stderr, or to ``say``: the terms before anything is fetched, then each
    address with its size. A file that was put into the cache by hand is verified and taken.

    Raises:
        BadInput: if there is no such set, an address can't be reached, a file is not as
            published, or the cache can't be written.
    """
    public = public_set(name)
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    folder = cache_folder() / "datasets" / name.replace(":", "/")
    if _complete(public, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f"{folder.name}.lock"), say):
            if not _complete(public, folder):
                remove_leftovers(folder)
                say(f"{name}: {public.terms}")
                for file in public.files:
                    _place(file, folder, say)
    except OSError as error:
        allowed = f"a folder that can be written ({error.strerror or error})"
        raise BadInput("DEPTHPROBE_CACHE", folder, allowed) from error
    return folder


def _complete(public: PublicSet, folder: Path) -> bool:
    return all((folder / name).is_file() for file in public.files for name in file.gives)


@contextmanager
def _alone(lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process fills the same folder; the lock dies with its process."""
    with lock.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process, which holds {lock}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _place(file: PublicFile, folder: Path, say: Callable[[str], None]) -> None:
    # an archive lies beside the folder, which holds nothing but what a reader reads
    path = (folder.parent if file.members else folder) / file.name
    progress = _progress(file.url, say)
    download(file.url, path, size=file.size, checksum=file.checksum, progress=progress)
    if not file.members:
        return
    try:
        with ZipFile(path) as archive:
            for member, name in zip(file.members, file.gives, strict=True):
                with complete_file(folder / name) as temporary, temporary.open("wb") as target:
                    shutil.copyfileobj(archive.open(member), target)
    except (BadZipFile, KeyError, EOFError, zlib.error) as error:
        allowed = f"a zip with {', '.join(file.members)} ({error}); delete it and run again"
        raise BadInput("data.source", path, allowed) from error


def _progress(url: str, say: Callable[[str], None]) -> Callable[[int, int | None], None]:
    """Say the address and the size once, and on a terminal every tenth of it."""
    tenths = -1

    def report(done: int, total: int | None) -> None:
        nonlocal tenths
        now = 10 * done // total if total else 0
        if tenths < 0:
            of = f", {total / 1e6:,.1f} MB" if total else ""
            say(f"fetching {url}{of}" + (f", {done / 1e6:,.1f} MB are here" if done else ""))
        elif now > tenths and sys.stderr.isatty():
            say(f"  {10 * now} %")
        tenths = max(tenths, now)

    return report
