"""Signals that ask a run to stop: noted when they come, obeyed when it is safe."""

import contextlib
import os
import signal
import types
from collections.abc import Iterator

from mae.errors import Preempted

# A scheduler's, Ctrl-C, the notice before a time limit, the terminal that was closed.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def obeyed() -> list[signal.Signals]:
    """Those of STOPS that nobody has told this process to ignore, as `nohup` does with SIGHUP."""
    return [s for s in STOPS if signal.getsignal(s) is not signal.SIG_IGN]


class Stop:
    """While entered, the signals of STOPS set `asked` instead of ending the process; a second SIGINT ends it at once.

    Under torchrun it does not: a Ctrl-C reaches every rank twice, from the terminal and from the launcher, which kills what stays too long.
    There, a launcher that died is a reason to stop too: nobody else would end its ranks.
    """

    def __init__(self) -> None:
        self._told = False
        self._answer: str | None = None
        self._before: dict[int, object] = {}
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def asked(self) -> bool:
        """Whether this process was told to stop, or lost its launcher."""
        return self._told or (self._launcher is not None and os.getppid() != self._launcher)

    def __enter__(self) -> "Stop":
        self._before = {s: signal.signal(s, self._note) for s in obeyed()}
        return self

    def __exit__(self, *_: object) -> None:
        # torchrun sends SIGTERM to the ranks that end last: they are to end with the code that the first one has
        last = signal.SIG_IGN if self._launcher is not None and self.asked else None
        for number, handler in self._before.items():
            signal.signal(number, last or handler)  # type: ignore[arg-type]  # what `signal` gave is what it takes

    @contextlib.contextmanager
    def raising(self, answer: str) -> Iterator[None]:
        """While entered, a signal (or one that has come before) raises Preempted(answer), once."""
        self._answer = answer
        try:
            if self.asked:
                self._raise()
            yield
        finally:
            self._answer = None

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self._told = True
        if number == signal.SIGINT and self._launcher is None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGHUP:  # nothing more can be written to the terminal, and saving must not fail over it
            for descriptor in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        self._raise()

    def _raise(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            raise Preempted(answer)
