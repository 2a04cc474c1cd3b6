"""What a task finds: trials, or a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from depthprobe.models.recommender import Recommender
from depthprobe.probing.replace import Replacement
from depthprobe.sweep.plan import Trial
from depthprobe.training.loop import Fit


@dataclass(frozen=True)
class Result:
    """What a trial found: test ranks by protocol, and the model and its training if it has one.

    Attributes:
        ranks: of every test user, (E,) by protocol; and under ``"top-10"`` the best items, (E, 10).
        training_flops: of its training, without its teacher's.
        taught: seconds that its teacher took before, training and features.
        replacement: the map that stands for blocks of the teacher, whose weights the trial shares.
    """

    trial: Trial
    ranks: dict[str, np.ndarray]
    parameters: dict[str, int]
    flops: int | None = None
    fit: Fit | None = None
    training_flops: int | None = None
    taught: float = 0.0
    model: nn.Module | None = None
    replacement: Replacement | None = None

    @property
    def prompt(self) -> str | None:
        """``shared``, ``repeated`` or ``none``; None for what has no model of its own."""
        return self.model.prompt_mode if isinstance(self.model, Recommender) else None


@dataclass(frozen=True)
class Scores:
    """A table that speaks of blocks, spans or users, where no trial does."""

    frame: pd.DataFrame
