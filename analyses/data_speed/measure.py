"""Wall time and peak memory of `depthprobe data prepare`, and the time to open what it wrote.

python analyses/data_speed/measure.py FOLDER
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

LOGS = ("log.csv", "log.json.gz")
OPENINGS = 7
# in a process of its own, so that nothing is loaded but what opening needs; imports don't count
OPEN = """
import sys, time
from depthprobe.data.storage import load_data
began = time.perf_counter()
load_data(sys.argv[1])
print(time.perf_counter() - began)
"""


def main(folder: str) -> None:
    """Measure each log of the folder; print a table, write ``data_speed.json`` beside them."""
    place = Path(folder)
    rows = [measure(place / name, place / f"prepared-{name}") for name in LOGS]
    found = {"machine": machine(), "logs": rows}
    (place / "data_speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()), end="\n\n")
    print(
        "| log | MB | interactions | users | items | prepare s | peak GB | MB written | open ms |"
    )
    print("|---|" + "---|" * 8)
    for row in rows:
        print(
            "| {log} | {log_mb:,.0f} | {interactions:,} | {users:,} | {items:,} | {prepare_s:.1f} "
            "| {peak_gb:.2f} | {output_mb:,.0f} | {open_ms:.1f} |".format(**row)
        )


def measure(log: Path, output: Path) -> dict[str, Any]:
    """One log, prepared once and opened several times; peak memory is the largest process's."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "depthprobe", "data", "prepare", str(log), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{log}: depthprobe data prepare ended with {process.returncode}")
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    opened = [
        float(subprocess.check_output([sys.executable, "-c", OPEN, str(output)]))  # noqa: S603
        for _ in range(OPENINGS)
    ]
    # in bytes on macOS, in kibibytes elsewhere
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "log": log.name,
        "log_mb": log.stat().st_size / 1e6,
        **{key: manifest[key] for key in ("interactions", "users", "items", "fingerprint")},
        "prepare_s": seconds,
        "peak_gb": usage.ru_maxrss * unit / 1e9,
        "output_mb": sum(path.stat().st_size for path in output.iterdir()) / 1e6,
        "open_ms": 1e3 * statistics.median(opened),
    }


def machine() -> dict[str, Any]:
    """What this was measured on."""
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("numpy", "pyarrow")},
    }


def processor() -> str:
    """Its name, where the system tells."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main(sys.argv[1])
