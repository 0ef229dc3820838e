"""Signals belong to the main process: it decides what to save and when to stop, and its helpers must live until it has."""

import signal

STOPS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")  # what schedulers and terminals send to a whole process group


def leave_signals_to_the_main_process(worker: int = 0) -> None:
    """Ignores them here; a helper ends when the main process closes its queue, or is gone."""
    for name in STOPS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
