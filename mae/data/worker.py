"""Signals belong to the main process: it decides what to save and when to stop, and its helpers live exactly as long as it does."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.synchronize import SemLock
from typing import Any

STOPS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")  # what schedulers and terminals send to all processes of a job


def leave_signals_to_the_main_process() -> None:
    """Ignores them here."""
    for name in STOPS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """While entered, those signals wait; processes started inside are deaf to them from their first instruction on."""
    numbers = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_tracker() -> None:
    """Starts multiprocessing's own process that removes the queues' semaphores from /dev/shm when all who use them are dead.

    In a session of its own, as it must outlive a SIGKILL (and a SIGHUP or SIGUSR1, to which it listens) to all processes of the job.
    """
    tracker: Any = resource_tracker._resource_tracker  # its own parts are set here, which no stub knows
    if tracker._fd is not None:
        return
    read, write = os.pipe()
    os.set_inheritable(read, True)
    program = f"from multiprocessing.resource_tracker import main; main({read})"
    words = [os.fspath(spawn.get_executable()), *util._args_from_interpreter_flags(), "-c", program]  # type: ignore[attr-defined]
    with contextlib.suppress(NotImplementedError):  # then multiprocessing starts it in this session
        tracker._pid = os.posix_spawn(sys.executable, words, os.environ, setsid=True)
        tracker._fd = write
    os.close(read)
    if tracker._fd is None:
        os.close(write)


def context(preload: str) -> Any:
    """How processes are started: forked from a clean server that has imported the module `preload`.

    Forking this process would copy its CUDA context and its threads' locks.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([preload])
    return forks


@contextlib.contextmanager
def named_semaphores() -> Iterator[list[util.Finalize]]:
    """Yields a list that holds, on leaving, what removes the names of the semaphores made inside, for `forget`."""
    made: list[util.Finalize] = []
    before = set(util._finalizer_registry)  # type: ignore[attr-defined]
    yield made
    registry = util._finalizer_registry.copy()  # type: ignore[attr-defined]
    made += [f for key, f in registry.items() if key not in before and f._callback is SemLock._cleanup]  # type: ignore[attr-defined]


def forget(semaphores: list[util.Finalize]) -> None:
    """Takes the names of semaphores that all processes have opened out of /dev/shm: whatever dies from now on leaves nothing there."""
    for remove in semaphores:
        remove()  # does nothing where it has been done


def serve(worker: int) -> None:
    """Sets a reading process up; `worker` is its number, which nothing depends on."""
    leave_signals_to_the_main_process()
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    """Torch's workers watch their parent, which is the fork server; and that one lives as long as they do."""
    main = multiprocessing.parent_process()
    if main is not None:
        wait([main.sentinel])
        os._exit(1)
