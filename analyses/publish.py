"""Copy what may be published of runs: the page with its figures, its tables as CSV, the study.

    python analyses/publish.py reports/depth_curve runs/depth-curve-toys runs/depth-curve-ml-1m

Nothing of single users or items goes along, no weights, and no path of the machine outside of the
folder where this runs: sweep with relative paths. Two runs or more get a page side by side.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from depthprobe.report.comparison import build_comparison
from depthprobe.report.page import build_report
from depthprobe.runs.store import open_run

LARGEST = 1_000_000  # bytes of a file
KINDS = ("report.html", "study.toml", "tables/*.csv")
ROOTS = b"|".join(re.escape(os.fsencode(entry.name)) for entry in Path("/").iterdir())
PRIVATE = re.compile(rb"(?<![\w.-])/(?:home|Users|" + ROOTS + rb")/")  # begins a path of a machine


def main() -> None:
    target, runs = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    files: list[Path] = []
    for run in runs:
        shutil.rmtree(target / run.name, ignore_errors=True)
        build_report(open_run(run))
        files += [copied(file, run.parent, target) for kind in KINDS for file in run.glob(kind)]
    if len(runs) > 1:  # beside the runs, so that its links hold beside their copies too
        page = build_comparison(runs, runs[0].parent / "report.html")
        made = [page, *page.with_suffix("").glob("*.csv")]
        files += [copied(file, page.parent, target) for file in made]
    for file in files:
        content = file.read_bytes()
        if len(content) > LARGEST:
            sys.exit(f"error: {file} has {len(content):,} bytes; at most {LARGEST:,}")
        if found := PRIVATE.search(content):
            sys.exit(f"error: {file} names a path below {found[0].decode()}: use relative ones")
    print(f"{target}: {len(files)} files, {sum(f.stat().st_size for f in files):,} bytes")


def copied(file: Path, base: Path, target: Path) -> Path:
    """The copy of a file at the same place below ``target`` as it has below ``base``."""
    copy = target / file.relative_to(base)
    copy.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copyfile(file, copy)


if __name__ == "__main__":
    main()
