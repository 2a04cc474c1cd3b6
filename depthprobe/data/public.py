"""Public logs by name, downloaded once from their owners into a cache.

``ml-1m`` is MovieLens 1M, ``amazon-2014:Beauty`` the 5-core of a category of the Amazon reviews.
Addresses, checksums and terms lie in ``public.toml``. Imports nothing heavy: the command line looks
here to tell a name from a path.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from depthprobe import __version__
from depthprobe.errors import BadInput, nearest
from depthprobe.files import complete_file, remove_leftovers

RETRIES = 3  # retries of a broken download, after 1, 2 and 3 seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file as published, its ``size`` in bytes; of a zip, ``members`` are unpacked.

    ``checksum`` is ``sha256:...`` or ``md5:...``, where one is published.
    """

    url: str
    size: int | None = None
    checksum: str | None = None
    members: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.url.rpartition("/")[2]

    @property
    def contents(self) -> tuple[str, ...]:
        """The names of the files that a reader finds."""
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


def _load() -> Iterator[PublicSet]:
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    for entry in table["sets"]:
        for category in entry.get("categories", [""]):
            files = [file | {"url": file["url"].format(category)} for file in entry["files"]]
            yield PublicSet(
                name=f"{entry['name']}:{category}" if category else entry["name"],
                about=entry["about"].format(category.replace("_", " ")),
                files=tuple(PublicFile(**file) for file in files),
                terms=entry["terms"],
            )


SETS: dict[str, PublicSet] = {one.name: one for one in _load()}


def is_public(name: str) -> bool:
    """Whether this names a public set and not a path; the category is not checked."""
    return name.partition(":")[0] in {one.family for one in SETS.values()}


def public_set(name: str) -> PublicSet:
    """The entry of the table; ``BadInput`` with the nearest name if there is none."""
    if name in SETS:
        return SETS[name]
    family = name.partition(":")[0]
    categories = [one for one in SETS if one.startswith(f"{family}:")]
    known = categories or dict.fromkeys(re.sub(":.*", ":CATEGORY", one) for one in SETS)
    raise BadInput("data.source", name, nearest(name, known))


def cache_folder() -> Path:
    """``$DEPTHPROBE_CACHE``, else ``$XDG_CACHE_HOME/depthprobe``, else ``~/.cache/depthprobe``."""
    if named := os.environ.get("DEPTHPROBE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "depthprobe"


def fetch(name: str) -> Path:
    """The folder in the cache with the raw files of a public set, fetched if they are missing.

    The terms are logged before the download. A file that a user put into the cache is verified and
    used.

    Raises:
        BadInput: if there is no such set, an address can't be reached, a file is not as
            published, or the cache can't be written.
    """
    public = public_set(name)
    folder = cache_folder() / "datasets" / name.replace(":", "/")
    if not _missing(public, folder):
        return folder

    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock"), thread_local=False):
            if missing := _missing(public, folder):  # another process may have filled it
                remove_leftovers(folder)
                log.warning("%s: %s", name, public.terms)
            for file in missing:
                _fetch_file(file, folder)
    except OSError as error:
        allowed = f"a folder that can be written ({error.strerror or error})"
        raise BadInput("DEPTHPROBE_CACHE", folder, allowed) from error
    return folder


def _missing(public: PublicSet, folder: Path) -> list[PublicFile]:
    return [
        file
        for file in public.files
        if not all((folder / name).is_file() for name in file.contents)
    ]


def _fetch_file(file: PublicFile, folder: Path) -> None:
    import pooch  # type: ignore[import-untyped]

    # the archive goes beside the folder, which holds only files for a reader
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
    # identity: keep a file compressed that is published so
    headers = {"User-Agent": f"depthprobe/{__version__}", "Accept-Encoding": "identity"}
    try:
        store.fetch(file.name, downloader=pooch.HTTPDownloader(chunk_size=2**20, headers=headers))
    except (OSError, ValueError) as error:  # an error of the network, the disk, or the checksum
        fault = f"{file.url} could not be fetched ({' '.join(str(error).split())[:300]})"
        if path.exists():
            fault = f"{path} is not the published file, and {fault}"
        allowed = f"{fault}; download it by hand to {path} and run again"
        raise BadInput("data.source", file.name, allowed, fault=True) from error
    if not file.members:
        return
    try:
        with ZipFile(path) as opened:
            for member, name in zip(file.members, file.contents, strict=True):
                with (
                    complete_file(folder / name) as temporary,
                    temporary.open("wb") as target,
                    opened.open(member) as source,
                ):
                    shutil.copyfileobj(source, target)
    except (BadZipFile, KeyError, EOFError, zlib.error) as error:
        allowed = f"a zip with {', '.join(file.members)} ({error}); delete it and run again"
        raise BadInput("data.source", path, allowed) from error
