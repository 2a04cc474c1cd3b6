"""Which weights exactly: a hub commit, or a hash of a folder's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedModel

CHUNK = 4 * 2**20


def backbone_revision(source: str, model: PreTrainedModel) -> str:
    """The hub's commit where there is one, else ``sha256:`` of the configuration and the weights.

    Args:
        source: what the model was loaded from.
        model: the loaded model; the embedded backbone is hashed in memory.
    """
    folder = Path(source)
    digest = hashlib.sha256()
    if folder.is_dir():
        for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        return f"sha256:{digest.hexdigest()[:16]}"
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest.update(model.config.to_json_string().encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()[:16]}"
