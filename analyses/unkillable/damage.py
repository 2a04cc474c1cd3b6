"""Damage by hand: each is mended by the same sweep, or named in one line."""

# ruff: noqa: S101, S603, S607 - it runs commands, and its assertions are what it is for
from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sweeps import check, complete, finish, start, tell

from depthprobe.runs.store import Run

CUT = 100  # bytes that are left of a file


def damages(study: Path, folder: Path, quiet: Run) -> Iterator[str]:
    """One line for each kind of damage."""
    for name, act in {
        "records": _records,
        "ranks": _ranks,
        "weights": _weights,
        "beginnings": _beginnings,
    }.items():
        run = Path(shutil.copytree(quiet.path, folder / f"damaged-{name}"))
        yield from act(study, run, quiet)
    if shutil.which("faketime"):
        yield _clock(study, folder, quiet)
    else:
        yield "a clock that jumps: not tried, it takes faketime"
    if os.geteuid() == 0 and shutil.which("mount"):
        yield from _disk(study, folder, quiet)
    else:
        yield "a full disk, a read-only one: not tried, they take root"


def _records(study: Path, run: Path, quiet: Run) -> Iterator[str]:
    before = complete(run)
    _cut(run / "trials" / "finetune-d02-s0" / "record.json")
    (run / "trials" / "heal-d01-s0" / "users.parquet").unlink()
    (run / "trials" / "skip-b02-s0" / "record.json").unlink()
    (run / "probes" / "similarity-s0" / "scores.parquet").unlink()
    (run / "trials.parquet").unlink()
    _cut(run / "metrics.parquet")
    finish(study, run, said=run.with_suffix(".txt"))
    check(run, quiet)
    now = complete(run)
    again = sorted(name for name in before if now[name] != before[name])
    assert again == ["finetune-d02-s0", "heal-d01-s0", "similarity-s0", "skip-b02-s0"], again
    yield "a record cut short, three of what they speak deleted, the tables: mended, no more done"


def _ranks(study: Path, run: Path, quiet: Run) -> Iterator[str]:
    users = run / "trials" / "distill-d01-s0" / "users.parquet"
    other = run / "trials" / "popularity-s0" / "users.parquet"
    for what, content in {
        "garbage": random.Random(0).randbytes(4096),  # noqa: S311
        "another trial's": other.read_bytes(),
    }.items():
        users.write_bytes(content)
        said = run.with_suffix(".txt")
        yield f"ranks overwritten, {what}: {tell(study, run, said=said)}"
        shutil.rmtree(users.parent)
        finish(study, run, said=said)
        check(run, quiet)


def _weights(study: Path, run: Path, quiet: Run) -> Iterator[str]:
    said = run.with_suffix(".txt")
    teacher = run / "trials" / "full-d04-s0"
    _cut(teacher / "model" / "trained.safetensors")
    shutil.rmtree(run / "trials" / "heal-d01-s0")
    yield f"the teacher's weights cut short: {tell(study, run, said=said)}"
    shutil.rmtree(teacher)
    finish(study, run, "--retry-failed", said=said)
    check(run, quiet)


def _beginnings(study: Path, run: Path, quiet: Run) -> Iterator[str]:
    said = run.with_suffix(".txt")
    for name in ("negatives.npy", "data/manifest.json", "timing.json"):
        (run / "shared" / name).unlink()
    (run / "trials" / ".tmp-left").mkdir()
    shutil.rmtree(run / "trials" / "popularity-s0")  # depths are timed for trials alone
    finish(study, run, said=said)
    check(run, quiet)
    yield "shared files deleted: mended"
    for name in ("manifest.json", "study.toml"):
        content = (run / name).read_bytes()
        _cut(run / name)
        yield f"{name} cut short: {tell(study, run, said=said)}"
        (run / name).write_bytes(content)


def _clock(study: Path, folder: Path, quiet: Run) -> str:
    """A sweep whose clock jumps two days back as it works, killed; one that begins in 2001."""
    run, said, clock = folder / "clock", folder / "clock.txt", folder / "offset"
    told = subprocess.run(
        ["faketime", "-f", "+0", "printenv", "LD_PRELOAD"], capture_output=True, text=True
    )
    variables = {
        "LD_PRELOAD": told.stdout.strip(),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    clock.write_text("+0\n")
    process = start(study, run, said=said, variables=variables)
    _wait_for_tasks(run, 3)
    clock.write_text("-2d\n")
    _wait_for_tasks(run, 8)
    assert process.poll() is None
    process.kill()
    process.wait()
    done = complete(run)
    clock.write_text("@2001-01-01 00:00:00\n")
    finish(study, run, said=said, variables=variables)
    check(run, quiet, done)
    return "a clock that jumps back two days, a kill, then one of 2001: as in peace, nothing twice"


def _disk(study: Path, folder: Path, quiet: Run) -> Iterator[str]:
    """Disks that are full at several moments, then have room; one that is read-only."""
    size = sum(path.stat().st_size for path in quiet.path.rglob("*") if path.is_file())
    for share in (0.02, 0.4, 0.9):
        with _mounted(folder / "disk", round(share * size)) as place:
            said = folder / "disk.txt"
            yield f"a disk of {share:.0%} of a run: {tell(study, place / 'run', said=said)}"
            _mount(place, "remount,size=1g")
            finish(study, place / "run", "--retry-failed", said=said)
            check(place / "run", quiet)
    with _mounted(folder / "disk", 2**30) as place:
        run = Path(shutil.copytree(quiet.path, place / "run"))
        shutil.rmtree(run / "trials" / "heal-d01-s0")
        _mount(place, "remount,ro")
        for name in ("run", "other"):
            what = "a run" if name == "run" else "a new run"
            yield f"{what} on a read-only disk: {tell(study, place / name, said=said)}"
        _mount(place, "remount,rw")
        finish(study, run, said=said)
        check(run, quiet)


@contextmanager
def _mounted(place: Path, size: int) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", options, place], check=True)


def _wait_for_tasks(run: Path, count: int) -> None:
    deadline = time.monotonic() + 600
    while len(complete(run)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:CUT])
