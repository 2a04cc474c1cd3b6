"""What ``depthprobe export`` wrote, as if it were somebody else's model.

EXPORTED=FOLDER depthprobe sweep --recommender examples.exported:build --data LOG
"""

from __future__ import annotations

import os

import depthprobe as dp


def build() -> object:
    """The trained recommender, and the items that it knows."""
    exported = dp.load_recommender(os.environ.get("EXPORTED", "build/exported"))
    exported.model.item_ids = exported.item_ids
    return exported.model
