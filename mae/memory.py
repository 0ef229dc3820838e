"""Freed memory: kept for the next step, which takes as much again, or handed back to the system."""

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # glibc's malloc.h
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")  # a user's own settings of the same


def keep_freed() -> None:
    """From now on the process keeps what it frees, where its C library is glibc and its user has not chosen otherwise.

    By default large tensors are handed back as soon as they are freed, and the system clears every page of them anew in the next step.
    """
    mallopt = getattr(_library(), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in CHOSEN):
        mallopt(MMAP_THRESHOLD, 2**31 - 1)
        mallopt(TRIM_THRESHOLD, -1)  # never
        mallopt(ARENA_MAX, 1)  # what a thread has freed is there for all; threads' own arenas hand theirs back


def give_back() -> None:
    """Hands back what is free now: after a run, before something else."""
    trim = getattr(_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of that kind
        return None
