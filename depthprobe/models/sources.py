"""Where a backbone comes from: the embedded one, a place on disk, or a commit on the hub."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT as HUB_ENDPOINT
from safetensors import SafetensorError

from depthprobe.study import BadInput

EMBEDDED = "embedded"
ALLOWED = f'"{EMBEDDED}", a folder with config.json and safetensors weights, or a hub model id'
# what the libraries raise for a source that can't be used; a missing package is an ImportError
FAILURES = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_folder(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether this names a place on disk rather than a model on the hub."""
    text = os.fspath(path_or_id)
    return (
        not isinstance(path_or_id, str)
        or text.startswith((".", "~", os.sep))
        or text.count(os.sep) > 1
        or os.path.exists(text)
    )


def folder_of(path_or_id: str | os.PathLike[str]) -> Path:
    """The path of a source on disk."""
    return Path(path_or_id).expanduser()


def location(path_or_id: str | os.PathLike[str]) -> str:
    """What the libraries are given: a path without ``~``, or the hub id."""
    return str(folder_of(path_or_id)) if is_folder(path_or_id) else os.fspath(path_or_id)


def offline(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether only local files can serve; without a name server the hub client retries for 30 s."""
    if is_folder(path_or_id):
        return True
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(HUB_ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def resolve_revision(path_or_id: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """The commit that a branch or tag of a hub id points to now; None for what is not on the hub.

    Without a network it is the commit in the local cache.

    Args:
        revision: branch, tag or commit; None is ``main``.

    Raises:
        BadInput: if there is no such model or revision.
    """
    if str(path_or_id) == EMBEDDED or is_folder(path_or_id):
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        # the cache keeps files by commit; what the configuration object knows of it depends on
        # the version of transformers
        file = hf_hub_download(
            os.fspath(path_or_id),
            "config.json",
            revision=revision or "main",
            local_files_only=offline(path_or_id),
        )
    except FAILURES as error:
        raise cannot("found", path_or_id, error) from error
    parent = Path(file).parent.name
    if not COMMIT.fullmatch(parent):
        allowed = "a model whose hub says which commit it serves, or a downloaded folder"
        raise BadInput("backbone", str(path_or_id), allowed)
    return parent


def cannot(what: str, path_or_id: str | os.PathLike[str], error: Exception) -> BadInput:
    """A library's error as one line; ``what`` could not be done with the source."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return BadInput("backbone", str(path_or_id), f"cannot be {what} ({reason}): {ALLOWED}")
