"""What workers of a finished run did between their tasks, from the run's own logs.

    python analyses/sweep_overhead/gaps.py RUN

A worker's gap is from `done` of a task to `begun` of its next one, in whole seconds, as the logs
have them. A gap in which a task that the next one needs was still at work elsewhere is waiting, and
stands apart. The run must be of one sweep for what is once.
"""

from __future__ import annotations

import re
import statistics
import sys
from datetime import datetime

from depthprobe.runs.plan import plan
from depthprobe.runs.store import open_run

LINE = re.compile(r"(\S+ \S+) (?:begun by process (\d+) on (\S+)|done in ([\d.]+) s)")


def main() -> None:
    run = open_run(sys.argv[1])
    tasks = {task.id: task for task in plan(run.study, run.manifest.backbone.blocks)}
    spans: dict[str, list[tuple[datetime, datetime, str]]] = {}  # by worker
    ends: dict[str, datetime] = {}  # by what the task makes
    work = list[float]()
    for log in sorted((run.path / "logs").glob("*.log")):
        began = worker = None
        for line in log.read_text(encoding="utf-8").splitlines():
            if not (found := LINE.match(line)):
                continue
            at = datetime.fromisoformat(found[1])
            if found[2]:
                began, worker = at, f"{found[3]}-{found[2]}"
            elif began is not None and worker is not None:
                spans.setdefault(worker, []).append((began, at, log.stem))
                ends |= dict.fromkeys(tasks[log.stem].names, at)
                work.append(float(found[4]))
    free, waited = list[float](), list[float]()
    for own in spans.values():
        own.sort()
        for (_, done, _), (begun, _, name) in zip(own, own[1:], strict=False):
            needed = [ends[need] for need in tasks[name].needs if need in ends]
            gap = (begun - done).total_seconds()
            (waited if any(end > done for end in needed) else free).append(gap)
    print(f"{len(work)} tasks by {len(spans)} workers, {sum(work):.0f} s of work,", end=" ")
    print(f"{statistics.median(work):.0f} s in the middle")
    print(f"{len(free)} gaps without waiting: {sum(free):.0f} s in all, longest {max(free):.0f} s")
    print(f"a task: {sum(free) / len(free):.3f} s; of a minute: {sum(free) / len(free) / 60:.2%}")
    once = run.manifest.wall_seconds - sum(work) / len(spans)
    print(f"beside them, once: {once:.1f} s (timing depths, workers that begin and idle, tables)")
    print(f"{len(waited)} with waiting for another task: {sum(waited):.0f} s in all")


if __name__ == "__main__":
    main()
