"""Public logs by name, fetched once from their owners' addresses into a cache.

``ml-1m`` is MovieLens 1M, ``amazon-2014:Beauty`` the 5-core of a category of the Amazon reviews.
Addresses and checksums lie in one table, :data:`SETS`. Imports nothing heavy: the command line
looks here to tell a name from a path.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from depthprobe import __version__
from depthprobe.errors import BadInput, nearest
from depthprobe.files import complete_file, remove_leftovers

RETRIES = 3  # of a download that is cut, after 1, 2 and 3 seconds

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
MCAULEY = "https://mcauleylab.ucsd.edu/public_datasets/data"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file as published, its ``size`` in bytes; of a zip, ``members`` are unpacked.

    ``checksum`` is ``sha256:...`` or ``md5:...``, where one is published.
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
    def contents(self) -> tuple[str, ...]:
        """The names of the files that a reader finds in the end."""
        return tuple(Path(member).name for member in self.members) or (self.name,)


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """A public log: the files to fetch, what it is, and its owners' terms."""

    name: str
    about: str
    files: tuple[PublicFile, ...]
    terms: str

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

# A year, its reviews, their metadata, the page that links them, the categories there.
# In 2023 five more categories exist; nothing is left of them in the 5-core.
_AMAZON = (
    (
        2014,
        f"{SNAP}/reviews_{{}}_5.json.gz",
        f"{SNAP}/meta_{{}}.json.gz",
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
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
        "All_Beauty Arts_Crafts_and_Sewing Automotive Baby_Products Beauty_and_Personal_Care "
        "Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Electronics "
        "Gift_Cards Grocery_and_Gourmet_Food Health_and_Household Home_and_Kitchen "
        "Industrial_and_Scientific Kindle_Store Magazine_Subscriptions Movies_and_TV "
        "Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies Software "
        "Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Unknown Video_Games",
    ),
)


def _movielens() -> Iterator[PublicSet]:
    for name, about, members, size, checksum in _MOVIELENS:
        url, parts = f"{GROUPLENS}/{name}.zip", tuple(members.split())
        readme = f"{name}-README.{'txt' if name in {'ml-100k', 'ml-1m'} else 'html'}"
        yield PublicSet(
            name=name,
            about=f"MovieLens, {about}",
            files=(PublicFile(url=url, size=size, checksum=checksum, members=parts),),
            terms="for research, not for commercial use without GroupLens's permission, to be "
            f"acknowledged in publications; all conditions: {GROUPLENS}/{readme}",
        )


def _amazon() -> Iterator[PublicSet]:
    for year, reviews, metadata, page, categories in _AMAZON:
        for name in categories.split():
            yield PublicSet(
                name=f"amazon-{year}:{name}",
                about=f"Amazon reviews to {year}, 5-core of {name.replace('_', ' ')}",
                files=tuple(PublicFile(url=url.format(name)) for url in (reviews, metadata)),
                terms="no licence is given; collected from amazon.com by J. McAuley's group, "
                f"for research, to be cited: {page}",
            )


# MovieLens first, then Amazon by year and category
SETS: dict[str, PublicSet] = {one.name: one for one in (*_movielens(), *_amazon())}


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
    categories = [one.partition(":")[2] for one in SETS if one.startswith(f"{family}:")]
    if categories:
        raise BadInput("data.source", name, f"for the category, {nearest(category, categories)}")
    known = dict.fromkeys(re.sub(":.*", ":CATEGORY", one) for one in SETS)
    raise BadInput("data.source", name, nearest(name, known))


def cache_folder() -> Path:
    """``$DEPTHPROBE_CACHE``, else ``$XDG_CACHE_HOME/depthprobe``, else ``~/.cache/depthprobe``."""
    if named := os.environ.get("DEPTHPROBE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "depthprobe"


def fetch(name: str) -> Path:
    """The folder in the cache with the raw files of a public set, fetched if they are missing.

    The terms are logged before anything is fetched. A file that was put into the cache by hand is
    verified and used.

    Raises:
        BadInput: if there is no such set, an address can't be reached, a file is not as
            published, or the cache can't be written.
    """
    public = public_set(name)
    folder = cache_folder() / "datasets" / name.replace(":", "/")
    if _is_complete(public, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not _is_complete(public, folder):  # another process may have filled it meanwhile
                remove_leftovers(folder)
                log.warning("%s: %s", name, public.terms)
                for file in public.files:
                    _fetch_file(file, folder)
    except OSError as error:
        allowed = f"a folder that can be written ({error.strerror or error})"
        raise BadInput("DEPTHPROBE_CACHE", folder, allowed) from error
    return folder


def _is_complete(public: PublicSet, folder: Path) -> bool:
    return all((folder / name).is_file() for file in public.files for name in file.contents)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Fill a folder alone, across processes and threads; the lock dies with its process."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.warning("waiting for another process, which holds %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_file(file: PublicFile, folder: Path) -> None:
    import pooch  # type: ignore[import-untyped]

    # an archive lies beside the folder, which holds only what a reader reads
    place = folder.parent if file.members else folder
    path = place / file.name
    pooch.get_logger().setLevel("ERROR")
    log.warning("fetching %s to %s", file.url, place)
    store = pooch.Pooch(
        path=place,
        base_url="",
        registry={file.name: file.checksum},
        urls={file.name: file.url},
        retry_if_failed=RETRIES,
    )
    # identity: a file that is published compressed stays so
    headers = {"User-Agent": f"depthprobe/{__version__}", "Accept-Encoding": "identity"}
    try:
        store.fetch(file.name, downloader=pooch.HTTPDownloader(chunk_size=2**20, headers=headers))
    except (OSError, ValueError) as error:  # of the network, the disk, or the checksum
        fault = f"{file.url} could not be fetched ({' '.join(str(error).split())[:300]})"
        if path.exists():
            fault = f"{path} is not the published file, and {fault}"
        allowed = f"{fault}; download it by hand to {path} and run again"
        raise BadInput("data.source", file.name, allowed) from error
    if file.members:
        _unpack(path, file, folder)


def _unpack(archive: Path, file: PublicFile, folder: Path) -> None:
    try:
        with ZipFile(archive) as opened:
            for member, name in zip(file.members, file.contents, strict=True):
                with (
                    complete_file(folder / name) as temporary,
                    temporary.open("wb") as target,
                    opened.open(member) as source,
                ):
                    shutil.copyfileobj(source, target)
    except (BadZipFile, KeyError, EOFError, zlib.error) as error:
        allowed = f"a zip with {', '.join(file.members)} ({error}); delete it and run again"
        raise BadInput("data.source", archive, allowed) from error
