"""Peak memory of an action: what torch allocated and reserved on a GPU, or the process on a CPU.

These are three different things and stand in three columns: allocated is what tensors took,
reserved what torch's allocator held for them, RSS what the whole process had of the host's memory,
interpreter and libraries included. The first two say nothing of the driver's context, some
hundred MB on each GPU.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import torch

EVERY = 0.002  # seconds between looks at the process; a shorter peak may be missed


def kinds_of(device: torch.device) -> tuple[str, ...]:
    """What :func:`peak_memory` tells of a device."""
    return ("allocated", "reserved") if device.type == "cuda" else ("rss",)


def peak_memory(action: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Bytes at the worst moment of an action, in ``allocated`` and ``reserved`` or in ``rss``.

    What else is on the GPU or in the process at that time is in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        return {
            "allocated": float(torch.cuda.max_memory_allocated(device)),
            "reserved": float(torch.cuda.max_memory_reserved(device)),
        }
    _give_back()
    with _watched() as seen:
        action()
    return {"rss": float(max(seen))}


def free_memory(device: torch.device) -> int:
    """Bytes that may be had on a GPU, or of the host, which others share: half of what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // 2


def _give_back() -> None:
    """Let glibc return what was freed: it would keep it, and hide what the action itself takes."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _watched() -> Iterator[list[int]]:
    """The resident size of this process, looked at again and again inside the context."""
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def look() -> None:
        while not done.wait(EVERY):
            seen.append(process.memory_info().rss)

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    try:
        yield seen
    finally:
        seen.append(process.memory_info().rss)
        done.set()
        watch.join()
