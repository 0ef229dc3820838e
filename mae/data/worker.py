"""Signals belong to the main process: it decides what to save and when to stop, and its helpers live exactly as long as it does."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

STOPS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")  # what schedulers and terminals send to all processes of a job


def leave_signals_to_the_main_process() -> None:
    """Ignores them here."""
    for name in STOPS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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
