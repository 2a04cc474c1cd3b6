"""What probes say of blocks, spans and users, where no trial does; with the seed of its teacher."""

from __future__ import annotations

import pandas as pd

from depthprobe.report.summary import Summary


def probe_table(summary: Summary, method: str) -> pd.DataFrame:
    """The table of ``similarity``, ``taylor`` or ``settling``; empty where there is none."""
    run = summary.run
    return run.scores(method) if hasattr(run, "scores") else pd.DataFrame()


def scores_of(summary: Summary, score: str) -> pd.DataFrame:
    """One score by name: score, start, end, value, seed; of the blocks [start, end)."""
    frame = probe_table(summary, "similarity")
    return frame if frame.empty else frame[frame["score"] == score]
